//! Guest values in PostgreSQL's binary format; see `interface sql` in `wit/worker.wit`.

use jiff::civil::Date;
use jiff::{Span, Unit};
use sqlx::encode::IsNull;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgArgumentBuffer, PgRow, PgTypeInfo};
use sqlx::{Column, Encode, Postgres, Row, Type, TypeInfo, ValueRef};
use uuid::Uuid;

use crate::model::sql::{SqlError, Value};
use crate::store::values::{self, Decimal};

/// The microseconds from the Unix epoch to PostgreSQL's epoch, the year 2000.
const EPOCH_MICROS: i64 = 946_684_800_000_000;
const EPOCH_DATE: Date = Date::constant(2000, 1, 1);

/// The first byte of every jsonb value.
const JSONB_VERSION: u8 = 1;

const NUMERIC_NEGATIVE: u16 = 0x4000;
const NUMERIC_NAN: u16 = 0xC000;
const NUMERIC_INFINITY: u16 = 0xD000;
const NUMERIC_NEGATIVE_INFINITY: u16 = 0xF000;

/// A guest's parameter in its binary form.
pub(super) struct Parameter {
    kind: Kind,
    bytes: Option<Vec<u8>>,
}

/// The declared type of a parameter, by its fixed object id.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// The server infers it; only for nulls.
    Unspecified = 0,
    Bool = 16,
    Bytea = 17,
    Int8 = 20,
    Text = 25,
    Float8 = 701,
    Date = 1082,
    Time = 1083,
    Timestamptz = 1184,
    Numeric = 1700,
    Uuid = 2950,
    Jsonb = 3802,
}

impl Parameter {
    pub(super) fn of(value: &Value) -> Result<Self, SqlError> {
        let (kind, bytes) = match value {
            Value::Null => {
                return Ok(Parameter {
                    kind: Kind::Unspecified,
                    bytes: None,
                });
            }
            Value::Boolean(truth) => (Kind::Bool, vec![u8::from(*truth)]),
            Value::Int64(number) => (Kind::Int8, number.to_be_bytes().to_vec()),
            Value::Float64(number) => (Kind::Float8, number.to_be_bytes().to_vec()),
            Value::Decimal(text) => (Kind::Numeric, numeric_bytes(values::decimal(text)?)),
            Value::Text(text) => (Kind::Text, values::text(text)?.as_bytes().to_vec()),
            Value::Bytes(bytes) => (Kind::Bytea, bytes.clone()),
            Value::Uuid(text) => (Kind::Uuid, values::uuid(text)?.as_bytes().to_vec()),
            Value::Json(text) => (
                Kind::Jsonb,
                [&[JSONB_VERSION], values::json(text)?.as_bytes()].concat(),
            ),
            Value::Timestamp(micros) => {
                let since_2000 = micros
                    .checked_sub(EPOCH_MICROS)
                    .ok_or_else(|| too_early(*micros))?;
                (Kind::Timestamptz, since_2000.to_be_bytes().to_vec())
            }
            Value::Date(text) => (
                Kind::Date,
                days_since_2000(values::date(text)?)?.to_be_bytes().to_vec(),
            ),
            Value::Time(text) => (Kind::Time, values::time(text)?.to_be_bytes().to_vec()),
        };
        Ok(Parameter {
            kind,
            bytes: Some(bytes),
        })
    }

    /// One character per type.
    pub(super) fn type_code(&self) -> char {
        match self.kind {
            Kind::Unspecified => 'n',
            Kind::Bool => 'b',
            Kind::Bytea => 'y',
            Kind::Int8 => 'i',
            Kind::Text => 't',
            Kind::Float8 => 'f',
            Kind::Date => 'd',
            Kind::Time => 'c',
            Kind::Timestamptz => 's',
            Kind::Numeric => 'm',
            Kind::Uuid => 'u',
            Kind::Jsonb => 'j',
        }
    }
}

impl Type<Postgres> for Parameter {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(Kind::Unspecified as u32))
    }
}

impl Encode<'_, Postgres> for Parameter {
    fn encode_by_ref(
        &self,
        buffer: &mut PgArgumentBuffer,
    ) -> Result<IsNull, sqlx::error::BoxDynError> {
        let Some(bytes) = &self.bytes else {
            return Ok(IsNull::Yes);
        };
        buffer.extend_from_slice(bytes);
        Ok(IsNull::No)
    }

    fn produces(&self) -> Option<PgTypeInfo> {
        Some(PgTypeInfo::with_oid(Oid(self.kind as u32)))
    }
}

/// Decodes one column of a row.
pub(super) fn decode(row: &PgRow, at: usize) -> Result<Value, SqlError> {
    let column = row.column(at);
    let raw = row
        .try_get_raw(at)
        .map_err(|error| SqlError::UnsupportedType(error.to_string()))?;
    if raw.is_null() {
        return Ok(Value::Null);
    }
    let type_name = column.type_info().name();
    let value = raw
        .as_bytes()
        .ok()
        .and_then(|bytes| from_bytes(type_name, bytes));
    value.ok_or_else(|| {
        SqlError::UnsupportedType(format!(
            "column `{}` has the unsupported type {type_name}; select it as `{}::text`",
            column.name(),
            column.name()
        ))
    })
}

fn from_bytes(type_name: &str, bytes: &[u8]) -> Option<Value> {
    Some(match type_name {
        "BOOL" => Value::Boolean(bytes.first()? != &0),
        "INT2" => Value::Int64(i16::from_be_bytes(bytes.try_into().ok()?).into()),
        "INT4" => Value::Int64(i32::from_be_bytes(bytes.try_into().ok()?).into()),
        "INT8" => Value::Int64(i64::from_be_bytes(bytes.try_into().ok()?)),
        "OID" => Value::Int64(u32::from_be_bytes(bytes.try_into().ok()?).into()),
        "FLOAT4" => Value::Float64(f32::from_be_bytes(bytes.try_into().ok()?).into()),
        "FLOAT8" => Value::Float64(f64::from_be_bytes(bytes.try_into().ok()?)),
        "NUMERIC" => Value::Decimal(numeric_text(bytes)?),
        "TEXT" | "VARCHAR" | "CHAR" | "NAME" | "UNKNOWN" => Value::Text(text(bytes)?),
        "BYTEA" => Value::Bytes(bytes.to_vec()),
        "UUID" => Value::Uuid(Uuid::from_slice(bytes).ok()?.to_string()),
        "JSON" => Value::Json(text(bytes)?),
        "JSONB" => Value::Json(text(bytes.strip_prefix(&[JSONB_VERSION])?)?),
        "TIMESTAMP" | "TIMESTAMPTZ" => Value::Timestamp(timestamp_micros(i64::from_be_bytes(
            bytes.try_into().ok()?,
        ))?),
        "DATE" => Value::Date(date_text(i32::from_be_bytes(bytes.try_into().ok()?))?),
        "TIME" => Value::Time(values::time_text(i64::from_be_bytes(
            bytes.try_into().ok()?,
        ))),
        _ => return None,
    })
}

fn text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

/// `None` for the two infinities.
fn timestamp_micros(since_2000: i64) -> Option<i64> {
    if since_2000 == i64::MIN {
        None
    } else {
        since_2000.checked_add(EPOCH_MICROS)
    }
}

fn too_early(micros: i64) -> SqlError {
    SqlError::InvalidParameter(format!("{micros} is too early for a timestamp"))
}

fn days_since_2000(date: Date) -> Result<i32, SqlError> {
    let days = EPOCH_DATE
        .until((Unit::Day, date))
        .map(|span| span.get_days());
    days.map_err(|error| SqlError::InvalidParameter(error.to_string()))
}

/// `None` for the two infinities and for years of more than four digits.
fn date_text(days: i32) -> Option<String> {
    let span = Span::new().try_days(days).ok()?;
    EPOCH_DATE
        .checked_add(span)
        .ok()
        .map(|date| date.to_string())
}

/// A decimal in PostgreSQL's format: base-10000 digits, preceded by count, weight, sign and scale.
fn numeric_bytes(decimal: Decimal<'_>) -> Vec<u8> {
    let padding_before = "0".repeat((4 - decimal.integer.len() % 4) % 4);
    let padding_behind = "0".repeat((4 - decimal.fraction.len() % 4) % 4);
    let all = [
        &padding_before,
        decimal.integer,
        decimal.fraction,
        &padding_behind,
    ]
    .concat();
    let groups: Vec<u16> = all
        .as_bytes()
        .chunks(4)
        .map(|group| {
            group
                .iter()
                .fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'))
        })
        .collect();
    let zeros_before = groups.iter().take_while(|group| **group == 0).count();
    let zeros_behind = groups
        .iter()
        .skip(zeros_before)
        .rev()
        .take_while(|group| **group == 0)
        .count();
    let significant = groups
        .get(zeros_before..groups.len() - zeros_behind)
        .unwrap_or_default();
    let groups_before_point = decimal.integer.len().div_ceil(4);
    let weight = if significant.is_empty() {
        0
    } else {
        groups_before_point as i32 - zeros_before as i32 - 1
    };
    let sign = if decimal.negative && !significant.is_empty() {
        NUMERIC_NEGATIVE
    } else {
        0
    };
    let head = [
        significant.len() as u16,
        weight as u16,
        sign,
        decimal.fraction.len() as u16,
    ];
    head.iter()
        .chain(significant)
        .flat_map(|number| number.to_be_bytes())
        .collect()
}

/// The reverse of [`numeric_bytes`], with as many digits after the point as the database displays.
fn numeric_text(bytes: &[u8]) -> Option<String> {
    let mut numbers = bytes.chunks_exact(2).map(|pair| {
        pair.iter()
            .fold(0_u16, |sum, byte| sum << 8 | u16::from(*byte))
    });
    let (_count, weight, sign, scale) = (
        numbers.next()?,
        numbers.next()? as i16,
        numbers.next()?,
        numbers.next()?,
    );
    match sign {
        NUMERIC_NAN => return Some("NaN".to_owned()),
        NUMERIC_INFINITY => return Some("Infinity".to_owned()),
        NUMERIC_NEGATIVE_INFINITY => return Some("-Infinity".to_owned()),
        _ => {}
    }
    let digits: Vec<u16> = numbers.collect();
    let group = |place: i32| {
        let at = usize::try_from(i32::from(weight) - place).ok();
        at.and_then(|at| digits.get(at)).copied().unwrap_or(0)
    };
    let integer: String = (0..=i32::from(weight))
        .rev()
        .map(|place| format!("{:04}", group(place)))
        .collect();
    let integer = integer.trim_start_matches('0');
    let fraction_groups = (i32::from(scale) + 3) / 4;
    let fraction: String = (1..=fraction_groups)
        .map(|place| format!("{:04}", group(-place)))
        .collect();
    let mut text = if sign == NUMERIC_NEGATIVE {
        "-".to_owned()
    } else {
        String::new()
    };
    text.push_str(if integer.is_empty() { "0" } else { integer });
    if scale > 0 {
        text.push('.');
        text.push_str(fraction.get(..usize::from(scale))?);
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_round_trip_digit_by_digit() {
        for text in [
            "0",
            "0.00",
            "12.50",
            "-12.50",
            "10000",
            "0.00001234",
            "99999999999999999999.9999",
            "1000000.5",
        ] {
            let bytes = numeric_bytes(values::decimal(text).unwrap());
            assert_eq!(numeric_text(&bytes).as_deref(), Some(text));
        }
    }

    #[test]
    fn dates_count_from_2000() {
        for (text, days) in [("2000-01-01", 0), ("1999-12-31", -1), ("2026-01-31", 9527)] {
            assert_eq!(days_since_2000(values::date(text).unwrap()), Ok(days));
            assert_eq!(date_text(days).as_deref(), Some(text));
        }
        assert_eq!(date_text(i32::MAX), None);
    }
}
