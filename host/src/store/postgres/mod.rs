//! PostgreSQL: many hosts, one database.
//!
//! It works through a pooler that gives a server connection away after each transaction: every operation is one
//! explicit transaction, nothing is set beyond its end, and no lock outlives it.

mod alarms;
mod attempts;
mod burial;
mod changes;
mod deployments;
mod errors;
mod functions;
mod guest_sql;
mod guest_values;
mod inbox;
mod instance;
mod letters;
mod log;
mod marks;
pub(super) mod migrate;
mod outbox;
mod outputs;
mod parts;
mod redrive;
mod repair;
mod reports;
mod requests;
mod session;
mod state;
mod totals;
mod tx;
mod wall;

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
use self::log::{PostgresLog, Replication};
use self::parts::Of;
use self::session::{Purpose, Sessions};
use self::tx::PostgresTx;
use self::wall::Login;
use super::instance::Instance;
use super::{
    Buried, By, CountedAttempt, DeploymentRecord, FailedAttempt, LetterDepth, LetterFilter, LetterGroup, LetterRecord,
    LetterSummary, Marks, Move, Moved, OnStream, OutboxLag, OutboxRow, Output, OutputFilter, OutputLog, OutputRecord,
    OutputSummary, Published, PutBack, RecoveredOutput, Redrive, Result, Retire, Seen, StateRecord, Store,
    StoredReport, TakenOver, Told, Tx, Unpublished, WorkerMigration, WorkerTotals,
};
use crate::fault;
use crate::model::alarm::{self, Alarm};
use crate::model::hint::WithHint;
use crate::model::output_ids::OutputIds;
use crate::model::sql::{Dialect, Functions};
use crate::model::verdict::{Letter, Settled};

/// How long an operation waits for a connection before it answers that the database is unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A PostgreSQL database, 15 or newer.
pub struct PostgresStore {
    house: Sessions,
    guests: Sessions,
    /// The app's roles; none when guests' SQL is trusted.
    login: Option<Login>,
    functions: Catalog,
    /// Whether guests' statements are filtered.
    has_filter: bool,
    log: Option<PostgresLog>,
    instance: Instance,
    lease: HostLease,
    installation: String,
}

impl PostgresStore {
    /// Connects to a database by its URL, with at most `connections` at a time but one for guests and one for the house at
    /// least, brings its schema up to date, and gives guests' SQL a role of its own.
    /// Behind a pooler that does not know prepared statements the URL ends in `?statement-cache-capacity=0`.
    pub async fn connect(url: &str, connections: u32) -> anyhow::Result<Self> {
        let instance = Instance::new();
        let options = options(url, instance)?;
        // Deliveries hold a connection for as long as their guests run; the house's own transactions are short.
        let for_house = (connections / 4).max(1);
        let house = open_house(options.clone(), for_house, instance).await?;
        let for_guests = connections.saturating_sub(for_house).max(1);
        let mut login = wall::build(&house, false).await.context("build the wall around guests' SQL")?;
        migrate::take_door_key(&house, false).await?;
        let mut pool = guest_pool(&options, &login, for_guests, instance);
        let mut checked = check_login(&pool, &login.role).await;
        if let Err(error) = checked {
            if !errors::is_login_refused(&error) {
                return Err(anyhow::Error::new(error).context("connect as the app's role"));
            }
            // The role may have been made for another copy of this database.
            login = wall::build(&house, true).await.context("build the wall around guests' SQL")?;
            pool = guest_pool(&options, &login, for_guests, instance);
            checked = check_login(&pool, &login.role).await;
        }
        let unlocks = checked.with_context(|| format!("connect as the app's role {}", login.role)).hint(LOGIN_HINT)?;
        let functions = Catalog::new(house.clone());
        let installation = migrate::installation(&house).await.context("read the installation's id")?;
        let lease = HostLease::new(instance, options.application_name(&instance.name("oncely lease")));
        Ok(PostgresStore {
            guests: house.on(pool, unlocks),
            house,
            login: Some(login),
            functions,
            has_filter: true,
            log: None,
            instance,
            lease,
            installation,
        })
    }

    /// Like [`PostgresStore::connect`] for a database that lets nobody make roles: guests' SQL runs as the URL's user, and
    /// only the statement filter keeps it from the platform's tables.
    pub async fn connect_trusted(url: &str, connections: u32) -> anyhow::Result<Self> {
        let instance = Instance::new();
        let options = options(url, instance)?;
        let house = open_house(options.clone(), connections, instance).await?.shared_with_guests();
        migrate::take_door_key(&house, true).await?;
        let functions = Catalog::new(house.clone());
        let installation = migrate::installation(&house).await.context("read the installation's id")?;
        let lease = HostLease::new(instance, options.application_name(&instance.name("oncely lease")));
        let guests = house.clone();
        Ok(PostgresStore {
            guests,
            house,
            login: None,
            functions,
            has_filter: true,
            log: None,
            instance,
            lease,
            installation,
        })
    }

    /// Can read the log of its database, through a connection to the server itself by a URL of its own. The slot is given up
    /// when the server keeps more than `retained_max` bytes for it.
    pub fn with_log(self, url: &str, retained_max: u64) -> anyhow::Result<Self> {
        let log = PostgresLog::new(self.house.clone(), Replication::of(url, self.instance)?, retained_max);
        Ok(PostgresStore { log: Some(log), ..self })
    }

    /// The functions that the filter lets guests call, so that a test can use the filter as this store does.
    #[doc(hidden)]
    pub async fn functions(&self) -> Result<Arc<Functions>> {
        self.functions.current().await
    }

    /// Lets guests' statements past the filter unread, so that a test can show what the privileges behind it hold.
    #[doc(hidden)]
    #[must_use]
    pub fn without_filter(self) -> Self {
        PostgresStore { has_filter: false, ..self }
    }
}

impl PostgresStore {
    /// Under which terms the statements of the guests of one transaction run.
    async fn guests(&self) -> Result<Guests> {
        if self.house.has_stale_key() {
            migrate::take_door_key(&self.house, self.login.is_none()).await?;
        }
        let functions = if self.has_filter { Some(self.functions.current().await?) } else { None };
        Ok(Guests { functions, house: self.house.clone(), sessions: self.guests.clone() })
    }

    /// Does what is due next with the parts of a table, in a transaction of its own.
    async fn turn(&self, of: Of, keep: Duration, what: &Retire) -> Result<bool> {
        let mut session = self.house.begin(Purpose::House).await?;
        let done = parts::step(&mut session, of, keep, what).await?;
        session.commit().await?;
        Ok(done)
    }
}

/// What to do when the server, or a pooler before it, does not let the app's role in.
const LOGIN_HINT: &str = "the server (pg_hba.conf) and a pooler before it (PgBouncer: auth_query) have to let this role in \
    with its password; or set guest_sql = \"trusted\", and only the check of its text keeps guests' SQL from the platform's \
    tables";

fn options(url: &str, instance: Instance) -> anyhow::Result<PgConnectOptions> {
    let options = PgConnectOptions::from_str(url).context("read the PostgreSQL URL")?;
    Ok(options.extra_float_digits(None).application_name(&instance.name("oncely")).disable_statement_logging())
}

/// Connections are not tested when they are taken: `begin` finds out, and takes another.
fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .connect_lazy_with(options)
}

async fn open_house(options: PgConnectOptions, connections: u32, instance: Instance) -> anyhow::Result<Sessions> {
    let named_statements =
        !options.to_url_lossy().query_pairs().any(|(key, value)| key == "statement-cache-capacity" && value == "0");
    let sessions = Sessions::new(pool(options, connections), named_statements, instance);
    migrate::run(&sessions).await.context("bring the PostgreSQL schema up to date")?;
    let output_ids = migrate::output_ids(&sessions).await.context("read the key of the outputs' ids")?;
    Ok(sessions.with_output_ids(output_ids).with_checks_of_clients().await)
}

fn guest_pool(options: &PgConnectOptions, login: &Login, connections: u32, instance: Instance) -> PgPool {
    let name = instance.name("oncely guests");
    pool(options.clone().username(&login.role).password(&login.password).application_name(&name), connections)
}

/// Whether a session of guests is really the role's: a pooler may log everybody in as one and the same user. Returns whether
/// the role may release the advisory locks of its session; if not, it may not take any.
async fn check_login(pool: &PgPool, role: &str) -> sqlx::Result<bool> {
    // One message: behind a pooler a statement may be prepared on one connection and run on another.
    let row = sqlx::raw_sql(
        "select session_user::text, has_function_privilege('pg_catalog.pg_advisory_unlock_all()', 'execute')::text",
    )
    .fetch_one(pool)
    .await?;
    let (user, unlocks): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    if user == role {
        return Ok(unlocks == "true");
    }
    Err(sqlx::Error::Configuration(format!("the connection for {role} is one of {user}: {LOGIN_HINT}").into()))
}

#[async_trait]
impl Store for PostgresStore {
    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    fn log(&self) -> Option<Arc<dyn OutputLog>> {
        self.log.clone().map(|log| Arc::new(log) as Arc<dyn OutputLog>)
    }

    async fn ping(&self) -> Result<()> {
        self.house.begin(Purpose::Read).await?.commit().await
    }

    async fn retire_worker(&self, worker: &str) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        deployments::retire(&mut session, worker).await?;
        session.commit().await
    }

    async fn write_report(&self, report: &str, began: &OnceLock<Instant>) -> Result<()> {
        let Some(id) = self.instance.id() else { return Ok(()) };
        let mut session = self.house.begin(Purpose::House).await?;
        let _ = began.set(Instant::now());
        reports::write(&mut session, id, report).await?;
        session.commit().await
    }

    async fn reports(&self) -> Result<Vec<StoredReport>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let reports = reports::read(&mut session).await?;
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

    async fn begin_reading(&self, worker: &str, time: Duration) -> Result<Box<dyn Tx>> {
        let guests = self.guests().await?;
        let session = self.guests.begin(Purpose::Reader(time)).await?;
        Ok(Box::new(PostgresTx::new(session, worker, guests)))
    }

    async fn count_attempts(&self, worker: &str, failed: &[FailedAttempt]) -> Result<Vec<CountedAttempt>> {
        let mut session = self.house.begin(Purpose::House).await?;
        let counts = attempts::count(&mut session, worker, failed).await?;
        session.commit().await?;
        Ok(counts)
    }

    async fn forget_records(&self, worker: &str, event_ids: &[String]) -> Result<()> {
        let mut session = self.house.begin(Purpose::Note).await?;
        attempts::forget_records(&mut session, worker, event_ids).await?;
        session.commit().await
    }

    async fn attempt_record(&self, worker: &str, event_id: &str) -> Result<Option<Bytes>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let record = attempts::record(&mut session, worker, event_id).await?;
        session.commit().await?;
        Ok(record)
    }

    async fn note_unfinished(&self, worker: &str, event_id: &str) -> Result<u32> {
        let mut session = self.house.begin(Purpose::House).await?;
        let before = attempts::note_unfinished(&mut session, worker, event_id).await?;
        session.commit().await?;
        Ok(before)
    }

    async fn take_back_unfinished(&self, worker: &str, event_id: &str) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        attempts::take_back_unfinished(&mut session, worker, event_id).await?;
        session.commit().await
    }

    async fn bury(&self, letters: &[(Letter, Output)], new_failures: u32) -> Result<Buried> {
        let mut session = self.house.begin(Purpose::House).await?;
        let (notices, alarms) = burial::bury(&mut session, letters, new_failures).await?;
        session.commit().await?;
        Ok(Buried { settled: vec![Settled::seen_by_store(); letters.len()], notices, alarms })
    }

    async fn lease_outputs(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxRow>> {
        let mut session = self.house.begin(Purpose::House).await?;
        let rows = outbox::lease(&mut session, limit, lease).await?;
        session.commit().await?;
        Ok(rows)
    }

    async fn mark_published(&self, published: &[Published]) -> Result<()> {
        // Outputs whose mark is lost are swept, and found where they are.
        let mut session = self.house.begin(Purpose::Note).await?;
        outbox::mark_published(&mut session, published).await?;
        session.commit().await
    }

    async fn put_back_outputs(&self, rows: &[(i64, Unpublished)]) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        outbox::put_back(&mut session, rows).await?;
        session.commit().await
    }

    async fn taken_ids(&self) -> Result<BTreeMap<String, u64>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let taken = outputs::taken_ids(&mut session).await?;
        session.commit().await?;
        Ok(taken)
    }

    fn output_ids(&self) -> &OutputIds {
        self.house.output_ids()
    }

    fn installation(&self) -> &str {
        &self.installation
    }

    async fn marks(&self, on_broker: Option<&str>) -> Result<Marks> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let marks = marks::read(&mut session, on_broker).await?;
        session.commit().await?;
        Ok(marks)
    }

    async fn write_mark(&self, name: &str, seen: &Seen) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        marks::write(&mut session, name, seen).await?;
        session.commit().await
    }

    async fn acknowledge_mark(&self, name: &str, sequence: u64) -> Result<()> {
        let mut session = self.house.begin(Purpose::Note).await?;
        marks::acknowledge(&mut session, name, sequence).await?;
        session.commit().await
    }

    async fn known_events(&self, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let known = marks::known_events(&mut session, worker, event_ids).await?;
        session.commit().await?;
        Ok(known)
    }

    async fn keep_recovered(&self, outputs: &[RecoveredOutput]) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        marks::keep_recovered(&mut session, outputs).await?;
        session.commit().await
    }

    async fn forget_recovered(&self, ids: &[&str]) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        marks::forget_recovered(&mut session, ids).await?;
        session.commit().await
    }

    async fn recovered(&self, ids: &[&str]) -> Result<HashMap<String, (String, u64)>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let found = marks::recovered(&mut session, ids).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn last_published(&self, within: Duration) -> Result<Vec<OnStream>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let found = repair::last_published(&mut session, within).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn published_on(&self, stream: &str) -> Result<Vec<OnStream>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let found = repair::published_on(&mut session, stream).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn publish_again(&self, lost: &[OnStream]) -> Result<u64> {
        let mut session = self.house.begin(Purpose::House).await?;
        let done = repair::publish_again(&mut session, lost).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn outputs(&self, filter: &OutputFilter) -> Result<Vec<OutputSummary>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let found = outputs::list(&mut session, filter).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn output(&self, number: i64) -> Result<Option<OutputRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let found = outputs::find(&mut session, number).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn retry_outputs(&self, numbers: &[i64]) -> Result<u64> {
        let mut session = self.house.begin(Purpose::House).await?;
        let done = outputs::retry(&mut session, numbers).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn drop_outputs(&self, numbers: &[i64], note: &str) -> Result<u64> {
        let mut session = self.house.begin(Purpose::House).await?;
        let done = outputs::drop(&mut session, numbers, note).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn outbox_lag(&self) -> Result<Vec<OutboxLag>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let found = outputs::lag(&mut session).await?;
        session.commit().await?;
        Ok(found)
    }

    async fn put_component(&self, digest: &str, wasm: &[u8]) -> Result<()> {
        let mut session = self.house.begin(Purpose::House).await?;
        deployments::put_component(&mut session, digest, wasm).await?;
        session.commit().await
    }

    async fn component(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        let mut session = self.house.begin(Purpose::Read).await?;
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
        let mut session = self.house.begin(Purpose::Deploy).await?;
        let deployment =
            deployments::deploy(&mut session, self.login.as_ref(), worker, digest, manifest, migrations).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn due_migrations(&self, worker: &str, migrations: &[WorkerMigration]) -> Result<Vec<String>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let due = deployments::due_migrations(&mut session, worker, migrations).await?;
        session.commit().await?;
        Ok(due)
    }

    async fn activate(&self, worker: &str, version: u32) -> Result<Option<DeploymentRecord>> {
        let mut session = self.house.begin(Purpose::House).await?;
        let deployment = deployments::activate(&mut session, worker, version).await?;
        session.commit().await?;
        Ok(deployment)
    }

    async fn newest_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let deployments = deployments::newest(&mut session).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn active_deployments(&self) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let deployments = deployments::active(&mut session).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn deployments(&self, worker: &str) -> Result<Vec<DeploymentRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let deployments = deployments::of_worker(&mut session, worker).await?;
        session.commit().await?;
        Ok(deployments)
    }

    async fn letters(&self, filter: &LetterFilter) -> Result<Vec<LetterSummary>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let letters = letters::list(&mut session, filter).await?;
        session.commit().await?;
        Ok(letters)
    }

    async fn letter(&self, id: i64) -> Result<Option<LetterRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let letter = letters::find(&mut session, id).await?;
        session.commit().await?;
        Ok(letter)
    }

    async fn letter_groups(&self, filter: &LetterFilter) -> Result<Vec<LetterGroup>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let groups = letters::groups(&mut session, filter).await?;
        session.commit().await?;
        Ok(groups)
    }

    async fn letter_depths(&self) -> Result<Vec<LetterDepth>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let depths = alarms::depths(&mut session).await?;
        session.commit().await?;
        Ok(depths)
    }

    async fn alarms(&self) -> Result<Vec<Alarm>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let alarms = alarms::list(&mut session).await?;
        session.commit().await?;
        Ok(alarms)
    }

    async fn move_alarms(&self, moves: &[alarm::Move]) -> Result<Told> {
        let mut session = self.house.begin(Purpose::House).await?;
        let told = alarms::take(&mut session, moves).await?;
        session.commit().await?;
        Ok(told)
    }

    async fn redrive(&self, letters: &[Redrive], by: &By) -> Result<(Vec<Moved>, Vec<OutboxRow>)> {
        let mut session = self.house.begin(Purpose::House).await?;
        let moved = redrive::redrive(&mut session, letters, by).await?;
        fault::point(fault::BEFORE_REDRIVE);
        session.commit().await?;
        fault::point(fault::AFTER_REDRIVE);
        Ok(moved)
    }

    async fn put_back(&self, worker: &str, id: i64, generation: u32) -> Result<PutBack> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let put_back = redrive::put_back(&mut session, worker, id, generation).await?;
        session.commit().await?;
        Ok(put_back)
    }

    async fn done_events(&self, worker: &str, event_ids: &[String]) -> Result<Vec<String>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let done = inbox::done(&mut session, worker, event_ids).await?;
        session.commit().await?;
        Ok(done)
    }

    async fn move_letters(&self, ids: &[i64], what: &Move, by: &By) -> Result<Vec<Moved>> {
        let mut session = self.house.begin(Purpose::House).await?;
        let moved = redrive::move_letters(&mut session, ids, what, by).await?;
        session.commit().await?;
        Ok(moved)
    }

    async fn state_entry(&self, worker: &str, key: &str) -> Result<Option<StateRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let entry = state::entry(&mut session, worker, key).await?;
        session.commit().await?;
        Ok(entry)
    }

    async fn state_entries(&self, worker: &str, prefix: &str, limit: u32) -> Result<Vec<StateRecord>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let entries = state::entries(&mut session, worker, prefix, limit).await?;
        session.commit().await?;
        Ok(entries)
    }

    async fn totals(&self) -> Result<Vec<WorkerTotals>> {
        let mut session = self.house.begin(Purpose::Read).await?;
        let totals = totals::by_worker(&mut session).await?;
        session.commit().await?;
        Ok(totals)
    }

    async fn retire(&self, what: &Retire) -> Result<bool> {
        let mut done = self.turn(Of::Outbox, what.outputs, what).await?;
        done |= self.turn(Of::Request, what.requests, what).await?;
        let mut session = self.house.begin(Purpose::House).await?;
        totals::write_done(&mut session).await?;
        done |= parts::remove_log_records(&mut session, what.outputs, what.limit).await?;
        done |= parts::remove_deleted_state(&mut session, what.limit).await?;
        if let Some(keep) = what.inbox {
            done |= parts::remove_attempts(&mut session, keep, what.limit).await?;
        }
        session.commit().await?;
        if let Some(keep) = what.inbox {
            done |= self.turn(Of::Inbox, keep, what).await?;
        }
        Ok(done)
    }

    async fn close(&self) {
        self.lease.end().await;
        self.guests.close().await;
        self.house.close().await;
    }
}
