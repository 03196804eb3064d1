//! Guest SQL as plain values: parameters, rows, errors, and the filter that every statement passes.

mod filter;
mod functions;
mod lexer;

use serde::{Deserialize, Serialize};

use crate::model::base64_text;

pub use filter::{STATEMENT_BYTES_MAX, StatementFacts, check_count, check_length, check_statement};
pub use functions::{Function, Functions};

/// Which database stands behind a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    Postgres,
    Sqlite,
}

/// A parameter or a column's value; see `interface sql` in `wit/worker.wit` for what each becomes where.
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
    /// About how many bytes this holds, for limits.
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

/// How large parameters may be together, in bytes, to be checked and copied on an async thread.
const LARGE_BYTES: usize = 256 << 10;

/// Whether checking and copying these parameters takes longer than an async thread has.
pub fn are_large(params: &[Value]) -> bool {
    params.iter().map(Value::size).sum::<usize>() > LARGE_BYTES
}

/// Rows and the names of their columns; the names are only known when there is a row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

impl Rows {
    /// About how many bytes they hold, for limits.
    pub fn size(&self) -> usize {
        let columns: usize = self.columns.iter().map(String::len).sum();
        columns + self.rows.iter().flatten().map(Value::size).sum::<usize>()
    }
}

/// A double as text: JSON has no words for those that are no numbers, and text loses nothing of the others.
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

/// What a database said of a statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseError {
    /// SQLSTATE, or SQLite's extended result code in decimal.
    pub code: String,
    pub message: String,
    pub constraint: Option<String>,
}

/// Why a guest's statement failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SqlError {
    ConstraintViolation(DatabaseError),
    /// Another transaction was in the way: running the delivery again will do.
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

/// What one statement may bring back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqlLimits {
    pub rows: usize,
    pub bytes: usize,
}
