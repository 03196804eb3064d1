//! Runs the SQL text of the body; a JSON body holds `{"sql": "...", "params": [...]}`.
//!
//! The result goes to `out.rows` as `{"columns": [...], "rows": [[...], ...]}`. An error becomes a
//! reject with the error's text and its kind as the code.

use oncely_guest::sql::{self, ErrorKind, Row, Value};
use oncely_guest::{Failure, Message, outbox, outbox::Outgoing};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
pub struct Statement {
    pub sql: String,
    #[serde(default)]
    pub params: Vec<serde_json::Value>,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let statement = match message.json::<Statement>() {
        Ok(statement) => statement,
        Err(_) => Statement {
            sql: message.text()?.to_owned(),
            params: Vec::new(),
        },
    };
    let params = parameters(&statement.params)?;
    let rows = sql::query(&statement.sql, &params)
        .map_err(|error| Failure::reject(&error).code(code_of(error.kind())))?;
    let columns = rows.first().map(Row::columns).unwrap_or_default();
    let values: Vec<Vec<_>> = rows
        .iter()
        .map(|row| row.values().iter().map(in_json).collect())
        .collect();
    outbox::send(Outgoing::json(
        "out.rows",
        &json!({ "columns": columns, "rows": values }),
    )?)?;
    Ok(())
}

/// The parameters of a statement from JSON.
pub fn parameters(values: &[serde_json::Value]) -> Result<Vec<Value>, Failure> {
    values.iter().map(parameter).collect()
}

fn parameter(value: &serde_json::Value) -> Result<Value, Failure> {
    Ok(match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(truth) => Value::Boolean(*truth),
        serde_json::Value::String(text) => Value::Text(text.clone()),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Value::Int64(integer),
            (None, Some(float)) => Value::Float64(float),
            (None, None) => return Err(Failure::reject(format!("unsupported parameter {number}"))),
        },
        structured => Value::json(structured)?,
    })
}

fn in_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Null => serde_json::Value::Null,
        Value::Boolean(truth) => json!(truth),
        Value::Int64(number) | Value::Timestamp(number) => json!(number),
        Value::Float64(number) => json!(number),
        Value::Bytes(bytes) => json!(bytes),
        Value::Text(text)
        | Value::Decimal(text)
        | Value::Uuid(text)
        | Value::Json(text)
        | Value::Date(text)
        | Value::Time(text) => json!(text),
    }
}

/// The name of an error.
pub fn code_of(kind: &ErrorKind) -> &'static str {
    match kind {
        ErrorKind::ConstraintViolation(_) => "constraint-violation",
        ErrorKind::Conflict(_) => "conflict",
        ErrorKind::QueryFailed(_) => "query-failed",
        ErrorKind::NotAllowed(_) => "not-allowed",
        ErrorKind::InvalidParameter(_) => "invalid-parameter",
        ErrorKind::UnsupportedType(_) => "unsupported-type",
        ErrorKind::TooLarge(_) => "too-large",
        ErrorKind::Timeout => "timeout",
        ErrorKind::TransactionFailed(_) => "transaction-failed",
        ErrorKind::Other(_) => "other",
    }
}
