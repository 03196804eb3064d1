//! The text forms of guest parameters, parsed alike for both databases.

use jiff::civil::{Date, Time};
use uuid::Uuid;

use crate::model::sql::SqlError;

const MICROS_PER_SECOND: i64 = 1_000_000;

/// A decimal, split at the point. Both parts contain only ASCII digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decimal<'t> {
    pub negative: bool,
    pub integer: &'t str,
    pub fraction: &'t str,
}

/// Parses a decimal such as `-12.50`: at most 131072 digits in total, and 16383 after the point.
pub(super) fn decimal(text: &str) -> Result<Decimal<'_>, SqlError> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (integer, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = integer
        .bytes()
        .chain(fraction.bytes())
        .all(|byte| byte.is_ascii_digit());
    let fits =
        (1..=131_072).contains(&(integer.len() + fraction.len())) && fraction.len() <= 16_383;
    if all_digits && fits {
        Ok(Decimal {
            negative,
            integer,
            fraction,
        })
    } else {
        Err(unreadable(text, "a decimal"))
    }
}

pub(super) fn text(text: &str) -> Result<&str, SqlError> {
    if text.contains('\0') {
        return Err(SqlError::InvalidParameter(
            "a text parameter cannot contain a NUL character".to_owned(),
        ));
    }
    Ok(text)
}

pub(super) fn uuid(text: &str) -> Result<Uuid, SqlError> {
    Uuid::try_parse(text).map_err(|_| unreadable(text, "a UUID"))
}

/// Checks that a text is valid JSON.
pub(super) fn json(text: &str) -> Result<&str, SqlError> {
    match serde_json::from_str::<serde::de::IgnoredAny>(text) {
        Ok(_) => Ok(text),
        Err(error) => Err(SqlError::InvalidParameter(format!(
            "a json parameter is invalid: {error}"
        ))),
    }
}

/// Parses a date such as `2026-01-31`.
pub(super) fn date(text: &str) -> Result<Date, SqlError> {
    Date::strptime("%Y-%m-%d", text).map_err(|_| unreadable(text, "a date such as 2026-01-31"))
}

/// Parses a time of day such as `13:05:59.25` into microseconds since midnight.
pub(super) fn time(text: &str) -> Result<i64, SqlError> {
    // SQL's notation for the end of a day.
    if let Some(zeros) = text.strip_prefix("24:00:00")
        && (zeros.is_empty()
            || zeros
                .strip_prefix('.')
                .is_some_and(|zeros| zeros.bytes().all(|digit| digit == b'0')))
    {
        return Ok(24 * 60 * 60 * MICROS_PER_SECOND);
    }
    let time = Time::strptime("%H:%M:%S%.f", text)
        .map_err(|_| unreadable(text, "a time such as 13:05:59.25"))?;
    let seconds =
        (i64::from(time.hour()) * 60 + i64::from(time.minute())) * 60 + i64::from(time.second());
    Ok(seconds * MICROS_PER_SECOND + i64::from(time.subsec_nanosecond()) / 1000)
}

/// A time of day as text, without trailing zeros in its fraction.
pub(super) fn time_text(micros: i64) -> String {
    let seconds = micros / MICROS_PER_SECOND;
    let whole = format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    );
    match micros % MICROS_PER_SECOND {
        0 => whole,
        fraction => format!("{whole}.{fraction:06}")
            .trim_end_matches('0')
            .to_owned(),
    }
}

fn unreadable(text: &str, what: &str) -> SqlError {
    let shown: String = text.chars().take(60).collect();
    SqlError::InvalidParameter(format!("`{shown}` is not {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_must_parse_as_its_declared_type() {
        assert_eq!(
            decimal("-12.50"),
            Ok(Decimal {
                negative: true,
                integer: "12",
                fraction: "50"
            })
        );
        assert!(
            ["", ".", "1e9", "NaN", "1.2.3", "١"]
                .iter()
                .all(|text| decimal(text).is_err())
        );
        assert!(uuid("nope").is_err() && json("{").is_err() && text("a\0").is_err());
        assert!(json(r#"{"a":[1,2]}"#).is_ok());
        assert!(
            date("2026-02-30").is_err() && date("2026-1").is_err() && time("25:00:00").is_err()
        );
    }

    #[test]
    fn times_of_day_round_trip() {
        for text in ["00:00:00", "13:05:59.25", "23:59:59.999999", "24:00:00"] {
            assert_eq!(time(text).map(time_text), Ok(text.to_owned()));
        }
    }
}
