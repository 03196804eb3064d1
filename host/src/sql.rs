//! Guest SQL as plain values: parameters, rows, errors, and the gate every statement passes.

mod gate;

pub use gate::{changes_rows, check_platform_names, check_statement, highest_placeholder};

/// Which database stands behind a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Postgres,
    Sqlite,
}

/// A parameter or a column's value; see `interface sql` in `wit/worker.wit` for what each becomes where.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Null,
    Boolean(bool),
    Int64(i64),
    Float64(f64),
    Decimal(String),
    Text(String),
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
            Value::Null | Value::Boolean(_) | Value::Int64(_) | Value::Float64(_) | Value::Timestamp(_) => 8,
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

/// Rows and the names of their columns; the names are only known when there is a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

/// What a database said of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseError {
    /// SQLSTATE, or SQLite's extended result code in decimal.
    pub code: String,
    pub message: String,
    pub constraint: Option<String>,
}

/// Why a guest's statement failed.
#[derive(Debug, Clone, PartialEq, Eq)]
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
            SqlError::ConstraintViolation(error) | SqlError::Conflict(error) | SqlError::QueryFailed(error) => {
                write!(f, "{} ({})", error.message, error.code)
            }
            SqlError::NotAllowed(why)
            | SqlError::InvalidParameter(why)
            | SqlError::UnsupportedType(why)
            | SqlError::TooLarge(why)
            | SqlError::TransactionFailed(why) => f.write_str(why),
            SqlError::Timeout => f.write_str("the time of this delivery ran out during a statement"),
        }
    }
}

/// What one statement may bring back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqlLimits {
    pub rows: usize,
    pub bytes: usize,
}
