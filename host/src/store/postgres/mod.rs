//! PostgreSQL: many hosts, one database.
//!
//! It works behind a pooler that assigns server connections per transaction. So every operation is
//! one explicit transaction, and no setting or lock outlives it.

pub(super) mod attempts;
pub(super) mod changes;
pub(super) mod dead_lettering;
pub(super) mod deferred;
mod definer_key;
pub(super) mod deployments;
pub(super) mod errors;
mod functions;
pub(super) mod guest_sql;
mod guest_values;
pub(super) mod inbox;
pub(super) mod inspection;
mod instance;
pub(super) mod outbox;
mod partitions;
mod privileges;
pub(super) mod requests;
mod scratch;
pub use scratch::ScratchDatabase;
pub(super) mod session;
pub(super) mod state;
mod wal;

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Row};

use self::functions::Catalog;
use self::guest_sql::Guests;
use self::instance::HostLease;
use self::partitions::PartitionedTable;
pub(super) use self::privileges::Login;
pub(super) use self::session::Purpose;
use self::session::Sessions;
use self::wal::{PostgresWal, Replication};
use super::db::Db;
use super::instance::Instance;
use super::migrations;
use super::{OutputWal, Result, RetentionPolicy, TakenOver, Tx};
use crate::model::hint::WithHint;
use crate::model::output_ids::OutputIds;
use crate::model::sql::Functions;

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
        definer_key::load(&platform, false).await?;
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
        let db = Db::Postgres(platform.begin(Purpose::Read).await?);
        let installation = migrations::installation(db).await?;
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
        definer_key::load(&platform, true).await?;
        let functions = Catalog::new(platform.clone());
        let db = Db::Postgres(platform.begin(Purpose::Read).await?);
        let installation = migrations::installation(db).await?;
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
            definer_key::load(&self.platform, self.login.is_none()).await?;
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
    let purpose = Purpose::Deploy;
    migrations::run(Db::Postgres(sessions.begin(purpose).await?))
        .await
        .context("migrate the PostgreSQL schema")?;
    let db = Db::Postgres(sessions.begin(Purpose::Read).await?);
    let output_ids = migrations::output_ids(db).await?;
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

impl PostgresStore {
    pub(super) fn wal(&self) -> Option<Arc<dyn OutputWal>> {
        self.wal
            .clone()
            .map(|wal| Arc::new(wal) as Arc<dyn OutputWal>)
    }

    pub(super) fn output_ids(&self) -> &OutputIds {
        self.platform.output_ids()
    }

    pub(super) fn installation(&self) -> &str {
        &self.installation
    }

    pub(super) fn instance_id(&self) -> i64 {
        self.instance.id()
    }

    /// The app's roles; `None` if guests' SQL is trusted.
    pub(super) fn login(&self) -> Option<&Login> {
        self.login.as_ref()
    }

    /// Begins a transaction of the platform.
    pub(super) async fn begin(&self, purpose: Purpose) -> Result<Db> {
        self.platform.begin(purpose).await.map(Db::Postgres)
    }

    /// Begins a transaction with guests.
    pub(super) async fn begin_tx(&self, worker: &str, purpose: Purpose) -> Result<Tx> {
        let guests = self.guests().await?;
        let session = self.guests.begin(purpose).await?;
        Ok(Tx::on_postgres(session, worker, guests))
    }

    pub(super) async fn renew_lease(&self) -> Result<Vec<TakenOver>> {
        self.lease.renew().await
    }

    pub(super) async fn delete_expired(&self, retention: &RetentionPolicy) -> Result<bool> {
        let mut done = self
            .rotate(PartitionedTable::Outbox, retention.outputs, retention)
            .await?;
        done |= self
            .rotate(PartitionedTable::Request, retention.requests, retention)
            .await?;
        let mut session = self.platform.begin(Purpose::Platform).await?;
        partitions::record_completed_redrives(&mut session).await?;
        done |= partitions::delete_relay_records(&mut session, retention.outputs, retention.limit)
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

    pub(super) async fn close(&self) {
        self.lease.release().await;
        self.guests.close().await;
        self.platform.close().await;
    }
}
