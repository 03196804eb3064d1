//! Pauses of workers.

use anyhow::Context as _;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::db::{Param, Row, Sql};
use super::rows::Columns as _;
use super::{Attribution, Result, Store, StoreError, shared};
use crate::model::schema::Time;

/// The pause of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pause {
    /// When it was paused. Distinguishes this pause from earlier ones of the worker.
    #[schemars(with = "Time")]
    pub at: Timestamp,
    /// The name of the token.
    pub actor: String,
    /// The reason, as the operator wrote it.
    pub note: Option<String>,
}

impl std::fmt::Display for Pause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "paused by {}", self.actor)?;
        match &self.note {
            Some(note) => write!(f, ": {note}"),
            None => Ok(()),
        }
    }
}

impl Store {
    /// Pauses a worker. A worker that is paused already keeps its pause. `None` if the worker is
    /// not deployed.
    pub async fn pause_worker(&self, worker: &str, by: &Attribution) -> Result<Option<Pause>> {
        let insert = Sql {
            postgres: "insert into oncely.worker_pause (worker, actor, note)
             select name, $2, $3 from oncely.worker where name = $1 on conflict do nothing",
            sqlite: "insert into oncely_worker_pause (worker, actor, note)
             select name, $2, $3 from oncely_worker where name = $1 on conflict do nothing",
            doing: "pause a worker",
        };
        let note = by.note.as_deref().map(shared::printable);
        let params = [
            Param::Text(worker),
            Param::Text(&by.actor),
            Param::OptionalText(note.as_deref()),
        ];
        let mut db = self.write().await?;
        db.execute(insert, &params).await?;
        let rows = db.fetch_all(LIST, &[]).await?;
        db.commit().await?;
        let pauses = read(&rows)?;
        Ok(pauses
            .into_iter()
            .find_map(|(name, pause)| (name == worker).then_some(pause)))
    }

    /// Ends the pause of a worker. Returns whether it was paused.
    pub async fn resume_worker(&self, worker: &str) -> Result<bool> {
        let sql = Sql {
            postgres: "delete from oncely.worker_pause where worker = $1",
            sqlite: "delete from oncely_worker_pause where worker = $1",
            doing: "resume a worker",
        };
        let mut db = self.write().await?;
        let resumed = db.execute(sql, &[Param::Text(worker)]).await?;
        db.commit().await?;
        Ok(resumed > 0)
    }

    /// The paused workers, by name.
    pub async fn pauses(&self) -> Result<Vec<(String, Pause)>> {
        let mut db = self.read().await?;
        let rows = db.fetch_all(LIST, &[]).await?;
        db.commit().await?;
        read(&rows)
    }
}

const LIST: Sql = Sql {
    postgres:
        "select worker, (extract(epoch from paused_at) * 1000000)::bigint as paused_at, actor, note
         from oncely.worker_pause order by worker",
    sqlite: "select worker, paused_at, actor, note from oncely_worker_pause order by worker",
    doing: "read the paused workers",
};

fn read(rows: &[Row]) -> Result<Vec<(String, Pause)>> {
    let pause = |row: &Row| -> sqlx::Result<(String, Pause)> {
        let pause = Pause {
            at: row.time("paused_at")?,
            actor: row.text("actor")?,
            note: row.get("note")?,
        };
        Ok((row.text("worker")?, pause))
    };
    let pauses: sqlx::Result<Vec<_>> = rows.iter().map(pause).collect();
    pauses
        .context("read the pause of a worker")
        .map_err(StoreError::Unavailable)
}
