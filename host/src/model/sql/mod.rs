//! Guest SQL as plain values: parameters, rows, errors, and the statement filter.

mod filter;
mod functions;
mod lexer;

use serde::{Deserialize, Serialize};

use crate::model::base64_text;

pub use filter::{STATEMENT_BYTES_MAX, StatementFacts, check_count, check_length, check_statement};
pub use functions::{Function, Functions};

/// The database behind a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    Postgres,
    Sqlite,
}

/// A parameter, or the value of a column. `interface sql` in `wit/worker.wit` defines the
/// conversions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Value {
    Null,
    Boolean(bool),
    Int64(i64),
    #[serde(with = "float_text")]
    Float64(f64),
    Decimal(String),
    Text(String),
    #[serde(with = "base64_text")]
    Bytes(Vec<u8>),
    Uuid(String),
    Json(String),
    /// Microseconds since the Unix epoch, UTC.
    Timestamp(i64),
    Date(String),
    Time(String),
}

impl Value {
    /// The approximate size in bytes, for limits.
    pub fn size(&self) -> usize {
        match self {
            Value::Null
            | Value::Boolean(_)
            | Value::Int64(_)
            | Value::Float64(_)
            | Value::Timestamp(_) => 8,
            Value::Bytes(bytes) => bytes.len() + 8,
            Value::Decimal(text)
            | Value::Text(text)
            | Value::Uuid(text)
            | Value::Json(text)
            | Value::Date(text)
            | Value::Time(text) => text.len() + 8,
        }
    }
}

/// The largest total size of parameters that are checked and copied on an async thread, in bytes.
const LARGE_BYTES: usize = 256 << 10;

/// Whether checking and copying these parameters takes too long for an async thread.
pub fn are_large(params: &[Value]) -> bool {
    params.iter().map(Value::size).sum::<usize>() > LARGE_BYTES
}

/// Rows, and the names of their columns. The names are only known if there is a row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

impl Rows {
    /// The approximate size in bytes, for limits.
    pub fn size(&self) -> usize {
        let columns: usize = self.columns.iter().map(String::len).sum();
        columns + self.rows.iter().flatten().map(Value::size).sum::<usize>()
    }
}

/// A double as text. JSON has no form for NaN and infinity, and text loses nothing of the others.
mod float_text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(float: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&float.to_string())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The error that a database reports for a statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseError {
    /// SQLSTATE, or SQLite's extended result code in decimal.
    pub code: String,
    pub message: String,
    pub constraint: Option<String>,
}

/// The failure of a guest's statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SqlError {
    ConstraintViolation(DatabaseError),
    /// Another transaction interfered. Running the delivery again resolves it.
    Conflict(DatabaseError),
    QueryFailed(DatabaseError),
    NotAllowed(String),
    InvalidParameter(String),
    UnsupportedType(String),
    TooLarge(String),
    Timeout,
    /// The transaction is aborted.
    TransactionFailed(String),
}

impl std::fmt::Display for SqlError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SqlError::ConstraintViolation(error)
            | SqlError::Conflict(error)
            | SqlError::QueryFailed(error) => {
                write!(f, "{} ({})", error.message, error.code)
            }
            SqlError::NotAllowed(why)
            | SqlError::InvalidParameter(why)
            | SqlError::UnsupportedType(why)
            | SqlError::TooLarge(why)
            | SqlError::TransactionFailed(why) => f.write_str(why),
            SqlError::Timeout => {
                f.write_str("the time of this delivery ran out during a statement")
            }
        }
    }
}

/// The largest result of one statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqlLimits {
    pub rows: usize,
    pub bytes: usize,
}
