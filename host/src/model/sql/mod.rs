//! Guest SQL as plain values: parameters, rows, errors, and the statement filter.

mod filter;
mod functions;
mod lexer;

use crate::model::explanation::codes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::base64_text;

pub use filter::{STATEMENT_BYTES_MAX, StatementFacts, check_count, check_length, check_statement};
pub use functions::{Function, Functions};

/// The database behind a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// PostgreSQL.
    Postgres,
    /// SQLite.
    Sqlite,
}

/// A parameter, or the value of a column. `interface sql` in `wit/worker.wit` defines the
/// conversions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Value {
    /// SQL null, of any type.
    Null,
    /// A boolean; an integer 0 or 1 on SQLite.
    Boolean(bool),
    /// An integer of any size up to 64 bits.
    Int64(i64),
    /// A double-precision float, possibly infinite or not a number.
    #[serde(with = "float_text")]
    Float64(f64),
    /// An exact decimal in text form, such as `12.50`; text on SQLite.
    Decimal(String),
    /// Text in UTF-8.
    Text(String),
    /// Bytes: `bytea` on PostgreSQL, a blob on SQLite.
    #[serde(with = "base64_text")]
    Bytes(Vec<u8>),
    /// A UUID in text form; text on SQLite.
    Uuid(String),
    /// JSON text (`json` and `jsonb`); text on SQLite.
    Json(String),
    /// Microseconds since the Unix epoch, UTC.
    Timestamp(i64),
    /// A date as `2026-01-31`; text on SQLite.
    Date(String),
    /// A time of day as `13:05:59.25`; text on SQLite.
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
    /// The names of the columns, in order.
    pub columns: Vec<String>,
    /// The rows; each as long as `columns`.
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
    /// The error message of the database.
    pub message: String,
    /// The violated constraint, where the database names it.
    pub constraint: Option<String>,
}

/// The failure of a guest's statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SqlError {
    /// A constraint was violated.
    ConstraintViolation(DatabaseError),
    /// Another transaction interfered. Running the delivery again resolves it.
    Conflict(DatabaseError),
    /// The database refused the statement for another reason.
    QueryFailed(DatabaseError),
    /// Workers may not run this kind of statement.
    NotAllowed(String),
    /// A parameter does not parse as its type.
    InvalidParameter(String),
    /// A column has a type without a [`Value`].
    UnsupportedType(String),
    /// The statement or its result exceeds the limits, or there are too many statements.
    TooLarge(String),
    /// The time limit of the delivery was reached.
    Timeout,
    /// The transaction is aborted.
    TransactionFailed(String),
}

codes! {
    /// The variant of an error that a guest gets for a statement.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum SqlErrorCode {
        ConstraintViolation: "constraint-violation",
            "A constraint was violated. The error names it. The delivery has failed.",
            "Check before the statement, or use `on conflict`.";
        Conflict: "conflict",
            "Another transaction interfered. The host runs the delivery again.",
            "Return the error.";
        QueryFailed: "query-failed",
            "The database refused the statement for another reason. The delivery has failed.",
            "Correct the statement; the message is that of the database.";
        NotAllowed: "not-allowed",
            "Workers may not run this kind of statement, or call this function.",
            "Use a permitted statement; the message names the rule.";
        InvalidParameter: "invalid-parameter",
            "A parameter does not parse as its type.",
            "Pass a value of the type, or validate it before.";
        UnsupportedType: "unsupported-type",
            "A column has a type that the interface cannot represent.",
            "Cast the column, for example to text.";
        TooLarge: "too-large",
            "The statement or its result exceeds the limits, or there are too many statements.",
            "Read less at once, or raise the limit under `[worker.limits]`.";
        Timeout: "timeout",
            "The time limit of the delivery was reached during the statement.",
            "Make the statement faster, or raise `time` under `[worker.limits]`.";
        TransactionFailed: "transaction-failed",
            "An earlier statement failed, or the database is unreachable.",
            "Return the first error.";
    }
}

impl SqlError {
    /// The code of the variant.
    pub fn code(&self) -> SqlErrorCode {
        match self {
            SqlError::ConstraintViolation(_) => SqlErrorCode::ConstraintViolation,
            SqlError::Conflict(_) => SqlErrorCode::Conflict,
            SqlError::QueryFailed(_) => SqlErrorCode::QueryFailed,
            SqlError::NotAllowed(_) => SqlErrorCode::NotAllowed,
            SqlError::InvalidParameter(_) => SqlErrorCode::InvalidParameter,
            SqlError::UnsupportedType(_) => SqlErrorCode::UnsupportedType,
            SqlError::TooLarge(_) => SqlErrorCode::TooLarge,
            SqlError::Timeout => SqlErrorCode::Timeout,
            SqlError::TransactionFailed(_) => SqlErrorCode::TransactionFailed,
        }
    }
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
    /// The maximum number of rows.
    pub rows: usize,
    /// The maximum of [`Rows::size`], in bytes.
    pub bytes: usize,
}
