//! One transaction on the one connection that writes, and the hooks that hold guests in it.

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
use crate::store::instance::Instance;

const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// After about how many virtual machine instructions a statement looks at the clock.
const INSTRUCTIONS_PER_CHECK: i32 = 1000;

/// How many rows SQLite may be ahead of whoever reads them.
const ROW_BUFFER_SIZE: usize = 16;

pub(super) fn options(path: &Path) -> SqliteConnectOptions {
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

/// Where transactions come from: one after the other, on a connection that is opened again when it broke.
pub(super) struct Sessions {
    options: SqliteConnectOptions,
    begin: &'static str,
    instance: Instance,
    writer: Arc<Mutex<Option<Writer>>>,
    output_ids: Arc<OutputIds>,
}

impl Sessions {
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        let output_ids = Arc::new(OutputIds::with_random_key());
        Sessions {
            options,
            begin: "begin immediate",
            instance: Instance::new(),
            writer: Arc::default(),
            output_ids,
        }
    }

    /// The same, with the ids of the installation.
    pub(super) fn with_output_ids(self, output_ids: Arc<OutputIds>) -> Self {
        Sessions { output_ids, ..self }
    }

    /// For transactions that can but read; they do not wait for those that write.
    pub(super) fn reading(options: SqliteConnectOptions) -> Self {
        Sessions {
            begin: "begin",
            ..Sessions::new(options.read_only(true))
        }
    }

    /// Waits for the transaction before and begins one.
    pub(super) async fn begin(&self) -> Result<Session> {
        self.begin_with_callback(|| ()).await
    }

    /// Like [`Sessions::begin`]; tells when the transactions before are over.
    pub(super) async fn begin_with_callback<T>(
        &self,
        on_acquired: impl FnOnce() -> T,
    ) -> Result<Session> {
        let mut slot = Arc::clone(&self.writer).lock_owned().await;
        on_acquired();
        if slot.is_none() {
            let writer = Writer::open(&self.options).await;
            *slot = Some(writer.map_err(|error| errors::from_statement(error, "open SQLite"))?);
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
            .map_err(|error| errors::from_statement(error, "begin a transaction"))?;
        Ok(session)
    }

    pub(super) async fn close(&self) {
        if let Some(writer) = self.writer.lock().await.take() {
            // Whatever it says, the file is as it was after the last commit.
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

/// What SQLite asks while it works.
struct Hooks {
    /// Whether the house is committing. A statement that commits at any other time is a guest's that left its
    /// transaction, and fails.
    may_commit: AtomicBool,
    opened: Instant,
    /// When the guest's statement that runs has to end, in microseconds since `opened`; zero when none runs.
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

/// An open transaction. Dropped before it is finished, it closes the connection, and with it the transaction.
pub(super) struct Session {
    slot: OwnedMutexGuard<Option<Writer>>,
    instance: Instance,
    output_ids: Arc<OutputIds>,
    finished: bool,
}

impl Session {
    /// The ids under which outputs travel.
    pub(super) fn output_ids(&self) -> Arc<OutputIds> {
        Arc::clone(&self.output_ids)
    }

    async fn begin(&mut self, begin: &'static str) -> sqlx::Result<()> {
        raw_sql(begin).execute(self.connection()?).await?;
        Ok(())
    }

    /// The instance that leases what is appended.
    pub(super) fn instance(&self) -> i64 {
        self.instance.id()
    }

    pub(super) fn connection(&mut self) -> sqlx::Result<&mut SqliteConnection> {
        self.slot
            .as_mut()
            .map(|writer| &mut writer.connection)
            .ok_or(sqlx::Error::WorkerCrashed)
    }

    /// From now on a statement that takes longer than `time` is interrupted; none for statements of our own.
    fn limit_time(&self, time: Option<Duration>) {
        if let Some(Writer { hooks, .. }) = self.slot.as_ref() {
            let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            let deadline = time.map_or(0, |time| {
                hooks.elapsed_micros().saturating_add(micros(time)).max(1)
            });
            hooks.deadline.store(deadline, Ordering::Release);
        }
    }

    /// The statements from here on are a guest's: SQLite refuses what is not for guests, and interrupts what takes longer
    /// than `time`.
    pub(super) async fn begin_guest_statement(&mut self, time: Duration) -> Result<()> {
        let writer = self.slot.as_mut().ok_or(sqlx::Error::WorkerCrashed);
        let admitted = async {
            let writer = writer?;
            writer
                .authorizer
                .activate(&mut writer.connection.lock_handle().await?);
            Ok(())
        };
        admitted.await.map_err(|error: sqlx::Error| {
            errors::from_statement(error, "raise the wall around guests")
        })?;
        self.limit_time(Some(time));
        Ok(())
    }

    /// The statements from here on are the house's. Waits for what the guest's statement still does, and returns
    /// whether the transaction is still open.
    pub(super) async fn end_guest_statement(&mut self) -> Result<bool> {
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
            errors::from_statement(error, "lower the wall around guests")
        })
    }

    /// Runs statements of our own that bring nothing back.
    pub(super) async fn run(&mut self, statements: String, context: &'static str) -> Result<()> {
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

    /// Statements that were prepared before a migration changed the tables must not be used again.
    pub(super) async fn clear_statement_cache(&mut self) -> sqlx::Result<()> {
        self.connection()?.clear_cached_statements().await
    }

    /// Commits. SQLite says so itself when there is no transaction any more.
    pub(super) async fn commit(mut self) -> Result<()> {
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

    /// Rolls back; when that fails, for another reason than that SQLite did so before, the connection is closed.
    pub(super) async fn rollback(mut self) {
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
