//! The ledger: what became of outputs, on its way into the database. One record is under way at a time, and takes along
//! all that has gathered since the one before.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::ordering::Key;
use super::wal::Outcome;
use crate::fault;
use crate::model::retry::Backoff;
use crate::store::{Published, Store, Unpublished};

/// How often a record is tried. After that the leases of its outputs run out, and whoever has them next finds them on
/// their streams.
const TRIES_MAX: u32 = 5;

/// What is not in the database yet.
pub struct Ledger {
    store: Arc<dyn Store>,
    published: Vec<Published>,
    back: Vec<(i64, Unpublished)>,
    writing: Option<JoinHandle<()>>,
    from_log: FromLog,
}

/// Outputs that came from the database's log. Whoever reads it writes down what becomes of them.
struct FromLog {
    /// Those in memory, with their keys.
    keys: HashMap<i64, Option<Key>>,
    outcomes: mpsc::UnboundedSender<Outcome>,
    /// How many were to go by polling so far; and of each key whom others are to wait for, as long as the database may not know.
    back: u64,
    in_trouble: HashMap<Key, (i64, u64)>,
}

impl Ledger {
    pub fn new(store: Arc<dyn Store>, outcomes: mpsc::UnboundedSender<Outcome>) -> Self {
        let from_log = FromLog { keys: HashMap::new(), outcomes, back: 0, in_trouble: HashMap::new() };
        Ledger { store, published: Vec::new(), back: Vec::new(), writing: None, from_log }
    }

    pub fn published(&mut self, place: Published) {
        match self.from_log.keys.remove(&place.seq) {
            // If nobody reads any more, the next one is told again.
            Some(_) => drop(self.from_log.outcomes.send(Outcome::Published(place))),
            None => self.published.push(place),
        }
    }

    pub fn put_back(&mut self, rows: impl IntoIterator<Item = (i64, Unpublished)>) {
        for (seq, how) in rows {
            match self.from_log.keys.remove(&seq) {
                Some(key) => self.from_log.put_back(seq, key, how),
                None => self.back.push((seq, how)),
            }
        }
    }

    /// An output from the log is here. Returns whom it has to wait for, if others of its key were put back and the database may not know.
    pub fn admit(&mut self, seq: i64, key: Option<Key>) -> Option<i64> {
        let before = key.as_ref().and_then(|key| self.from_log.in_trouble.get(key)).map(|(seq, _)| *seq);
        self.from_log.keys.insert(seq, key);
        before
    }

    pub fn is_from_log(&self, seq: i64) -> bool {
        self.from_log.keys.contains_key(&seq)
    }

    /// The database knows which outputs from the log go by polling, up to a number; or all of them, to a new reader.
    pub fn knows(&mut self, recorded: u64, is_first: bool) {
        self.from_log.in_trouble.retain(|_, (_, number)| !is_first && *number > recorded);
    }

    /// Whether everything is in the database.
    pub fn is_empty(&self) -> bool {
        self.published.is_empty() && self.back.is_empty() && self.writing.is_none()
    }

    pub fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Begins to write what has gathered, unless a record is under way, and returns whether it did. A task of its own: no
    /// operation of the database is dropped half-way.
    pub fn write(&mut self) -> bool {
        if self.is_writing() || (self.published.is_empty() && self.back.is_empty()) {
            return false;
        }
        let (published, back) = (std::mem::take(&mut self.published), std::mem::take(&mut self.back));
        self.writing = Some(tokio::spawn(record(Arc::clone(&self.store), published, back)));
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

impl FromLog {
    fn put_back(&mut self, seq: i64, key: Option<Key>, how: Unpublished) {
        self.back += 1;
        if let Some(key) = key {
            // All that wait for the same go on together.
            let first = if let Unpublished::Behind(first) = how { first } else { seq };
            self.in_trouble.insert(key, (first, self.back));
        }
        drop(self.outcomes.send(Outcome::Back { seq, how, number: self.back }));
    }
}

async fn record(store: Arc<dyn Store>, published: Vec<Published>, back: Vec<(i64, Unpublished)>) {
    tell(&back);
    if !published.is_empty() {
        fault::point(fault::BEFORE_MARK);
        insist("published outputs not marked", || store.mark_published(&published)).await;
        fault::point(fault::AFTER_MARK);
    }
    if !back.is_empty() {
        fault::point(fault::BEFORE_PUT_BACK);
        insist("outputs not put back", || store.put_back_outputs(&back)).await;
    }
}

async fn insist<F, Fut>(what: &str, operation: F)
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
pub fn tell(back: &[(i64, Unpublished)]) {
    let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, how) in back {
        if let Unpublished::Later { error: Some(error), .. } = how {
            *errors.entry(error).or_default() += 1;
        }
    }
    for (error, count) in errors {
        tracing::warn!("{count} outputs not published, again in a while: {error}");
    }
}
