//! Durations, points in time and sizes as text: `30s`, `1h30m`, `7d`; `64MiB`, `500kB`.

use std::time::Duration;

use bytesize::ByteSize;
use jiff::tz::Offset;
use jiff::{SignedDuration, Span, SpanRelativeTo};

/// Parses a duration; a day has 24 hours.
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration");
    let span: Span = text.trim().parse().map_err(|_| wrong())?;
    let signed = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_| wrong())?;
    Duration::try_from(signed).map_err(|_| format!("`{text}` is negative"))
}

/// Formats a duration, such as `1h 30m`. [`parse_duration`] reads it without loss.
pub fn format_duration(duration: Duration) -> String {
    SignedDuration::try_from(duration).map_or_else(
        |_| format!("{}s", duration.as_secs()),
        |signed| format!("{signed:#}"),
    )
}

/// A duration in whole milliseconds, saturating.
pub fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Parses a size in bytes. `KiB`, `MiB` and `GiB` count in 1024s, `kB`, `MB` and `GB` in 1000s.
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let size: ByteSize = text
        .trim()
        .parse()
        .map_err(|_| format!("`{text}` is not a size"))?;
    Ok(size.as_u64())
}

/// Formats a size for display, such as `64 MiB`; in bytes where a larger unit is not exact.
pub fn format_size(bytes: u64) -> String {
    for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{} {name}", bytes / unit);
        }
    }
    format!("{bytes} B")
}

/// Formats a point in time for display: UTC, to the second, as `2026-01-31T13:05:59Z`.
pub fn format_time(time: jiff::Timestamp) -> String {
    format!("{time:.0}")
}

/// Parses a point in time: an age before `now` (`2h`), a time (`2026-01-31T12:00:00Z`), or the last
/// time of day in UTC (`12:00`).
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn parse_time(text: &str, now: jiff::Timestamp) -> Result<jiff::Timestamp, String> {
    let text = text.trim();
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let wrong = || format!("`{text}` is not a time: write 2h, 12:00 or 2026-01-31T12:00:00Z");
    if let Ok(time) = text.parse::<jiff::civil::Time>() {
        let today = Offset::UTC.to_datetime(now).date().to_datetime(time);
        let today = Offset::UTC.to_timestamp(today).map_err(|_| wrong())?;
        return Ok(if today > now {
            today - SignedDuration::from_hours(24)
        } else {
            today
        });
    }
    let ago = parse_duration(text).map_err(|_| wrong())?;
    now.checked_sub(ago).map_err(|_| wrong())
}

/// Durations as text in JSON, for `#[serde(with = "units::duration")]`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes a duration in the form of [`format_duration`](super::format_duration).
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::format_duration(*duration))
    }

    /// Reads a duration with [`parse_duration`](super::parse_duration).
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::parse_duration(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [
            ("10ms", 10),
            ("1s", 1000),
            ("1.5s", 1500),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("1 hour", 3_600_000),
            ("7d", 604_800_000),
            ("2w", 1_209_600_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in ["", "5", "soon", "-1s", "1 month", "1s ago"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn points_in_time_are_read_as_people_write_them() {
        let at = |text: &str| text.parse::<jiff::Timestamp>().unwrap();
        let now = at("2026-01-31T13:05:00Z");
        for (text, expected) in [
            ("2h", "2026-01-31T11:05:00Z"),
            ("12:00", "2026-01-31T12:00:00Z"),
            ("18:30", "2026-01-30T18:30:00Z"),
            ("2026-01-01T00:00:00+01:00", "2025-12-31T23:00:00Z"),
        ] {
            assert_eq!(parse_time(text, now), Ok(at(expected)), "{text}");
        }
        assert!(parse_time("noon", now).is_err());
    }

    #[test]
    fn a_formatted_duration_parses_without_loss() {
        for ns in [
            0,
            1,
            999_999,
            1_000_000,
            1_500_000_000,
            604_800_000_000_000,
            u64::MAX,
        ] {
            let duration = Duration::from_nanos(ns);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("1 kB"), Ok(1000));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("big").is_err());
        assert_eq!(format_size(64 << 20), "64 MiB");
        assert_eq!(format_size(1000), "1000 B");
    }
}
