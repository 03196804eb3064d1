//! Keyed state of workers.

use anyhow::anyhow;

use super::errors;
use super::session::Session;
use crate::store::db::read_rows;
use crate::store::error::Doing as _;
use crate::store::rows::Columns as _;
use crate::store::{Result, StateSlot, StateWrite, StoreError, rows, shared};

/// The current slots of keys.
pub(in crate::store) async fn load(
    session: &mut Session,
    worker: &str,
    keys: &[String],
) -> Result<Vec<(String, StateSlot)>> {
    let context = |error| errors::from_statement(error, "load state");
    let rows = sqlx::query(
        "select given.value as key, held.value,
             coalesce(held.version, (select version from oncely_state_version_floor where worker = $1), 0) as version,
             held.version is not null as has_row
         from json_each($2) as given left join oncely_state as held on held.worker = $1 and held.key = given.value",
    )
    .bind(worker)
    .bind(serde_json::json!(keys).to_string())
    .fetch_all(session.connection().map_err(context)?)
    .await
    .map_err(context)?;
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
    let context = |error| errors::from_statement(error, "list state");
    let rows = sqlx::query(
        "select key from oncely_state
         where worker = $1 and key >= $2 and key > $3 and substr(key, 1, length($2)) = $2
             and value is not null
         order by key limit $4",
    )
    .bind(worker)
    .bind(prefix)
    .bind(after)
    .bind(i64::from(most))
    .fetch_all(session.connection().map_err(context)?)
    .await
    .map_err(context)?;
    read_rows(&rows, "list state", |row| row.text("key"))
}

/// Writes keys that still have the version that was read.
pub(in crate::store) async fn save(
    session: &mut Session,
    worker: &str,
    writes: &[StateWrite],
) -> Result<()> {
    for write in writes {
        if !save_one(session, worker, write).await? {
            return Err(StoreError::Conflict(anyhow!(
                "a state key changed since it was read"
            )));
        }
    }
    Ok(())
}

/// Writes one key. Returns false if it has changed.
async fn save_one(session: &mut Session, worker: &str, write: &StateWrite) -> Result<bool> {
    let expected = write.expected.map(shared::signed).transpose()?;
    let query = match expected {
        None => sqlx::query(
            "insert into oncely_state (worker, key, value, version) values ($1, $2, $4, $5) on conflict do nothing",
        ),
        Some(_) => sqlx::query(
            "update oncely_state
             set value = $4, version = $5, updated_at = cast(unixepoch('subsec') * 1000000 as integer)
             where worker = $1 and key = $2 and version = $3",
        ),
    };
    let result = query
        .bind(worker)
        .bind(&write.key)
        .bind(expected)
        .bind(write.value.as_deref())
        .bind(shared::signed(write.version)?)
        .execute(session.connection().doing("save state")?)
        .await
        .doing("save state")?;
    Ok(result.rows_affected() == 1)
}
