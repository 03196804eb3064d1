//! The write-ahead log (WAL) as a source of outputs: the relay mode and the reader. PostgreSQL
//! only.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{OutboxRow, Published, Result, Unpublished};

/// A position in the WAL, in bytes since its beginning.
pub type Lsn = u64;

/// How new outputs are published.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum RelayMode {
    /// Hosts lease outbox rows and record their publication.
    Poll,
    /// Still polling; the replication slot is being created.
    Entering,
    /// One host, the reader, reads outputs from the WAL.
    Wal,
    /// Polling again; unpublished outputs in the WAL are moved over.
    Leaving,
}

/// The relay mode and the progress of the WAL reader.
#[derive(
    Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub struct WalState {
    /// The current mode; `Entering` and `Leaving` last until the switch is done.
    pub mode: RelayMode,
    /// Why WAL mode was left without a request.
    pub fallback_reason: Option<String>,
    /// Age of the oldest output in the WAL that is not known to be published; zero if there is
    /// none.
    pub lag: Duration,
    /// `None` if polling is used and no slot is left over.
    pub slot: Option<SlotState>,
}

/// The replication slot. The server retains WAL until the slot has been read.
#[derive(
    Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
pub struct SlotState {
    /// Whether a host is reading it.
    pub active: bool,
    /// WAL that the server retains for the slot, in bytes.
    pub retained: u64,
    /// The limit of `retained`. Above it, hosts fall back to polling.
    pub retained_max: u64,
    /// Whether the server has removed WAL that was not read yet.
    pub lost: bool,
}

/// The result of a step towards the requested mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwitchProgress {
    /// The mode is reached.
    Done,
    /// The next step can follow at once.
    More,
    /// The next step must wait for transactions or for another host.
    Wait,
}

/// An event from the WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalEvent {
    /// An output of a committed transaction. Other sessions may not see either of them yet.
    Output {
        /// The output, as written by its transaction.
        row: Box<OutboxRow>,
        /// The lower 32 bits of the transaction's id.
        transaction: u32,
    },
    /// All outputs of a transaction were returned.
    Committed {
        /// The position after the commit.
        end: Lsn,
        /// When the transaction was committed, on the database's clock.
        at: Timestamp,
    },
    /// All transactions that committed before this position were returned.
    Passed(Lsn),
}

/// The progress of the reader. It is recorded in one transaction, so that no output before the
/// position is lost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalRecord {
    /// All outputs committed before it are published, or left to polling.
    pub position: Lsn,
    /// The same progress as an output number, if it is known.
    pub through: Option<i64>,
    /// The same progress as a time, if it is known.
    pub until: Option<Timestamp>,
    /// Outputs stored on their streams since the last record.
    pub published: Vec<Published>,
    /// Numbers of outputs that are left to polling, and how to release each.
    pub released: Vec<(i64, Unpublished)>,
}

/// The state of the database at one moment, for a later check of which outputs the reader has
/// passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalSnapshot {
    /// The time of the snapshot, on the database's clock.
    pub at: Timestamp,
    /// The end of the WAL.
    pub end: Lsn,
    /// The highest output number so far.
    pub last_output: i64,
    /// All transactions before this one have ended.
    pub ended: u64,
    /// All transactions from this one on started later.
    pub next: u64,
}

/// The WAL, as the relay uses it. Every host has one; one of the hosts is the reader.
#[async_trait]
pub trait OutputWal: Send + Sync + 'static {
    /// Checks that the server lets this host read the WAL, without a change to anything.
    ///
    /// # Errors
    /// The failed condition, with a hint.
    async fn check(&self) -> anyhow::Result<()>;

    /// Requests WAL mode or polling. Hosts switch to it by [`OutputWal::step`].
    async fn request_mode(&self, use_wal: bool) -> Result<()>;

    /// The current relay mode.
    async fn state(&self) -> Result<WalState>;

    /// Runs one step towards the requested mode. All hosts may run it concurrently.
    async fn step(&self) -> Result<SwitchProgress>;

    /// Leaves WAL mode: outputs are polled until WAL mode is requested again. Returns whether the
    /// mode changed.
    async fn fall_back(&self, why: &str) -> Result<bool>;

    /// Becomes the reader. `None` while another host is, or outside of WAL mode.
    async fn become_reader(&self) -> Result<Option<Box<dyn WalReader>>>;

    /// For each output, the polled output of its key that blocks it, if any. `None` while other
    /// sessions cannot see all of `transactions`, the outputs' transactions.
    async fn blocked_by(
        &self,
        rows: &[OutboxRow],
        transactions: &[u32],
    ) -> Result<Option<Vec<Option<i64>>>>;
}

/// The one connection that reads the WAL. Dropping it ends the role of the reader.
#[async_trait]
pub trait WalReader: Send {
    /// The next event, in commit order. This future may be dropped while it waits.
    async fn next(&mut self) -> Result<WalEvent>;

    /// Records the reader's progress and lets the server remove WAL up to there. `None` if another
    /// host has become the reader or WAL mode was left; nothing is recorded then.
    async fn record(&mut self, record: &WalRecord) -> Result<Option<WalSnapshot>>;
}
