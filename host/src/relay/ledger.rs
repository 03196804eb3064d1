//! The ledger: what became of outputs, on its way into the database. One record is under way at a time, and takes along
//! all that has gathered since the one before.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::fault;
use crate::retry::Backoff;
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
}

impl Ledger {
    pub fn new(store: Arc<dyn Store>) -> Self {
        Ledger { store, published: Vec::new(), back: Vec::new(), writing: None }
    }

    pub fn published(&mut self, place: Published) {
        self.published.push(place);
    }

    pub fn put_back(&mut self, rows: impl IntoIterator<Item = (i64, Unpublished)>) {
        self.back.extend(rows);
    }

    /// Whether everything is in the database.
    pub fn is_empty(&self) -> bool {
        self.published.is_empty() && self.back.is_empty() && self.writing.is_none()
    }

    pub fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Begins to write what has gathered, unless a record is under way. A task of its own: no operation of the database
    /// is dropped half-way.
    pub fn write(&mut self) {
        if self.is_writing() || (self.published.is_empty() && self.back.is_empty()) {
            return;
        }
        let (published, back) = (std::mem::take(&mut self.published), std::mem::take(&mut self.back));
        self.writing = Some(tokio::spawn(record(Arc::clone(&self.store), published, back)));
    }

    /// Waits for the record that is under way.
    pub async fn written(&mut self) {
        if let Some(writing) = &mut self.writing {
            let _ = writing.await;
        }
        self.writing = None;
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
fn tell(back: &[(i64, Unpublished)]) {
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
