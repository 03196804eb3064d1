//! Guest SQL as plain values: parameters, rows, errors, and the gate every statement passes.

/// Which database stands behind a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
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

/// Rows and the names of their columns.
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

/// The statements a guest may begin with. The extended protocol and `sqlite3_prepare` take one statement
/// at a time, so the first keyword decides what a statement is.
const ALLOWED: [&str; 7] = ["select", "insert", "update", "delete", "merge", "values", "with"];

/// Lets through one data statement and nothing else: no transaction control, DDL, settings or commands.
pub fn check_statement(statement: &str) -> Result<(), SqlError> {
    let keyword = first_keyword(statement);
    if !ALLOWED.contains(&keyword.as_str()) {
        let what = if keyword.is_empty() { "an empty statement".to_owned() } else { format!("`{keyword}`") };
        return Err(SqlError::NotAllowed(format!(
            "{what} is not allowed; a worker may run: {}",
            ALLOWED.join(", ")
        )));
    }
    // SQLite ends the whole transaction on `insert or rollback`, and nothing but the text shows it.
    if has_or_rollback(statement) {
        return Err(SqlError::NotAllowed("`or rollback` would end the delivery's transaction".to_owned()));
    }
    if statement.contains('\0') {
        return Err(SqlError::NotAllowed("a statement cannot contain a NUL character".to_owned()));
    }
    Ok(())
}

/// The first word in lower case, behind white space, comments and opening parentheses.
fn first_keyword(statement: &str) -> String {
    let rest = skip_blank(statement, true);
    rest.chars().take_while(|c| c.is_ascii_alphabetic() || *c == '_').collect::<String>().to_ascii_lowercase()
}

/// Skips white space and comments (block comments nest, as on PostgreSQL), and `(` where asked to.
fn skip_blank(mut rest: &str, parentheses: bool) -> &str {
    loop {
        rest = rest.trim_start();
        if parentheses && let Some(inner) = rest.strip_prefix('(') {
            rest = inner;
        } else if let Some(comment) = rest.strip_prefix("--") {
            rest = comment.split_once(['\n', '\r']).map_or("", |(_, after)| after);
        } else if rest.starts_with("/*") {
            rest = skip_block_comment(rest);
        } else {
            return rest;
        }
    }
}

fn skip_block_comment(text: &str) -> &str {
    let mut depth = 0_usize;
    let mut rest = text;
    loop {
        if let Some(after) = rest.strip_prefix("/*") {
            depth += 1;
            rest = after;
        } else if let Some(after) = rest.strip_prefix("*/") {
            depth -= 1;
            rest = after;
            if depth == 0 {
                return rest;
            }
        } else {
            let mut chars = rest.chars();
            if chars.next().is_none() {
                return "";
            }
            rest = chars.as_str();
        }
    }
}

/// Whether the words `or` and `rollback` follow each other anywhere outside comments. Text in quotes counts
/// too: a value belongs in a parameter, and refusing it there is harmless.
fn has_or_rollback(statement: &str) -> bool {
    let lower = statement.to_ascii_lowercase();
    let mut rest = lower.as_str();
    while let Some(at) = rest.find("or") {
        let before_is_word = rest
            .get(..at)
            .and_then(|before| before.chars().next_back())
            .is_some_and(|c| c.is_alphanumeric() || c == '_');
        let after = rest.get(at + 2..).unwrap_or_default();
        if !before_is_word && skip_blank(after, false).starts_with("rollback") {
            return true;
        }
        rest = after;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_statements_pass_however_they_are_dressed() {
        for statement in [
            "select 1",
            "  /* a /* nested */ comment */ -- and a line\n Select 1",
            "(select 1) union (select 2)",
            "with x as (select 1) insert into t select * from x",
            "insert into t values ($1) on conflict do nothing",
            "values (1)",
        ] {
            assert_eq!(check_statement(statement), Ok(()), "{statement}");
        }
    }

    #[test]
    fn everything_that_could_leave_the_transaction_is_refused() {
        for statement in [
            "",
            ";commit",
            "commit",
            "/**/ COMMIT and chain",
            "rollback",
            "end",
            "begin",
            "savepoint a",
            "release a",
            "set role none",
            "reset all",
            "prepare transaction 'x'",
            "do $$ begin commit; end $$",
            "copy t to program 'sh'",
            "create table t (a int)",
            "pragma journal_mode",
            "attach 'x' as y",
            "insert or rollback into t values (1)",
            "insert or /* hidden */ Rollback into t values (1)",
            "update OR\nROLLBACK t set a = 1",
            "explain select 1",
            "call p()",
        ] {
            assert!(matches!(check_statement(statement), Err(SqlError::NotAllowed(_))), "{statement}");
        }
    }
}
