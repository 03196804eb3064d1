//! PostgreSQL: many hosts, one database.
//!
//! It works through a pooler that gives a server connection away after each transaction: every operation is one
//! explicit transaction, nothing is set beyond its end, and no lock outlives it.

mod attempts;
mod deployments;
mod errors;
mod guest_sql;
mod guest_values;
mod inbox;
mod letters;
mod migrate;
mod outbox;
mod session;
mod state;
mod totals;
mod tx;

use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use self::session::{Purpose, Sessions};
use self::tx::PostgresTx;
use super::{
    DeploymentRecord, FailedAttempt, LetterFilter, LetterRecord, LetterSummary, OutboxRow, Output, Published, Result,
    Store, Tx, WorkerMigration, WorkerTotals,
};
use crate::sql::Dialect;
use crate::verdict::{Letter, Settled};

/// How long an operation waits for a connection before it answers that the database is unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A PostgreSQL database, 15 or newer.
pub struct PostgresStore {
    sessions: Sessions,
}

impl PostgresStore {
    /// Connects to a database by its URL, with at most `connections` at a time, and brings its schema up to date.
    /// Behind a pooler that does not know prepared statements the URL ends in `?statement-cache-capacity=0`.
    pub async fn connect(url: &str, connections: u32) -> anyhow::Result<Self> {
        let options = PgConnectOptions::from_str(url)
            .context("read the PostgreSQL URL")?
            .extra_float_digits(None)
            .application_name("oncely")
            .disable_statement_logging();
        let named_statements =
            !options.to_url_lossy().query_pairs().any(|(key, value)| key == "statement-cache-capacity" && value == "0");
        // Connections are not tested when they are taken: `begin` finds out, and takes another.
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .connect_lazy_with(options);
        let sessions = Sessions::new(pool, named_statements);
        migrate::run(&sessions).await.context("bring the PostgreSQL schema up to date")?;
        Ok(PostgresStore { sessions })
    }
}

#[async_trait]
impl Store for PostgresStore {
    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    async fn ping(&self) -> Result<()> {
        self.sessions.begin(Purpose::Read).await?.commit().await
    }

    async fn begin(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>> {
        let session = self.sessions.begin(Purpose::Guest(time)).await?;
        Ok(Box::new(PostgresTx::new(session, worker)))
    }

    async fn count_attempts(&self, worker: &str, failed: &[FailedAttempt]) -> Result<Vec<u32>> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        let counts = attempts::count(&mut session, worker, failed).await?;
        session.commit().await?;
        Ok(counts)
    }

    async fn note_unfinished(&self, worker: &str, event_id: &str) -> Result<u32> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        let before = attempts::note_unfinished(&mut session, worker, event_id).await?;
        session.commit().await?;
        Ok(before)
    }

    async fn take_back_unfinished(&self, worker: &str, event_id: &str) -> Result<()> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        attempts::take_back_unfinished(&mut session, worker, event_id).await?;
        session.commit().await
    }

    async fn bury(&self, letters: &[(Letter, Output)]) -> Result<(Vec<Settled>, Vec<OutboxRow>)> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        let notices = letters::bury(&mut session, letters).await?;
        session.commit().await?;
        Ok((letters.iter().map(|_| Settled::seen_by_store()).collect(), notices))
    }

    async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        let rows = outbox::lease(&mut session, limit, lease).await?;
        session.commit().await?;
        Ok(rows)
    }

    async fn mark_published(&self, published: &[Published]) -> Result<()> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        outbox::mark_published(&mut session, published).await?;
        session.commit().await
    }

    async fn defer_outputs(&self, seqs: &[i64], delay: Duration, error: &str) -> Result<()> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        outbox::defer(&mut session, seqs, delay, error).await?;
        session.commit().await
    }

    async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        deployments::put_component(&mut session, digest, wasm).await?;
        session.commit().await
    }

    async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let wasm = deployments::component(&mut session, digest).await?;
        session.commit().await?;
        Ok(wasm)
    }

    async fn deploy(
        &self,
        worker: &str,
        digest: &str,
        manifest: &str,
        migrations: &[WorkerMigration],
    ) -> Result<DeploymentRecord> {
        let mut session = self.sessions.begin(Purpose::Deploy).await?;
        let deployment = deployments::deploy(&mut session, worker, digest, manifest, migrations).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        let deployment = deployments::activate(&mut session, worker, version).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let deployments = deployments::active(&mut session).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let deployments = deployments::of_worker(&mut session, worker).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn letters(&self, filter: &LetterFilter) -> Result<Vec<LetterSummary>> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let letters = letters::list(&mut session, filter).await?;
        session.commit().await?;
        Ok(letters)
    }

    async fn letter(&self, id: i64) -> Result<Option<LetterRecord>> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let letter = letters::find(&mut session, id).await?;
        session.commit().await?;
        Ok(letter)
    }

    async fn totals(&self) -> Result<Vec<WorkerTotals>> {
        let mut session = self.sessions.begin(Purpose::Read).await?;
        let totals = totals::by_worker(&mut session).await?;
        session.commit().await?;
        Ok(totals)
    }

    async fn prune(&self, outputs: Duration, inbox: Duration, limit: u32) -> Result<u64> {
        let mut session = self.sessions.begin(Purpose::House).await?;
        let left = totals::prune(&mut session, outputs, inbox, limit).await?;
        session.commit().await?;
        Ok(left)
    }

    async fn close(&self) {
        self.sessions.close().await;
    }
}
