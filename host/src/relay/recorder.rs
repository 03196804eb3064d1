//! The recorder: what became of outputs, on its way into the database. One record is under way at a time, and takes along
//! all that has gathered since the one before.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::key_queues::Key;
use super::wal::WalOutcome;
use crate::fault;
use crate::model::retry::Backoff;
use crate::store::{Published, Store, Unpublished};

/// How often a record is tried. After that the leases of its outputs run out, and whoever has them next finds them on
/// their streams.
const TRIES_MAX: u32 = 5;

/// What is not in the database yet.
pub struct Recorder {
    store: Arc<dyn Store>,
    published: Vec<Published>,
    unpublished: Vec<(i64, Unpublished)>,
    writing: Option<JoinHandle<()>>,
    wal: WalRecorder,
}

/// Outputs that came from the database's log. Whoever reads it writes down what becomes of them.
struct WalRecorder {
    /// Those in memory, with their keys.
    keys: HashMap<i64, Option<Key>>,
    outcomes: mpsc::UnboundedSender<WalOutcome>,
    /// How many were to go by polling so far; and of each key whom others are to wait for, as long as the database may not know.
    unpublished: u64,
    blocked_keys: HashMap<Key, (i64, u64)>,
}

impl Recorder {
    pub fn new(store: Arc<dyn Store>, outcomes: mpsc::UnboundedSender<WalOutcome>) -> Self {
        let wal = WalRecorder {
            keys: HashMap::new(),
            outcomes,
            unpublished: 0,
            blocked_keys: HashMap::new(),
        };
        Recorder {
            store,
            published: Vec::new(),
            unpublished: Vec::new(),
            writing: None,
            wal,
        }
    }

    pub fn published(&mut self, place: Published) {
        match self.wal.keys.remove(&place.seq) {
            // If nobody reads any more, the next one is told again.
            Some(_) => drop(self.wal.outcomes.send(WalOutcome::Published(place))),
            None => self.published.push(place),
        }
    }

    pub fn unpublished(&mut self, rows: impl IntoIterator<Item = (i64, Unpublished)>) {
        for (seq, how) in rows {
            match self.wal.keys.remove(&seq) {
                Some(key) => self.wal.unpublished(seq, key, how),
                None => self.unpublished.push((seq, how)),
            }
        }
    }

    /// An output from the log is here. Returns whom it has to wait for, if others of its key were put back and the database may not know.
    pub fn track(&mut self, seq: i64, key: Option<Key>) -> Option<i64> {
        let before = key
            .as_ref()
            .and_then(|key| self.wal.blocked_keys.get(key))
            .map(|(seq, _)| *seq);
        self.wal.keys.insert(seq, key);
        before
    }

    pub fn is_from_wal(&self, seq: i64) -> bool {
        self.wal.keys.contains_key(&seq)
    }

    /// The database knows which outputs from the log go by polling, up to a number; or all of them, to a new reader.
    pub fn on_recorded(&mut self, recorded: u64, is_first: bool) {
        self.wal
            .blocked_keys
            .retain(|_, (_, number)| !is_first && *number > recorded);
    }

    /// Whether everything is in the database.
    pub fn is_empty(&self) -> bool {
        self.published.is_empty() && self.unpublished.is_empty() && self.writing.is_none()
    }

    pub fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Begins to write what has gathered, unless a record is under way, and returns whether it did. A task of its own: no
    /// operation of the database is dropped half-way.
    pub fn start_write(&mut self) -> bool {
        if self.is_writing() || (self.published.is_empty() && self.unpublished.is_empty()) {
            return false;
        }
        let (published, unpublished) = (
            std::mem::take(&mut self.published),
            std::mem::take(&mut self.unpublished),
        );
        self.writing = Some(tokio::spawn(record(
            Arc::clone(&self.store),
            published,
            unpublished,
        )));
        true
    }

    /// Waits for the record that is under way.
    pub async fn written(&mut self) {
        if let Some(writing) = &mut self.writing {
            let _ = writing.await;
        }
        self.writing = None;
    }
}

impl WalRecorder {
    fn unpublished(&mut self, seq: i64, key: Option<Key>, how: Unpublished) {
        self.unpublished += 1;
        if let Some(key) = key {
            // All that wait for the same go on together.
            let first = if let Unpublished::BlockedBy(first) = how {
                first
            } else {
                seq
            };
            self.blocked_keys.insert(key, (first, self.unpublished));
        }
        drop(self.outcomes.send(WalOutcome::Poll {
            seq,
            how,
            number: self.unpublished,
        }));
    }
}

async fn record(
    store: Arc<dyn Store>,
    published: Vec<Published>,
    unpublished: Vec<(i64, Unpublished)>,
) {
    log_errors(&unpublished);
    if !published.is_empty() {
        fault::point(fault::BEFORE_MARK);
        retry("published outputs not marked", || {
            store.mark_published(&published)
        })
        .await;
        fault::point(fault::AFTER_MARK);
    }
    if !unpublished.is_empty() {
        fault::point(fault::BEFORE_RELEASE);
        retry("unpublished outputs not recorded", || {
            store.release_outputs(&unpublished)
        })
        .await;
    }
}

async fn retry<F, Fut>(what: &str, operation: F)
where
    F: Fn() -> Fut,
    Fut: Future<Output = crate::store::Result<()>>,
{
    let mut backoff = Backoff::default();
    for _ in 0..TRIES_MAX {
        match operation().await {
            Ok(()) => return,
            Err(error) => tracing::warn!("{what} yet: {:#}", anyhow::Error::from(error)),
        }
        tokio::time::sleep(backoff.next(rand::random())).await;
    }
}

/// One line for each error, however many outputs met it.
pub fn log_errors(unpublished: &[(i64, Unpublished)]) {
    let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, how) in unpublished {
        if let Unpublished::Later {
            error: Some(error), ..
        } = how
        {
            *errors.entry(error).or_default() += 1;
        }
    }
    for (error, count) in errors {
        tracing::warn!("{count} outputs not published, again in a while: {error}");
    }
}
