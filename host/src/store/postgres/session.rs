//! One transaction on a pooled connection: begun in one round trip, committed with proof.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use sha2::{Digest, Sha256};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgArguments, PgConnection, PgPool};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Postgres, Row, raw_sql};

use super::errors;
use crate::model::output_ids::OutputIds;
use crate::store::Result;
use crate::store::error::Doing as _;
use crate::store::instance::Instance;
use crate::store::shared::PLATFORM_STATEMENT_TIMEOUT;

/// The purpose of a transaction, which determines its settings.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) enum Purpose {
    /// Guest statements, each limited to this time.
    Guest(Duration),
    /// The same, in a read-only transaction.
    GuestReadOnly(Duration),
    Platform,
    /// Writes that may be lost in a server crash, so that the commit does not wait for the disk.
    AsyncCommit,
    /// Workers' migrations, without a time limit.
    Deploy,
    Read,
    /// The same for large tables, which are read by their indexes.
    ReadByIndex,
}

impl Purpose {
    /// The statements that begin the transaction. The last one returns its id, if it may write.
    fn begin(self, host: &HostSettings, name: &str, releases_locks: bool) -> String {
        let (search_path, time) = match self {
            // Zero would disable the timeout.
            Purpose::Guest(time) | Purpose::GuestReadOnly(time) => {
                ("app_default, pg_temp", time.max(Duration::from_millis(2)))
            }
            Purpose::Platform | Purpose::AsyncCommit | Purpose::Read | Purpose::ReadByIndex => {
                ("pg_catalog, pg_temp", PLATFORM_STATEMENT_TIMEOUT)
            }
            Purpose::Deploy => ("pg_catalog, pg_temp", Duration::ZERO),
        };
        let (access, id) = match self {
            Purpose::Read | Purpose::ReadByIndex => ("read only", "'' as id"),
            Purpose::Guest(_) => ("read write", GUARDED_ID),
            Purpose::GuestReadOnly(_) => ("read only", READ_ONLY_ID),
            _ => (
                "read write",
                "pg_catalog.pg_current_xact_id()::pg_catalog.text as id",
            ),
        };
        let statement_ms = milliseconds(time);

        // Shorter than the statement timeout, so that a lock wait ends as a conflict, not as a slow
        // statement.
        let lock_ms = milliseconds(if time.is_zero() {
            PLATFORM_STATEMENT_TIMEOUT
        } else {
            time / 2
        });
        let waits = !matches!(self, Purpose::AsyncCommit);
        let durable = if waits { "on" } else { "off" };

        // A guest may compute for long, batch after batch. A frozen host is detected by its lease,
        // see `instance`.
        let idle_ms = milliseconds(match self {
            Purpose::Guest(time) | Purpose::GuestReadOnly(time) => {
                time.saturating_mul(10).max(PLATFORM_STATEMENT_TIMEOUT)
            }
            _ => PLATFORM_IDLE_TIMEOUT,
        });
        let connection = match self {
            Purpose::Guest(_) | Purpose::GuestReadOnly(_) => host.guest_settings(),
            _ => host.settings(),
        };
        let (compiling, planning) = match self {
            Purpose::Platform | Purpose::AsyncCommit | Purpose::ReadByIndex => {
                (JIT_OFF, CUSTOM_PLANS)
            }
            Purpose::Read => (JIT_OFF, ""),
            Purpose::Guest(_) | Purpose::GuestReadOnly(_) | Purpose::Deploy => ("", ""),
        };
        let (reset, pinned) = (RESET, STARTUP_SETTINGS);
        let name = name.replace('\'', "''");
        let unlock = if releases_locks {
            ", pg_catalog.pg_advisory_unlock_all()"
        } else {
            ""
        };
        format!(
            "begin isolation level read committed {access}; {reset}{pinned}\
             set local application_name = '{name}'; \
             set local search_path = {search_path}; \
             set local statement_timeout = {statement_ms}; set local lock_timeout = {lock_ms}; \
             set local idle_in_transaction_session_timeout = {idle_ms}; \
             set local synchronous_commit = {durable}; \
             set local standard_conforming_strings = on; \
             {connection}{compiling}{planning}select {id}{unlock}"
        )
    }
}

/// Resets the session, because a worker's function in an earlier transaction may have changed any
/// of it. Prepared statements are kept; if one was deallocated, the connection is dropped.
const RESET: &str = "close all; unlisten *; reset session authorization; reset all; \
    discard temp; discard sequences; ";

/// The settings of sqlx's startup message, which `reset all` may not restore behind a pooler.
const STARTUP_SETTINGS: &str = "set local client_encoding = 'UTF8'; set local timezone = 'UTC'; \
    set local datestyle = 'ISO, MDY'; ";

/// How long a platform transaction may be idle between two statements.
const PLATFORM_IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// The interval at which the server checks the client's connection during a statement, in
/// milliseconds.
const CHECK_CLIENT_MS: u32 = 2000;

/// The server closes the connection after about ten seconds without a response of the client's
/// machine.
const KEEPALIVE: &str = "set local tcp_keepalives_idle = 4; set local tcp_keepalives_interval = 2; \
    set local tcp_keepalives_count = 3; set local tcp_user_timeout = 10000; ";

/// The settings of each transaction that depend on the host.
#[derive(Debug, Clone, Copy)]
pub(in crate::store) struct HostSettings {
    pub instance: Instance,
    /// Whether the server supports `client_connection_check_interval`, which depends on its
    /// operating system.
    pub checks_client: bool,
}

impl HostSettings {
    /// The settings of a transaction.
    fn settings(self) -> String {
        let instance = format!("set local oncely.instance = '{}'; ", self.instance.id());
        match self.checks_client {
            true => format!(
                "{instance}set local client_connection_check_interval = {CHECK_CLIENT_MS}; "
            ),
            false => instance,
        }
    }

    /// The settings of a transaction with guests, which may be idle for long.
    fn guest_settings(self) -> String {
        self.settings() + KEEPALIVE
    }
}

/// The server JIT-compiles statements with a high estimated cost, which takes seconds under load.
/// The estimates for the platform's statements are too high: tables may have no statistics yet, and
/// some tables with a single row have no index on the searched column.
const JIT_OFF: &str = "set local jit = off; ";

/// A connection caches plans of its statements while tables grow from empty. A sequential scan is
/// right for ten rows, but would be kept until the table is analyzed. Planning is cheap compared to
/// these bulk statements. Without statistics, the planner also misses that a small index contains
/// all searched rows.
const CUSTOM_PLANS: &str =
    "set local plan_cache_mode = force_custom_plan; set local enable_seqscan = off; ";

/// The transaction's id, its backend process, and a guard that lets only the host commit.
const GUARDED_ID: &str = "pg_catalog.pg_current_xact_id()::pg_catalog.text as id, \
    pg_catalog.pg_backend_pid() as process, oncely_definer.guard()";

/// The same without the guard, which would be a write: there is nothing to commit.
const READ_ONLY_ID: &str = "pg_catalog.pg_current_xact_id()::pg_catalog.text as id, \
    pg_catalog.pg_backend_pid() as process";

fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// A source of transactions: a pool of connections with its settings.
#[derive(Clone)]
pub(in crate::store) struct Sessions {
    pool: PgPool,
    named_statements: bool,
    /// Whether advisory locks of an earlier transaction are released first; the role has to permit
    /// that.
    releases_locks: bool,
    host: HostSettings,
    definer_key: Arc<DefinerKey>,
    output_ids: Arc<OutputIds>,
}

/// The key for tokens of the definer functions.
#[derive(Default)]
struct DefinerKey {
    /// Empty until the schema is migrated.
    key: RwLock<Vec<u8>>,
    /// Whether the database has a new key.
    is_stale: AtomicBool,
}

impl Sessions {
    pub(in crate::store) fn new(pool: PgPool, named_statements: bool, instance: Instance) -> Self {
        let output_ids = Arc::new(OutputIds::with_random_key());
        let host = HostSettings {
            instance,
            checks_client: false,
        };
        Sessions {
            pool,
            named_statements,
            releases_locks: false,
            host,
            definer_key: Arc::default(),
            output_ids,
        }
    }

    /// The same sessions with the installation's output ids.
    pub(in crate::store) fn with_output_ids(self, output_ids: OutputIds) -> Self {
        Sessions {
            output_ids: Arc::new(output_ids),
            ..self
        }
    }

    /// The generator of output ids.
    pub(in crate::store) fn output_ids(&self) -> &Arc<OutputIds> {
        &self.output_ids
    }

    /// The same sessions with client checks by the server, if it supports them.
    pub(in crate::store) async fn with_client_checks(mut self) -> Self {
        self.host.checks_client = true;
        // Beginning a transaction fails if the server's operating system has no support.
        if let Ok(session) = self.begin(Purpose::Read).await {
            session.rollback().await;
            return self;
        }
        self.host.checks_client = false;
        self
    }

    /// Sets the key of the definer functions, for all sessions that share it.
    pub(in crate::store) fn set_definer_key(&self, key: Vec<u8>) {
        *self
            .definer_key
            .key
            .write()
            .unwrap_or_else(PoisonError::into_inner) = key;
        self.definer_key.is_stale.store(false, Ordering::Release);
    }

    /// Records that the database has a new key.
    pub(in crate::store) fn mark_key_stale(&self) {
        self.definer_key.is_stale.store(true, Ordering::Release);
    }

    pub(in crate::store) fn is_key_stale(&self) -> bool {
        self.definer_key.is_stale.load(Ordering::Acquire)
    }

    /// Sessions on another role's connections. `releases_locks`: whether that role may release its
    /// advisory locks.
    pub(in crate::store) fn with_pool(&self, pool: PgPool, releases_locks: bool) -> Self {
        Sessions {
            pool,
            releases_locks,
            ..self.clone()
        }
    }

    /// The same connections, for both the host and guests.
    pub(in crate::store) fn shared_with_guests(self) -> Self {
        Sessions {
            releases_locks: true,
            ..self
        }
    }

    /// Begins a transaction. Broken pooled connections are dropped and replaced.
    pub(in crate::store) async fn begin(&self, purpose: Purpose) -> Result<Session> {
        let options = self.pool.connect_options();
        let begin = purpose.begin(
            &self.host,
            options.get_application_name().unwrap_or("oncely"),
            self.releases_locks,
        );
        let mut dead = 0;
        loop {
            let connection = self.pool.acquire().await.doing("connect to PostgreSQL")?;
            let mut session = Session {
                connection,
                named_statements: self.named_statements,
                purpose,
                definer_key: self
                    .definer_key
                    .key
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone(),
                output_ids: Arc::clone(&self.output_ids),
                id: String::new(),
                process: 0,
                left_behind: Vec::new(),
                finished: false,
            };
            match session.begin(&begin).await {
                Ok(()) => return Ok(session),
                Err(error)
                    if errors::is_connection_loss(&error)
                        && dead < self.pool.options().get_max_connections() =>
                {
                    dead += 1;
                }
                Err(error) => return Err(errors::from_statement(error, "begin a transaction")),
            }
        }
    }

    pub(in crate::store) async fn close(&self) {
        self.pool.close().await;
    }
}

/// An open transaction. If it is dropped before it is finished, its connection is closed, which
/// rolls it back.
pub(in crate::store) struct Session {
    connection: PoolConnection<Postgres>,
    named_statements: bool,
    purpose: Purpose,
    definer_key: Vec<u8>,
    output_ids: Arc<OutputIds>,
    /// The transaction's id; empty if it is read-only.
    id: String,
    /// The backend's process id; zero except for guests.
    process: i32,
    /// Names of prepared statements that a failure left behind.
    left_behind: Vec<String>,
    finished: bool,
}

impl Session {
    async fn begin(&mut self, begin: &str) -> sqlx::Result<()> {
        let row = raw_sql(AssertSqlSafe(begin))
            .fetch_one(&mut *self.connection)
            .await?;
        self.id = row.try_get("id")?;
        if let Purpose::Guest(_) | Purpose::GuestReadOnly(_) = self.purpose {
            self.process = row.try_get("process")?;
        }
        Ok(())
    }

    /// The generator of output ids.
    pub(in crate::store) fn output_ids(&self) -> Arc<OutputIds> {
        Arc::clone(&self.output_ids)
    }

    /// The token for definer functions, valid in this transaction only.
    pub(in crate::store) fn token(&self) -> Vec<u8> {
        self.token_for("definer")
    }

    /// Computes the same value as the SQL function `oncely.tx_token`.
    fn token_for(&self, purpose: &str) -> Vec<u8> {
        let inner = Sha256::new()
            .chain_update(&self.definer_key)
            .chain_update(format!("{purpose}:{}", self.id));
        Sha256::new()
            .chain_update(&self.definer_key)
            .chain_update(inner.finalize())
            .finalize()
            .to_vec()
    }

    /// The transaction's id.
    pub(in crate::store) fn id(&self) -> &str {
        &self.id
    }

    /// Checks deferred constraints now, in a transaction that will not be committed. Its guests
    /// have ended before the token is set.
    pub(in crate::store) async fn check_constraints(&mut self) -> sqlx::Result<()> {
        let token = hex::encode(self.token_for("commit"));
        let check =
            format!("set local oncely.commit_token = '{token}'; set constraints all immediate");
        raw_sql(AssertSqlSafe(check))
            .execute(&mut *self.connection)
            .await
            .map(|_| ())
    }

    /// The backend's process id of a guest's transaction.
    pub(in crate::store) fn process(&self) -> i32 {
        self.process
    }

    /// The time limit of a guest's statement.
    pub(in crate::store) fn guest_time(&self) -> Duration {
        if let Purpose::Guest(time) | Purpose::GuestReadOnly(time) = self.purpose {
            time
        } else {
            PLATFORM_STATEMENT_TIMEOUT
        }
    }

    /// A statement of the platform. Behind a pooler it is an unnamed prepared statement for one
    /// use.
    pub(in crate::store) fn query(
        &self,
        statement: &'static str,
    ) -> Query<'static, Postgres, PgArguments> {
        sqlx::query(statement).persistent(self.named_statements)
    }

    /// A statement of a guest; see [`Session::query`].
    pub(in crate::store) fn guest_query(
        &self,
        statement: String,
        arguments: PgArguments,
    ) -> Query<'static, Postgres, PgArguments> {
        sqlx::query_with(AssertSqlSafe(statement), arguments).persistent(self.named_statements)
    }

    pub(in crate::store) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Runs platform statements without results.
    pub(in crate::store) async fn run(
        &mut self,
        statements: String,
        context: &'static str,
    ) -> Result<()> {
        let ran = raw_sql(AssertSqlSafe(statements))
            .execute(&mut *self.connection)
            .await;
        ran.map(|_| ())
            .map_err(|error| errors::from_savepoint(error, context))
    }

    /// Whether this transaction is still open after a migration.
    pub(in crate::store) async fn is_same_transaction(&mut self) -> sqlx::Result<bool> {
        let row = raw_sql("select pg_catalog.pg_current_xact_id()::pg_catalog.text as id")
            .fetch_one(&mut *self.connection)
            .await?;
        Ok(row.try_get::<String, _>("id")? == self.id)
    }

    /// Commits, in one message with a fence before the commit. The fence fails if the transaction
    /// was aborted or is not the one begun here, and `commit` is then not reached. The commit is
    /// never sent again.
    pub(in crate::store) async fn commit(mut self) -> Result<()> {
        let fence = format!(
            "select 1 / (pg_catalog.pg_current_xact_id() = '{}'::pg_catalog.xid8)::int",
            self.id
        );
        let commit = match self.purpose {
            Purpose::Read | Purpose::ReadByIndex | Purpose::GuestReadOnly(_) => "commit".to_owned(),
            Purpose::Guest(_) => {
                // The guard checks the token. The guests of the transaction have ended before it is
                // set.
                format!(
                    "set local oncely.commit_token = '{}'; {fence}; commit",
                    hex::encode(self.token_for("commit"))
                )
            }
            Purpose::Platform | Purpose::AsyncCommit | Purpose::Deploy => {
                format!("{fence}; commit")
            }
        };
        let committed = raw_sql(AssertSqlSafe(commit))
            .execute(&mut *self.connection)
            .await;
        committed.map_err(|error| match self.purpose {
            Purpose::Guest(_) | Purpose::GuestReadOnly(_) | Purpose::Deploy => {
                errors::from_guest_commit(error)
            }
            Purpose::Platform | Purpose::AsyncCommit | Purpose::Read | Purpose::ReadByIndex => {
                errors::from_statement(error, "commit")
            }
        })?;
        self.finished = true;
        Ok(())
    }

    /// Rolls back. Closes the connection if that fails.
    pub(in crate::store) async fn rollback(mut self) {
        let rollback = "rollback".to_owned() + &self.deallocations();
        self.finished = raw_sql(AssertSqlSafe(rollback))
            .execute(&mut *self.connection)
            .await
            .is_ok();
    }

    /// Records that a prepared statement has to be deallocated with the next rollback.
    pub(in crate::store) fn leave_behind(&mut self, name: &str) {
        self.left_behind.push(name.to_owned());
    }

    /// The statements that deallocate what a failure left behind, to run after a rollback.
    pub(in crate::store) fn deallocations(&mut self) -> String {
        self.left_behind
            .drain(..)
            .map(|name| format!("; deallocate {name}"))
            .collect()
    }

    /// Records that all prepared statements are deallocated.
    pub(in crate::store) fn leave_nothing_behind(&mut self) {
        self.left_behind.clear();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Migrations may have changed the settings of the connection.
        if !self.finished || matches!(self.purpose, Purpose::Deploy) {
            self.connection.close_on_drop();
        }
    }
}
