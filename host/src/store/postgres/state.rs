//! Keyed state of workers.

use anyhow::anyhow;
use sqlx::Row;

use super::session::Session;
use crate::store::db::read_rows;
use crate::store::error::Doing as _;
use crate::store::rows::Columns as _;
use crate::store::{Result, StateSlot, StateWrite, StoreError, rows, shared};

/// The current state of the keys.
pub(in crate::store) async fn load(
    session: &mut Session,
    worker: &str,
    keys: &[String],
) -> Result<Vec<(String, StateSlot)>> {
    let query = session.query("select * from oncely_definer.load_state($1, $2, $3)");
    let rows = query
        .bind(session.token())
        .bind(worker)
        .bind(keys)
        .fetch_all(session.connection())
        .await
        .doing("load state")?;
    read_rows(&rows, "read state", rows::state_slot)
}

/// The first `most` existing keys that begin with `prefix` and follow `after`, in byte order.
pub(in crate::store) async fn list(
    session: &mut Session,
    worker: &str,
    prefix: &str,
    after: &str,
    most: u32,
) -> Result<Vec<String>> {
    let query = session.query("select key from oncely_definer.list_state($1, $2, $3, $4, $5)");
    let rows = query
        .bind(session.token())
        .bind(worker)
        .bind(prefix)
        .bind(after)
        .bind(i64::from(most))
        .fetch_all(session.connection())
        .await
        .doing("list state")?;
    read_rows(&rows, "list state", |row| row.text("key"))
}

/// Writes all keys with one statement.
///
/// # Errors
/// `Conflict` if a key no longer has its expected version.
pub(in crate::store) async fn save(
    session: &mut Session,
    worker: &str,
    writes: &[StateWrite],
) -> Result<()> {
    let mut expected = Vec::with_capacity(writes.len());
    let mut versions = Vec::with_capacity(writes.len());
    for write in writes {
        expected.push(write.expected.map(shared::signed).transpose()?);
        versions.push(shared::signed(write.version)?);
    }
    let values: Vec<Option<&[u8]>> = writes.iter().map(|write| write.value.as_deref()).collect();
    let query = session.query("select oncely_definer.save_state($1, $2, $3, $4, $5, $6)");
    let row = query
        .bind(session.token())
        .bind(worker)
        .bind(
            writes
                .iter()
                .map(|write| write.key.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(expected)
        .bind(values)
        .bind(versions)
        .fetch_one(session.connection())
        .await
        .doing("save state")?;
    let written: i64 = row.try_get(0).doing("read the count of saved keys")?;
    if usize::try_from(written).is_ok_and(|written| written == writes.len()) {
        return Ok(());
    }
    Err(StoreError::Conflict(anyhow!(
        "a state key changed since it was read"
    )))
}
