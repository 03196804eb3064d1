//! PostgreSQL: many hosts, one database.
//!
//! It works behind a pooler that assigns server connections per transaction. So every operation is
//! one explicit transaction, and no setting or lock outlives it.

mod alarms;
mod attempts;
mod changes;
mod dead_lettering;
mod deployments;
pub(super) mod errors;
mod functions;
mod guest_sql;
mod guest_values;
mod inbox;
mod instance;
pub(super) mod migrate;
mod outbox;
mod partitions;
mod privileges;
mod redrive;
mod repair;
mod requests;
pub(super) mod session;
mod state;
mod tx;
mod wal;

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_trait::async_trait;
use bytes::Bytes;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Row};

use self::functions::Catalog;
use self::guest_sql::Guests;
use self::instance::HostLease;
use self::partitions::PartitionedTable;
use self::privileges::Login;
use self::session::{Purpose, Sessions};
use self::tx::PostgresTx;
use self::wal::{PostgresWal, Replication};
use super::db::Db;
use super::instance::Instance;
use super::{
    AlarmNotices, Attribution, BrokerState, CountedAttempt, DeadLetterAction,
    DeadLetterActionResult, DeadLetterDepth, DeadLetterFilter, DeadLetterGroup, DeadLetterRecord,
    DeadLetterSummary, DeadLettered, DeploymentRecord, FailedAttempt, OutboxLag, OutboxRow, Output,
    OutputFilter, OutputRecord, OutputSummary, OutputWal, Published, PublishedOutput,
    RecoveredOutput, Redrive, RedriveLookup, Result, RetentionPolicy, StateRecord, Store,
    StoredReport, TakenOver, Tx, Unpublished, Watermarks, WorkerMigration, WorkerTotals,
};
use super::{dead_letter_queries, outputs, reports, totals, watermarks};
use crate::fault;
use crate::model::alarm::{self, Alarm};
use crate::model::hint::WithHint;
use crate::model::output_ids::OutputIds;
use crate::model::sql::{Dialect, Functions};
use crate::model::verdict::{DeadLetter, Settled};

/// How long an operation waits for a connection before it fails as unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A PostgreSQL database, 15 or newer.
pub struct PostgresStore {
    platform: Sessions,
    guests: Sessions,
    /// The app's roles; `None` if guests' SQL is trusted.
    login: Option<Login>,
    functions: Catalog,
    /// Whether guests' statements pass the statement filter.
    has_filter: bool,
    wal: Option<PostgresWal>,
    instance: Instance,
    lease: HostLease,
    installation: String,
}

impl PostgresStore {
    /// Connects to a database by its URL, migrates its schema and creates the roles for guests'
    /// SQL.
    ///
    /// Opens at most `connections` connections, but at least one for guests and one for the
    /// platform. Behind a pooler without prepared statements, the URL has to end in
    /// `?statement-cache-capacity=0`.
    ///
    /// # Errors
    /// The database is unreachable, belongs to a newer oncely, or refuses the roles.
    pub async fn connect(url: &str, connections: u32) -> anyhow::Result<Self> {
        let instance = Instance::new();
        let options = options(url, instance)?;

        // A delivery holds its connection while its guests run; platform transactions are short.
        let platform_connections = (connections / 4).max(1);
        let platform = connect_platform(options.clone(), platform_connections, instance).await?;
        let guest_connections = connections.saturating_sub(platform_connections).max(1);

        // The roles of the app, and the guests' connections.
        let mut login = privileges::set_up(&platform, false)
            .await
            .context("restrict guests' SQL by database privileges")?;
        migrate::load_definer_key(&platform, false).await?;
        let mut pool = guest_pool(&options, &login, guest_connections, instance);
        let mut checked = check_login(&pool, &login.role).await;
        if let Err(error) = checked {
            if !errors::is_login_refused(&error) {
                return Err(anyhow::Error::new(error).context("connect as the app's role"));
            }
            // The stored password may be for another copy of this database: set it again.
            login = privileges::set_up(&platform, true)
                .await
                .context("restrict guests' SQL by database privileges")?;
            pool = guest_pool(&options, &login, guest_connections, instance);
            checked = check_login(&pool, &login.role).await;
        }
        let releases_locks = checked
            .with_context(|| format!("connect as the app's role {}", login.role))
            .hint(LOGIN_HINT)?;
        let functions = Catalog::new(platform.clone());
        let installation = migrate::installation(&platform)
            .await
            .context("read the installation's id")?;
        let lease = HostLease::new(
            instance,
            options.application_name(&instance.name("oncely lease")),
        );
        Ok(PostgresStore {
            guests: platform.with_pool(pool, releases_locks),
            platform,
            login: Some(login),
            functions,
            has_filter: true,
            wal: None,
            instance,
            lease,
            installation,
        })
    }

    /// Like [`PostgresStore::connect`], for a database without permission to create roles. Guests'
    /// SQL runs as the URL's user, and only the statement filter protects the platform's tables.
    ///
    /// # Errors
    /// As [`PostgresStore::connect`], roles excepted.
    pub async fn connect_trusted(url: &str, connections: u32) -> anyhow::Result<Self> {
        let instance = Instance::new();
        let options = options(url, instance)?;
        let platform = connect_platform(options.clone(), connections, instance)
            .await?
            .shared_with_guests();
        migrate::load_definer_key(&platform, true).await?;
        let functions = Catalog::new(platform.clone());
        let installation = migrate::installation(&platform)
            .await
            .context("read the installation's id")?;
        let lease = HostLease::new(
            instance,
            options.application_name(&instance.name("oncely lease")),
        );
        let guests = platform.clone();
        Ok(PostgresStore {
            guests,
            platform,
            login: None,
            functions,
            has_filter: true,
            wal: None,
            instance,
            lease,
            installation,
        })
    }

    /// Adds the WAL as a source of outputs, through a direct connection to the server at `url`.
    /// Hosts leave WAL mode if the server retains more than `retained_max` bytes for the slot.
    ///
    /// # Errors
    /// The URL is invalid.
    pub fn with_wal(self, url: &str, retained_max: u64) -> anyhow::Result<Self> {
        let wal = PostgresWal::new(
            self.platform.clone(),
            Replication::new(url, self.instance)?,
            retained_max,
        );
        Ok(PostgresStore {
            wal: Some(wal),
            ..self
        })
    }

    /// The functions that the statement filter permits, for tests of the filter.
    #[doc(hidden)]
    pub async fn functions(&self) -> Result<Arc<Functions>> {
        self.functions.current().await
    }

    /// Disables the statement filter, for tests of the database privileges behind it.
    #[doc(hidden)]
    #[must_use]
    pub fn without_filter(self) -> Self {
        PostgresStore {
            has_filter: false,
            ..self
        }
    }
}

impl PostgresStore {
    /// The environment of guests' statements in one transaction.
    async fn guests(&self) -> Result<Guests> {
        if self.platform.is_key_stale() {
            migrate::load_definer_key(&self.platform, self.login.is_none()).await?;
        }
        let functions = if self.has_filter {
            Some(self.functions.current().await?)
        } else {
            None
        };
        Ok(Guests {
            functions,
            platform: self.platform.clone(),
            sessions: self.guests.clone(),
        })
    }

    /// Runs the next rotation step of a table's partitions, in a transaction of its own.
    async fn rotate(
        &self,
        table: PartitionedTable,
        keep: Duration,
        retention: &RetentionPolicy,
    ) -> Result<bool> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let done = partitions::run_next_step(&mut session, table, keep, retention).await?;
        session.commit().await?;
        Ok(done)
    }
}

/// The hint for a login of the app's role that the server or a pooler refuses.
const LOGIN_HINT: &str = "let this role log in with its password, at the server (pg_hba.conf) and \
    at a pooler in front of it (PgBouncer: auth_query); or set guest_sql = \"trusted\", and only \
    the statement filter keeps guests' SQL from the platform's tables";

fn options(url: &str, instance: Instance) -> anyhow::Result<PgConnectOptions> {
    let options = PgConnectOptions::from_str(url).context("read the PostgreSQL URL")?;
    Ok(options
        .extra_float_digits(None)
        .application_name(&instance.name("oncely"))
        .disable_statement_logging())
}

/// Connections are not tested when they are acquired. `begin` detects a broken one and acquires
/// another.
fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .connect_lazy_with(options)
}

async fn connect_platform(
    options: PgConnectOptions,
    connections: u32,
    instance: Instance,
) -> anyhow::Result<Sessions> {
    let named_statements = !options
        .to_url_lossy()
        .query_pairs()
        .any(|(key, value)| key == "statement-cache-capacity" && value == "0");
    let sessions = Sessions::new(pool(options, connections), named_statements, instance);
    migrate::run(&sessions)
        .await
        .context("migrate the PostgreSQL schema")?;
    let output_ids = migrate::output_ids(&sessions)
        .await
        .context("read the key of the output ids")?;
    Ok(sessions
        .with_output_ids(output_ids)
        .with_client_checks()
        .await)
}

fn guest_pool(
    options: &PgConnectOptions,
    login: &Login,
    connections: u32,
    instance: Instance,
) -> PgPool {
    let name = instance.name("oncely guests");
    pool(
        options
            .clone()
            .username(&login.role)
            .password(&login.password)
            .application_name(&name),
        connections,
    )
}

/// Checks that guests' sessions are logged in as the role: a pooler may log in all clients as one
/// user. Returns whether the role may release the advisory locks of its session. If not, it cannot
/// acquire any either.
async fn check_login(pool: &PgPool, role: &str) -> sqlx::Result<bool> {
    // One simple query: behind a pooler, a prepared statement may execute on another connection.
    let row = sqlx::raw_sql(
        "select session_user::text, has_function_privilege('pg_catalog.pg_advisory_unlock_all()', 'execute')::text",
    )
    .fetch_one(pool)
    .await?;
    let (user, releases_locks): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    if user == role {
        return Ok(releases_locks == "true");
    }
    Err(sqlx::Error::Configuration(
        format!("the connection for {role} is logged in as {user}: {LOGIN_HINT}").into(),
    ))
}

#[async_trait]
impl Store for PostgresStore {
    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    fn wal(&self) -> Option<Arc<dyn OutputWal>> {
        self.wal
            .clone()
            .map(|wal| Arc::new(wal) as Arc<dyn OutputWal>)
    }

    async fn ping(&self) -> Result<()> {
        self.platform.begin(Purpose::Read).await?.commit().await
    }

    async fn retire_worker(&self, worker: &str) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        deployments::retire(&mut session, worker).await?;
        session.commit().await
    }

    async fn write_report(&self, report: &str, began: &OnceLock<Instant>) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let _ = began.set(Instant::now());
        reports::write(
            &mut Db::Postgres(&mut session),
            Some(self.instance.id()),
            report,
        )
        .await?;
        session.commit().await
    }

    async fn reports(&self) -> Result<Vec<StoredReport>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let reports = reports::read(&mut Db::Postgres(&mut session)).await?;
        session.commit().await?;
        Ok(reports)
    }

    async fn renew_lease(&self) -> Result<Vec<TakenOver>> {
        self.lease.renew().await
    }

    async fn begin(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>> {
        let guests = self.guests().await?;
        let session = self.guests.begin(Purpose::Guest(time)).await?;
        Ok(Box::new(PostgresTx::new(session, worker, guests)))
    }

    async fn begin_read_only(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>> {
        let guests = self.guests().await?;
        let session = self.guests.begin(Purpose::GuestReadOnly(time)).await?;
        Ok(Box::new(PostgresTx::new(session, worker, guests)))
    }

    async fn count_attempts(
        &self,
        worker: &str,
        failed: &[FailedAttempt],
    ) -> Result<Vec<CountedAttempt>> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let counts = attempts::count(&mut session, worker, failed).await?;
        session.commit().await?;
        Ok(counts)
    }

    async fn delete_recordings(&self, worker: &str, event_ids: &[String]) -> Result<()> {
        let mut session = self.platform.begin(Purpose::AsyncCommit).await?;
        attempts::delete_recordings(&mut session, worker, event_ids).await?;
        session.commit().await
    }

    async fn attempt_recording(&self, worker: &str, event_id: &str) -> Result<Option<Bytes>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let record = attempts::recording(&mut session, worker, event_id).await?;
        session.commit().await?;
        Ok(record)
    }

    async fn write_crash_marker(&self, worker: &str, event_id: &str) -> Result<u32> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let before = attempts::write_crash_marker(&mut session, worker, event_id).await?;
        session.commit().await?;
        Ok(before)
    }

    async fn clear_crash_marker(&self, worker: &str, event_id: &str) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        attempts::clear_crash_marker(&mut session, worker, event_id).await?;
        session.commit().await
    }

    async fn dead_letter(
        &self,
        dead_letters: &[(DeadLetter, Output)],
        new_failures: u32,
    ) -> Result<DeadLettered> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let (notices, alarms) =
            dead_lettering::dead_letter(&mut session, dead_letters, new_failures).await?;
        session.commit().await?;
        Ok(DeadLettered {
            proofs: vec![Settled::seen_by_store(); dead_letters.len()],
            notices,
            alarms,
        })
    }

    async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let rows = outbox::lease(&mut session, limit, lease).await?;
        session.commit().await?;
        Ok(rows)
    }

    async fn mark_published(&self, published: &[Published]) -> Result<()> {
        // If the record is lost in a crash, the poller leases the output and finds it on its
        // stream.
        let mut session = self.platform.begin(Purpose::AsyncCommit).await?;
        outbox::mark_published(&mut session, published).await?;
        session.commit().await
    }

    async fn release_outputs(&self, rows: &[(i64, Unpublished)]) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        outbox::release(&mut session, rows).await?;
        session.commit().await
    }

    async fn taken_ids(&self) -> Result<BTreeMap<String, u64>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let taken = outputs::taken_ids(&mut Db::Postgres(&mut session)).await?;
        session.commit().await?;
        Ok(taken)
    }

    fn output_ids(&self) -> &OutputIds {
        self.platform.output_ids()
    }

    fn installation(&self) -> &str {
        &self.installation
    }

    async fn watermarks(&self, on_broker: Option<&str>) -> Result<Watermarks> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let watermarks = watermarks::read(&mut Db::Postgres(&mut session), on_broker).await?;
        session.commit().await?;
        Ok(watermarks)
    }

    async fn write_watermark(&self, name: &str, seen: &BrokerState) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        watermarks::write(&mut Db::Postgres(&mut session), name, seen).await?;
        session.commit().await
    }

    async fn acknowledge_watermark(&self, name: &str, sequence: u64) -> Result<()> {
        let mut session = self.platform.begin(Purpose::AsyncCommit).await?;
        watermarks::acknowledge(&mut Db::Postgres(&mut session), name, sequence).await?;
        session.commit().await
    }

    async fn known_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let known =
            watermarks::known_events(&mut Db::Postgres(&mut session), worker, event_ids).await?;
        session.commit().await?;
        Ok(known)
    }

    async fn save_recovered(&self, outputs: &[RecoveredOutput]) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        watermarks::save_recovered(&mut Db::Postgres(&mut session), outputs).await?;
        session.commit().await
    }

    async fn delete_recovered(&self, ids: &[&str]) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        watermarks::delete_recovered(&mut Db::Postgres(&mut session), ids).await?;
        session.commit().await
    }

    async fn find_recovered(&self, ids: &[&str]) -> Result<HashMap<String, (String, u64)>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let found = watermarks::find_recovered(&mut Db::Postgres(&mut session), ids).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn last_published(&self, within: Duration) -> Result<Vec<PublishedOutput>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let found = repair::last_published(&mut session, within).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn published_to(&self, stream: &str) -> Result<Vec<PublishedOutput>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let found = repair::published_to(&mut session, stream).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn republish(&self, lost: &[PublishedOutput]) -> Result<u64> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let done = repair::republish(&mut session, lost).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn outputs(&self, filter: &OutputFilter) -> Result<Vec<OutputSummary>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let found = outputs::list(&mut Db::Postgres(&mut session), filter).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn output(&self, number: i64) -> Result<Option<OutputRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let found = outputs::find(&mut Db::Postgres(&mut session), number).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn retry_outputs(&self, numbers: &[i64]) -> Result<u64> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let done = outputs::retry(&mut Db::Postgres(&mut session), numbers).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn drop_outputs(&self, numbers: &[i64], note: &str) -> Result<u64> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let done = outputs::drop(&mut Db::Postgres(&mut session), numbers, note).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn outbox_lag(&self) -> Result<Vec<OutboxLag>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let found = outputs::lag(&mut Db::Postgres(&mut session)).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        deployments::put_component(&mut session, digest, wasm).await?;
        session.commit().await
    }

    async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
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
        let mut session = self.platform.begin(Purpose::Deploy).await?;
        let deployment = deployments::deploy(
            &mut session,
            self.login.as_ref(),
            worker,
            digest,
            manifest,
            migrations,
        )
        .await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn due_migrations(
        &self,
        worker: &str,
        migrations: &[WorkerMigration],
    ) -> Result<Vec<String>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let due = deployments::due_migrations(&mut session, worker, migrations).await?;
        session.commit().await?;
        Ok(due)
    }

    async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let deployment = deployments::activate(&mut session, worker, version).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn newest_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let deployments = deployments::newest(&mut session).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let deployments = deployments::active(&mut session).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let deployments = deployments::for_worker(&mut session, worker).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn dead_letters(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterSummary>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let dead_letters =
            dead_letter_queries::list(&mut Db::Postgres(&mut session), filter).await?;
        session.commit().await?;
        Ok(dead_letters)
    }

    async fn find_dead_letter(&self, id: i64) -> Result<Option<DeadLetterRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let dead_letter = dead_letter_queries::find(&mut Db::Postgres(&mut session), id).await?;
        session.commit().await?;
        Ok(dead_letter)
    }

    async fn dead_letter_groups(&self, filter: &DeadLetterFilter) -> Result<Vec<DeadLetterGroup>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let groups = dead_letter_queries::groups(&mut Db::Postgres(&mut session), filter).await?;
        session.commit().await?;
        Ok(groups)
    }

    async fn dead_letter_depths(&self) -> Result<Vec<DeadLetterDepth>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let depths = alarms::depths(&mut session).await?;
        session.commit().await?;
        Ok(depths)
    }

    async fn alarms(&self) -> Result<Vec<Alarm>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let alarms = alarms::list(&mut session).await?;
        session.commit().await?;
        Ok(alarms)
    }

    async fn apply_alarm_updates(&self, updates: &[alarm::AlarmUpdate]) -> Result<AlarmNotices> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let notices = alarms::apply(&mut session, updates).await?;
        session.commit().await?;
        Ok(notices)
    }

    async fn redrive(
        &self,
        dead_letters: &[Redrive],
        attribution: &Attribution,
    ) -> Result<(Vec<DeadLetterActionResult>, Vec<OutboxRow>)> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let results = redrive::redrive(&mut session, dead_letters, attribution).await?;
        fault::point(fault::BEFORE_REDRIVE);
        session.commit().await?;
        fault::point(fault::AFTER_REDRIVE);
        Ok(results)
    }

    async fn redriven_message(
        &self,
        worker: &str,
        id: i64,
        generation: u32,
    ) -> Result<RedriveLookup> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let message = redrive::redriven_message(&mut session, worker, id, generation).await?;
        session.commit().await?;
        Ok(message)
    }

    async fn done_events(&self, worker: &str, event_ids: &[String]) -> Result<Vec<String>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let done = inbox::done(&mut session, worker, event_ids).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn update_dead_letters(
        &self,
        ids: &[i64],
        action: &DeadLetterAction,
        attribution: &Attribution,
    ) -> Result<Vec<DeadLetterActionResult>> {
        let mut session = self.platform.begin(Purpose::Platform).await?;
        let results = redrive::update_dead_letters(&mut session, ids, action, attribution).await?;
        session.commit().await?;
        Ok(results)
    }

    async fn state_entry(&self, worker: &str, key: &str) -> Result<Option<StateRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let entry = state::entry(&mut session, worker, key).await?;
        session.commit().await?;
        Ok(entry)
    }

    async fn state_entries(
        &self,
        worker: &str,
        prefix: &str,
        limit: u32,
    ) -> Result<Vec<StateRecord>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let entries = state::entries(&mut session, worker, prefix, limit).await?;
        session.commit().await?;
        Ok(entries)
    }

    async fn totals(&self) -> Result<Vec<WorkerTotals>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let totals = totals::by_worker(&mut Db::Postgres(&mut session)).await?;
        session.commit().await?;
        Ok(totals)
    }

    async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool> {
        let mut done = self
            .rotate(PartitionedTable::Outbox, retention.outputs, retention)
            .await?;
        done |= self
            .rotate(PartitionedTable::Request, retention.requests, retention)
            .await?;
        let mut session = self.platform.begin(Purpose::Platform).await?;
        redrive::record_completed_redrives(&mut session).await?;
        done |= partitions::delete_wal_records(&mut session, retention.outputs, retention.limit)
            .await?;
        done |= partitions::delete_deleted_state(&mut session, retention.limit).await?;
        if let Some(keep) = retention.inbox {
            done |= partitions::delete_attempts(&mut session, keep, retention.limit).await?;
        }
        session.commit().await?;
        if let Some(keep) = retention.inbox {
            done |= self
                .rotate(PartitionedTable::Inbox, keep, retention)
                .await?;
        }
        Ok(done)
    }

    async fn close(&self) {
        self.lease.release().await;
        self.guests.close().await;
        self.platform.close().await;
    }
}
