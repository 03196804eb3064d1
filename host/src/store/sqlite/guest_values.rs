//! Guest values in SQLite's storage classes; see `interface sql` in `wit/worker.wit`.

use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, Column, Row, TypeInfo, ValueRef};

use crate::model::sql::{SqlError, Value};
use crate::store::values;

/// Binds a guest's parameters. Dates, times and UUIDs are stored in the one text form that compares
/// and sorts correctly.
pub(super) fn bind(params: &[Value]) -> Result<SqliteArguments, SqlError> {
    let mut arguments = SqliteArguments::default();
    for value in params {
        let added = match value {
            Value::Null => arguments.add(None::<i64>),
            Value::Boolean(truth) => arguments.add(i64::from(*truth)),
            Value::Int64(number) | Value::Timestamp(number) => arguments.add(*number),
            // SQLite would store it as null.
            Value::Float64(number) if number.is_nan() => {
                return Err(SqlError::InvalidParameter(
                    "SQLite cannot store a float that is not a number".to_owned(),
                ));
            }
            Value::Float64(number) => arguments.add(*number),
            Value::Decimal(text) => values::decimal(text).map(|_| arguments.add(text.clone()))?,
            Value::Text(text) => arguments.add(values::text(text)?.to_owned()),
            Value::Bytes(bytes) => arguments.add(bytes.clone()),
            Value::Uuid(text) => arguments.add(values::uuid(text)?.to_string()),
            Value::Json(text) => arguments.add(values::json(text)?.to_owned()),
            Value::Date(text) => arguments.add(values::date(text)?.to_string()),
            Value::Time(text) => arguments.add(values::time_text(values::time(text)?)),
        };
        added.map_err(|error| SqlError::InvalidParameter(error.to_string()))?;
    }
    Ok(arguments)
}

/// Reads one column of a row.
pub(super) fn decode(row: &SqliteRow, at: usize) -> Result<Value, SqlError> {
    let unreadable = |why: String| {
        let column = row.columns().get(at).map_or("?", |column| column.name());
        SqlError::UnsupportedType(format!("column `{column}` cannot be decoded: {why}"))
    };
    let raw = row
        .try_get_raw(at)
        .map_err(|error| unreadable(error.to_string()))?;
    if raw.is_null() {
        return Ok(Value::Null);
    }
    let storage_class = raw.type_info().name().to_owned();
    let value = match storage_class.as_str() {
        "INTEGER" => row.try_get_unchecked(at).map(Value::Int64),
        "REAL" => row.try_get_unchecked(at).map(Value::Float64),
        "TEXT" => row.try_get_unchecked(at).map(Value::Text),
        "BLOB" => row.try_get_unchecked(at).map(Value::Bytes),
        other => return Err(unreadable(format!("it has the type {other}"))),
    };
    value.map_err(|error| unreadable(error.to_string()))
}
