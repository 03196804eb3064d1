//! One transaction on the one connection that writes, and the hooks that confine guests to it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, raw_sql};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::authorizer::Authorizer;
use super::errors;
use crate::model::output_ids::OutputIds;
use crate::store::Result;
use crate::store::error::Doing as _;
use crate::store::instance::Instance;

pub(in crate::store) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A running statement checks its deadline after about this many virtual machine instructions.
const INSTRUCTIONS_PER_CHECK: i32 = 1000;

/// The most rows that SQLite buffers for a reader.
const ROW_BUFFER_SIZE: usize = 16;

/// The options of all connections to a file.
pub(in crate::store) fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .pragma("trusted_schema", "off")
        .row_buffer_size(ROW_BUFFER_SIZE)
        .disable_statement_logging()
}

/// The source of transactions: one after the other, on a connection that is reopened after a
/// failure.
pub(in crate::store) struct Sessions {
    options: SqliteConnectOptions,
    begin: &'static str,
    instance: Instance,
    writer: Arc<Mutex<Option<Writer>>>,
    output_ids: Arc<OutputIds>,
}

impl Sessions {
    pub(in crate::store) fn new(options: SqliteConnectOptions) -> Self {
        let output_ids = Arc::new(OutputIds::with_random_key());
        Sessions {
            options,
            begin: "begin immediate",
            instance: Instance::new(),
            writer: Arc::default(),
            output_ids,
        }
    }

    /// The same, with the output ids of the installation.
    pub(in crate::store) fn with_output_ids(self, output_ids: Arc<OutputIds>) -> Self {
        Sessions { output_ids, ..self }
    }

    /// For read-only transactions, which do not wait for writers.
    pub(in crate::store) fn reading(options: SqliteConnectOptions) -> Self {
        Sessions {
            begin: "begin",
            ..Sessions::new(options.read_only(true))
        }
    }

    /// Waits for the previous transaction and begins one.
    pub(in crate::store) async fn begin(&self) -> Result<Session> {
        self.begin_with_callback(|| ()).await
    }

    /// Like [`Sessions::begin`]. Calls `on_acquired` when the previous transactions are over.
    pub(in crate::store) async fn begin_with_callback<T>(
        &self,
        on_acquired: impl FnOnce() -> T,
    ) -> Result<Session> {
        let mut slot = Arc::clone(&self.writer).lock_owned().await;
        on_acquired();
        if slot.is_none() {
            let writer = Writer::open(&self.options).await;
            *slot = Some(writer.doing("open SQLite")?);
        }

        let output_ids = Arc::clone(&self.output_ids);
        let mut session = Session {
            slot,
            instance: self.instance,
            output_ids,
            finished: false,
        };
        session
            .begin(self.begin)
            .await
            .doing("begin a transaction")?;
        Ok(session)
    }

    pub(in crate::store) async fn close(&self) {
        if let Some(writer) = self.writer.lock().await.take() {
            // An error changes nothing: the file is as it was after the last commit.
            let _ = writer.connection.close().await;
        }
    }
}

struct Writer {
    connection: SqliteConnection,
    hooks: Arc<Hooks>,
    authorizer: Authorizer,
}

impl Writer {
    async fn open(options: &SqliteConnectOptions) -> sqlx::Result<Self> {
        let mut connection = options.connect().await?;
        let hooks = Arc::new(Hooks::new());
        let mut handle = connection.lock_handle().await?;
        let hook = Arc::clone(&hooks);
        handle.set_commit_hook(move || hook.may_commit.load(Ordering::Acquire));
        let clock = Arc::clone(&hooks);
        handle.set_progress_handler(INSTRUCTIONS_PER_CHECK, move || clock.is_in_time());
        let authorizer = Authorizer::install(&mut handle)?;
        drop(handle);
        Ok(Writer {
            connection,
            hooks,
            authorizer,
        })
    }
}

/// The state of SQLite's hooks.
struct Hooks {
    /// Whether the host is committing. A commit at any other time is a guest's, outside of its
    /// transaction, and fails.
    may_commit: AtomicBool,
    opened: Instant,
    /// The deadline of the running guest statement, in microseconds since `opened`; zero if none
    /// runs.
    deadline: AtomicU64,
}

impl Hooks {
    fn new() -> Self {
        Hooks {
            may_commit: AtomicBool::new(false),
            opened: Instant::now(),
            deadline: AtomicU64::new(0),
        }
    }

    fn elapsed_micros(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn is_in_time(&self) -> bool {
        let deadline = self.deadline.load(Ordering::Acquire);
        deadline == 0 || self.elapsed_micros() < deadline
    }
}

/// An open transaction. If it is dropped before it is finished, the connection is closed, and the
/// transaction with it.
pub(in crate::store) struct Session {
    slot: OwnedMutexGuard<Option<Writer>>,
    instance: Instance,
    output_ids: Arc<OutputIds>,
    finished: bool,
}

impl Session {
    /// The output ids of the installation.
    pub(in crate::store) fn output_ids(&self) -> Arc<OutputIds> {
        Arc::clone(&self.output_ids)
    }

    async fn begin(&mut self, begin: &'static str) -> sqlx::Result<()> {
        raw_sql(begin).execute(self.connection()?).await?;
        Ok(())
    }

    /// The instance that leases appended outputs.
    pub(in crate::store) fn instance(&self) -> i64 {
        self.instance.id()
    }

    pub(in crate::store) fn connection(&mut self) -> sqlx::Result<&mut SqliteConnection> {
        self.slot
            .as_mut()
            .map(|writer| &mut writer.connection)
            .ok_or(sqlx::Error::WorkerCrashed)
    }

    /// Interrupts the statements that follow after `time`; none for statements of the platform.
    fn limit_time(&self, time: Option<Duration>) {
        if let Some(Writer { hooks, .. }) = self.slot.as_ref() {
            let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            let deadline = time.map_or(0, |time| {
                hooks.elapsed_micros().saturating_add(micros(time)).max(1)
            });
            hooks.deadline.store(deadline, Ordering::Release);
        }
    }

    /// Begins a guest's statement: the authorizer applies, and SQLite interrupts it after `time`.
    pub(in crate::store) async fn begin_guest_statement(&mut self, time: Duration) -> Result<()> {
        let writer = self.slot.as_mut().ok_or(sqlx::Error::WorkerCrashed);
        let admitted = async {
            let writer = writer?;
            writer
                .authorizer
                .activate(&mut writer.connection.lock_handle().await?);
            Ok(())
        };
        admitted.await.map_err(|error: sqlx::Error| {
            errors::from_statement(error, "activate the authorizer")
        })?;
        self.limit_time(Some(time));
        Ok(())
    }

    /// Ends a guest's statement, after it has stopped. Returns whether the transaction is still
    /// open.
    pub(in crate::store) async fn end_guest_statement(&mut self) -> Result<bool> {
        let writer = self.slot.as_mut().ok_or(sqlx::Error::WorkerCrashed);
        let dismissed = async {
            let writer = writer?;
            Ok(writer
                .authorizer
                .deactivate(&mut writer.connection.lock_handle().await?))
        };
        let is_open = dismissed.await;
        self.limit_time(None);
        is_open.map_err(|error: sqlx::Error| {
            errors::from_statement(error, "deactivate the authorizer")
        })
    }

    /// Runs statements of the platform that return no rows.
    pub(in crate::store) async fn run(
        &mut self,
        statements: String,
        context: &'static str,
    ) -> Result<()> {
        let ran = match self.connection() {
            Ok(connection) => raw_sql(AssertSqlSafe(statements))
                .execute(connection)
                .await
                .map(|_| ()),
            Err(error) => Err(error),
        };
        ran.map_err(|error| errors::from_savepoint(error, context))
    }

    fn allow_commit(&self, may_commit: bool) {
        if let Some(Writer { hooks, .. }) = self.slot.as_ref() {
            hooks.may_commit.store(may_commit, Ordering::Release);
        }
    }

    /// Clears the statement cache. Statements prepared before a migration must not be used after
    /// it.
    pub(in crate::store) async fn clear_statement_cache(&mut self) -> sqlx::Result<()> {
        self.connection()?.clear_cached_statements().await
    }

    /// Commits. SQLite returns an error if there is no transaction any more.
    pub(in crate::store) async fn commit(mut self) -> Result<()> {
        self.allow_commit(true);
        let committed = match self.connection() {
            Ok(connection) => raw_sql("commit").execute(connection).await.map(|_| ()),
            Err(error) => Err(error),
        };
        self.allow_commit(false);
        match committed {
            Ok(()) => {
                self.finished = true;
                Ok(())
            }
            Err(error) => {
                self.rollback().await;
                Err(errors::from_commit(error))
            }
        }
    }

    /// Rolls back. If that fails, the connection is closed, unless SQLite had already rolled back.
    pub(in crate::store) async fn rollback(mut self) {
        let rolled_back = match self.connection() {
            Ok(connection) => raw_sql("rollback").execute(connection).await.map(|_| ()),
            Err(error) => Err(error),
        };
        self.finished =
            rolled_back.map_or_else(|error| errors::is_no_transaction(&error), |()| true);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.limit_time(None);
        if !self.finished {
            *self.slot = None;
        }
    }
}
