//! Keyed state of workers.

use anyhow::{Context, anyhow};
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::errors::Doing;
use super::session::Session;
use crate::store::{
    Result, STATE_PREVIEW, StateRecord, StateSlot, StateWrite, StoreError, rows, shared,
};

/// The current state of the keys.
pub(super) async fn load(
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
    let read = |row: &PgRow| {
        Ok((
            row.try_get(0)?,
            shared::state_slot(row.try_get(1)?, row.try_get(2)?, row.try_get(3)?),
        ))
    };
    let slots: sqlx::Result<Vec<_>> = rows.iter().map(read).collect();
    slots.context("read state").map_err(StoreError::Unavailable)
}

/// Writes all keys with one statement.
///
/// # Errors
/// `Conflict` if a key no longer has its expected version.
pub(super) async fn save(session: &mut Session, worker: &str, writes: &[StateWrite]) -> Result<()> {
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

/// The complete value under a key.
pub(super) async fn entry(
    session: &mut Session,
    worker: &str,
    key: &str,
) -> Result<Option<StateRecord>> {
    let query = session.query(
        "select key, version, octet_length(value)::bigint as size, value,
             (extract(epoch from updated_at) * 1000000)::bigint as updated_at
         from oncely.state where worker = $1 and key = $2 and value is not null",
    );
    let row = query
        .bind(worker)
        .bind(key)
        .fetch_optional(session.connection())
        .await
        .doing("read state")?;
    row.as_ref().map(rows::state).transpose()
}

/// Values of keys that begin with `prefix`, sorted by key and truncated to [`STATE_PREVIEW`] bytes.
pub(super) async fn entries(
    session: &mut Session,
    worker: &str,
    prefix: &str,
    limit: u32,
) -> Result<Vec<StateRecord>> {
    let query = session.query(
        "select key, version, octet_length(value)::bigint as size, substring(value from 1 for $4) as value,
             (extract(epoch from updated_at) * 1000000)::bigint as updated_at
         from oncely.state where worker = $1 and pg_catalog.starts_with(key, $2) and value is not null
         order by key collate pg_catalog.\"C\" limit $3",
    );
    let rows = query
        .bind(worker)
        .bind(prefix)
        .bind(i64::from(limit))
        .bind(STATE_PREVIEW.cast_signed())
        .fetch_all(session.connection())
        .await
        .doing("list state")?;
    Ok(rows::list(&rows, rows::state))
}
