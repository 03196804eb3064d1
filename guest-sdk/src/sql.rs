//! The worker's own tables, in the same transaction.
//!
//! One statement per call, with placeholders `$1`, `$2`, ... on both PostgreSQL and SQLite. After
//! an error from the database the delivery is rolled back, even if the handler returns `Ok`. For an
//! expected conflict, use a statement that does not fail and check the number of rows:
//!
//! ```no_run
//! # use oncely_guest::prelude::*;
//! # fn example(account: &str, cents: i64) -> Result<(), Failure> {
//! let paid = sql::execute(
//!     "update account set balance = balance - $2 where name = $1 and balance >= $2",
//!     params![account, cents],
//! )?;
//! if paid == 0 {
//!     log::info!("{account} cannot pay {cents}");
//! }
//! # Ok(())
//! # }
//! ```

mod error;
mod row;
mod value;

pub use error::{Error, ErrorKind};
pub use row::{Column, ColumnError, Row};
pub use value::{FromValue, ToValue};

use crate::bindings::oncely::worker::sql as wit;
pub use crate::bindings::oncely::worker::sql::{DatabaseError, Dialect, Value};

/// Runs a statement and returns its rows.
///
/// ```no_run
/// # use oncely_guest::prelude::*;
/// # fn example() -> Result<(), Failure> {
/// for row in sql::query("select name, balance from account where balance < $1", params![0])? {
///     let name: String = row.get("name")?;
///     let balance: i64 = row.get("balance")?;
///     log::warn!("{name} is at {balance}");
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// See [`ErrorKind`].
pub fn query(statement: &str, params: &[Value]) -> Result<Vec<Row>, Error> {
    wit::query(statement, params)
        .map(Row::from_row_set)
        .map_err(Error::new)
}

/// Runs a statement and returns its only row, or none.
///
/// # Errors
/// See [`ErrorKind`]; also when there is more than one row.
pub fn query_optional(statement: &str, params: &[Value]) -> Result<Option<Row>, Error> {
    let mut rows = query(statement, params)?;
    match rows.len() {
        0 | 1 => Ok(rows.pop()),
        several => Err(Error::other(format!(
            "the statement returned {several} rows; at most one was expected"
        ))),
    }
}

/// Runs a statement and returns its only row.
///
/// # Errors
/// See [`ErrorKind`]; also when there is no row, or more than one.
pub fn query_one(statement: &str, params: &[Value]) -> Result<Row, Error> {
    query_optional(statement, params)?
        .ok_or_else(|| Error::other("the statement returned no row; one was expected".to_owned()))
}

/// Runs a statement and returns the number of changed rows.
///
/// # Errors
/// See [`ErrorKind`].
pub fn execute(statement: &str, params: &[Value]) -> Result<u64, Error> {
    wit::execute(statement, params).map_err(Error::new)
}

/// Runs a statement later, without a result: before the next [`query`] or [`execute`], and in any
/// case before the commit. The deferred statements of many messages reach the database together, so
/// this is the fastest way to write.
///
/// ```no_run
/// # use oncely_guest::prelude::*;
/// # fn example(order: &str) -> Result<(), Failure> {
/// sql::defer("insert into seen (id) values ($1) on conflict do nothing", params![order])?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// The host refused the statement. An error from the database comes later: the delivery is rolled
/// back, and the next statement of this message returns the error.
pub fn defer(statement: &str, params: &[Value]) -> Result<(), Error> {
    wit::defer(statement, params).map_err(Error::new)
}

/// The database of the worker.
pub fn dialect() -> Dialect {
    wit::get_dialect()
}

/// The parameters of a statement: `params![order.id, order.cents, None::<String>]`.
///
/// Accepts every type that implements [`ToValue`](crate::sql::ToValue), and borrows its arguments.
///
/// ```
/// use oncely_guest::prelude::*;
/// use oncely_guest::sql::Value;
///
/// let id = String::from("o-1");
/// assert_eq!(params![id, 7], &[Value::Text(id), Value::Int64(7)]);
/// ```
#[macro_export]
macro_rules! params {
    () => {{
        const NONE: &[$crate::sql::Value] = &[];
        NONE
    }};
    ($($value:expr),+ $(,)?) => {
        &[$($crate::sql::ToValue::to_value(&$value)),+]
    };
}
