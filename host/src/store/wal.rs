//! The database's log as a source of outputs: how they go, and where the one host is that reads it. PostgreSQL alone has one.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{OutboxRow, Published, Result, Unpublished};

/// A place in the log, in bytes since its beginning.
pub type Lsn = u64;

/// How new outputs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RelayMode {
    /// Hosts lease rows and mark them.
    Poll,
    /// Still by polling; a slot is being made.
    Entering,
    /// One host reads them from the log.
    Wal,
    /// By polling again; what is in the log is brought over.
    Leaving,
}

/// How outputs go and how far the reader of the log is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WalState {
    pub mode: RelayMode,
    /// What the log was left for, when that was not asked for.
    pub fallback_reason: Option<String>,
    /// Age of the oldest output that is in the log and not known to be published; zero when there is none.
    pub lag: Duration,
    /// None when nothing goes by the log and nothing is left of its slot.
    pub slot: Option<SlotState>,
}

/// The replication slot, which keeps the log until it is read.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SlotState {
    /// Whether some host reads.
    pub active: bool,
    /// How much of the log the server keeps for it, in bytes, and how much it may until the log is given up.
    pub retained: u64,
    pub retained_max: u64,
    /// The server has removed what was not read yet.
    pub lost: bool,
}

/// What a step towards the mode that is asked for came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwitchProgress {
    /// Nothing is left to do.
    Done,
    /// There is more to do at once.
    More,
    /// There is more to do once others have ended what they do.
    Wait,
}

/// What the log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalEvent {
    /// An output of a transaction that has committed, and that transaction's number in 32 bits. Others may see neither yet.
    Output { row: OutboxRow, transaction: u32 },
    /// All outputs of a transaction were told.
    Committed { end: Lsn, at: Timestamp },
    /// Whatever committed before was told.
    Passed(Lsn),
}

/// What the reader writes down: in one transaction, so that all outputs before the position are accounted for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalRecord {
    /// Whatever committed before is published, or goes by polling from now on.
    pub position: Lsn,
    /// The same in numbers and in time, as far as they are known.
    pub through: Option<i64>,
    pub until: Option<Timestamp>,
    pub published: Vec<Published>,
    pub released: Vec<(i64, Unpublished)>,
}

/// What is true of the database at a moment, so that the reader can tell later what it has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalSnapshot {
    pub at: Timestamp,
    /// The end of the log.
    pub end: Lsn,
    /// The highest number that an output was given.
    pub last_output: i64,
    /// All transactions before this one have ended.
    pub ended: u64,
    /// All transactions from this one on began later.
    pub next: u64,
}

/// The log as the relay uses it. Every host has one; one of them reads.
#[async_trait]
pub trait OutputWal: Send + Sync + 'static {
    /// Whether the server lets this host read the log; an error says what to do. Nothing is changed.
    async fn check(&self) -> anyhow::Result<()>;

    /// Asks for outputs to go by the log, or by polling. Hosts get there with [`OutputWal::step`].
    async fn request_mode(&self, use_wal: bool) -> Result<()>;

    /// How outputs go now.
    async fn state(&self) -> Result<WalState>;

    /// Takes one step towards what is asked for. All hosts may do so at the same time.
    async fn step(&self) -> Result<SwitchProgress>;

    /// Gives the log up: outputs go by polling until somebody asks for the log again. Returns whether they did not before.
    async fn fall_back(&self, why: &str) -> Result<bool>;

    /// Becomes the reader; none while another host is, or when nothing goes by the log.
    async fn become_reader(&self) -> Result<Option<Box<dyn WalReader>>>;

    /// For each of these outputs with a key the one to wait for, if others of its key that go by polling are in line before it.
    /// None while some of these transactions, which are the outputs', cannot be seen by everybody yet.
    async fn blocked_by(
        &self,
        rows: &[OutboxRow],
        transactions: &[u32],
    ) -> Result<Option<Vec<Option<i64>>>>;
}

/// The one connection that reads the log. Who drops it is no longer the reader.
#[async_trait]
pub trait WalReader: Send {
    /// The next thing the log says, in the order of the commits. May be dropped while it waits.
    async fn next(&mut self) -> Result<WalEvent>;

    /// Writes down how far this reader is, and lets the server remove its log up to there. None when another host has
    /// become the reader, or nothing goes by the log any more: then nothing is written.
    async fn record(&mut self, record: &WalRecord) -> Result<Option<WalSnapshot>>;
}
