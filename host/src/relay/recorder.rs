//! Recorder: writes the outcomes of outputs to the database. One write is in progress at a time,
//! and the next one includes all outcomes since then.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::key_queues::Key;
use super::wal::WalOutcome;
use crate::fault;
use crate::model::retry::Backoff;
use crate::store::{GroupOutcome, OutboxRow, Published, Store, Unpublished};

/// Maximum number of tries of a write. After that the leases of its outputs expire, and the next
/// host finds the published ones on their streams.
const TRIES_MAX: u32 = 5;

/// Outcomes that are not in the database yet.
pub struct Recorder {
    store: Arc<Store>,
    published: Vec<Published>,
    unpublished: Vec<(i64, Unpublished)>,
    closed_groups: Vec<GroupOutcome>,
    writing: Option<JoinHandle<()>>,
    groups: OpenGroups,
    wal: WalRecorder,
}

/// Groups that have outputs without an outcome.
#[derive(Default)]
struct OpenGroups {
    /// For each output without an outcome, the number of its group.
    members: HashMap<i64, i64>,
    groups: HashMap<i64, OpenGroup>,
}

#[derive(Default)]
struct OpenGroup {
    published: Vec<Published>,
    unpublished: Vec<(i64, Unpublished)>,
    /// The number of outputs without an outcome.
    left: usize,
}

/// Outputs from the WAL. The WAL reader records their outcomes.
struct WalRecorder {
    /// Outputs in memory, with their keys.
    keys: HashMap<i64, Option<Key>>,
    outcomes: mpsc::UnboundedSender<WalOutcome>,
    /// Number of outputs left to the poller so far.
    unpublished: u64,
    /// By key, the output that later ones have to wait for, and its number. Kept until recorded.
    blocked_keys: HashMap<Key, (i64, u64)>,
}

impl Recorder {
    pub fn new(store: Arc<Store>, outcomes: mpsc::UnboundedSender<WalOutcome>) -> Self {
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
            closed_groups: Vec::new(),
            writing: None,
            groups: OpenGroups::default(),
            wal,
        }
    }

    /// Adds a published output.
    pub fn published(&mut self, published: Published) {
        if self.wal.keys.remove(&published.seq).is_some() {
            // Without a reader the outcome is lost, and the next reader receives the output again.
            drop(self.wal.outcomes.send(WalOutcome::Published(published)));
        } else if let Some(number) = self.groups.take(published.seq) {
            let closed = self
                .groups
                .add(number, |group| group.published.push(published));
            self.closed_groups.extend(closed);
        } else {
            self.published.push(published);
        }
    }

    /// Adds outputs that were not published.
    pub fn unpublished(&mut self, rows: impl IntoIterator<Item = (i64, Unpublished)>) {
        for (seq, outcome) in rows {
            if let Some(key) = self.wal.keys.remove(&seq) {
                self.wal.unpublished(seq, key, outcome);
            } else if let Some(number) = self.groups.take(seq) {
                let closed = self
                    .groups
                    .add(number, |group| group.unpublished.push((seq, outcome)));
                self.closed_groups.extend(closed);
            } else {
                self.unpublished.push((seq, outcome));
            }
        }
    }

    /// Tracks the outputs that belong to a group, by their numbers and that of the group. All
    /// outputs of a group are tracked at once.
    pub fn track_groups(&mut self, members: &[(i64, i64)]) {
        for (seq, number) in members {
            self.groups.track(*seq, *number);
        }
    }

    /// Lets all outcomes so far be written, also those of groups with outputs in memory. The latter
    /// leave their groups.
    pub fn dissolve_groups(&mut self) {
        self.closed_groups.extend(self.groups.dissolve());
    }

    /// Tracks an output from the WAL. Returns its blocker if earlier outputs of its key were
    /// released and that may not be recorded yet.
    pub fn track(&mut self, seq: i64, key: Option<Key>) -> Option<i64> {
        let before = key
            .as_ref()
            .and_then(|key| self.wal.blocked_keys.get(key))
            .map(|(seq, _)| *seq);
        self.wal.keys.insert(seq, key);
        before
    }

    /// Whether an output in memory came from the WAL.
    pub fn is_from_wal(&self, seq: i64) -> bool {
        self.wal.keys.contains_key(&seq)
    }

    /// Whether an output in memory needs an outcome in any case, because it has no lease of its own
    /// that ends.
    pub fn needs_outcome(&self, seq: i64) -> bool {
        self.is_from_wal(seq) || self.groups.members.contains_key(&seq)
    }

    /// Polling outcomes are recorded up to this number, or all of them for a new reader.
    pub fn on_recorded(&mut self, recorded: u64, is_first: bool) {
        self.wal
            .blocked_keys
            .retain(|_, (_, number)| !is_first && *number > recorded);
    }

    /// Whether all outcomes are in the database.
    pub fn is_empty(&self) -> bool {
        !self.has_outcomes() && !self.groups.have_outcomes() && self.writing.is_none()
    }

    /// Whether a write is in progress.
    pub fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    fn has_outcomes(&self) -> bool {
        !(self.published.is_empty() && self.unpublished.is_empty() && self.closed_groups.is_empty())
    }

    /// Starts to write the collected outcomes, unless a write is in progress. Returns whether it
    /// did. It runs in a task of its own, because a database operation must run to completion.
    pub fn start_write(&mut self) -> bool {
        if self.is_writing() || !self.has_outcomes() {
            return false;
        }
        self.writing = Some(tokio::spawn(record(
            Arc::clone(&self.store),
            std::mem::take(&mut self.published),
            std::mem::take(&mut self.closed_groups),
            std::mem::take(&mut self.unpublished),
        )));
        true
    }

    /// Waits for the write in progress.
    pub async fn written(&mut self) {
        if let Some(writing) = &mut self.writing {
            let _ = writing.await;
        }
        self.writing = None;
    }
}

/// The outputs that belong to a group, with the number of the group.
pub fn members(rows: &[OutboxRow]) -> Vec<(i64, i64)> {
    rows.iter()
        .filter_map(|row| Some((row.seq, row.group?)))
        .collect()
}

impl OpenGroups {
    fn track(&mut self, seq: i64, number: i64) {
        // It is still in memory if its lease ended and this host leased it again.
        if self.members.insert(seq, number).is_none() {
            self.groups.entry(number).or_default().left += 1;
        }
    }

    /// Removes an output without an outcome. Returns the number of its group.
    fn take(&mut self, seq: i64) -> Option<i64> {
        self.members.remove(&seq)
    }

    /// Adds the outcome of an output that was taken. Returns the outcome of the group if it was the
    /// last one.
    fn add(&mut self, number: i64, outcome: impl FnOnce(&mut OpenGroup)) -> Option<GroupOutcome> {
        let group = self.groups.get_mut(&number)?;
        outcome(group);
        group.left -= 1;
        if group.left > 0 {
            return None;
        }
        Some(self.groups.remove(&number)?.close(number, Vec::new()))
    }

    /// Whether some outputs of an open group have an outcome.
    fn have_outcomes(&self) -> bool {
        self.groups.values().any(OpenGroup::has_outcomes)
    }

    /// Removes the groups that have outcomes.
    fn dissolve(&mut self) -> Vec<GroupOutcome> {
        if !self.have_outcomes() {
            return Vec::new();
        }
        let dissolved: HashMap<i64, OpenGroup> = self
            .groups
            .extract_if(|_, group| group.has_outcomes())
            .collect();
        let mut leased: HashMap<i64, Vec<i64>> = HashMap::new();
        let members = self
            .members
            .extract_if(|_, number| dissolved.contains_key(number));
        for (seq, number) in members {
            leased.entry(number).or_default().push(seq);
        }
        let outcome = |(number, group): (i64, OpenGroup)| {
            group.close(number, leased.remove(&number).unwrap_or_default())
        };
        dissolved.into_iter().map(outcome).collect()
    }
}

impl OpenGroup {
    fn has_outcomes(&self) -> bool {
        !(self.published.is_empty() && self.unpublished.is_empty())
    }

    fn close(self, number: i64, leased: Vec<i64>) -> GroupOutcome {
        GroupOutcome {
            number,
            published: self.published,
            unpublished: self.unpublished,
            leased,
        }
    }
}

impl WalRecorder {
    fn unpublished(&mut self, seq: i64, key: Option<Key>, outcome: Unpublished) {
        self.unpublished += 1;
        if let Some(key) = key {
            // All outputs with the same blocker continue together.
            let first = if let Unpublished::BlockedBy(first) = outcome {
                first
            } else {
                seq
            };
            self.blocked_keys.insert(key, (first, self.unpublished));
        }
        drop(self.outcomes.send(WalOutcome::Poll {
            seq,
            outcome,
            number: self.unpublished,
        }));
    }
}

async fn record(
    store: Arc<Store>,
    published: Vec<Published>,
    groups: Vec<GroupOutcome>,
    unpublished: Vec<(i64, Unpublished)>,
) {
    log_errors(groups.iter().flat_map(|group| &group.unpublished));
    log_errors(&unpublished);
    if !published.is_empty() {
        fault::point(fault::BEFORE_MARK);
        retry("record published outputs", || {
            store.mark_published(&published)
        })
        .await;
        fault::point(fault::AFTER_MARK);
    }
    if !groups.is_empty() {
        fault::point(fault::BEFORE_MARK);
        retry("record groups of outputs", || store.record_groups(&groups)).await;
        fault::point(fault::AFTER_MARK);
    }
    if !unpublished.is_empty() {
        fault::point(fault::BEFORE_RELEASE);
        retry("release unpublished outputs", || {
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
            Err(error) => tracing::warn!(
                operation = what,
                error = format!("{:#}", anyhow::Error::from(error)),
                "failed to record outputs, retrying"
            ),
        }
        tokio::time::sleep(backoff.next(rand::random())).await;
    }
}

/// Logs each distinct error once, with the number of its outputs.
pub fn log_errors<'a>(unpublished: impl IntoIterator<Item = &'a (i64, Unpublished)>) {
    let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, outcome) in unpublished {
        if let Unpublished::Later {
            error: Some(error), ..
        } = outcome
        {
            *errors.entry(error).or_default() += 1;
        }
    }
    for (error, count) in errors {
        tracing::warn!(count, error, "publish failed, retrying");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(seq: i64) -> Published {
        Published {
            seq,
            stream: "OUT".to_owned(),
            stream_sequence: 7,
        }
    }

    fn groups(members: &[(i64, i64)]) -> OpenGroups {
        let mut groups = OpenGroups::default();
        for (seq, number) in members {
            groups.track(*seq, *number);
        }
        groups
    }

    fn publish(groups: &mut OpenGroups, seq: i64) -> Option<GroupOutcome> {
        let number = groups.take(seq)?;
        groups.add(number, |group| group.published.push(place(seq)))
    }

    #[test]
    fn a_group_is_closed_with_its_last_outcome() {
        let mut groups = groups(&[(1, 1), (2, 1), (3, 3)]);
        assert_eq!(publish(&mut groups, 2), None);
        assert!(groups.have_outcomes());
        let closed = publish(&mut groups, 1).expect("the last outcome");
        assert_eq!(closed.number, 1);
        assert_eq!(closed.published, [place(2), place(1)]);
        assert!(!groups.have_outcomes());
        assert_eq!(publish(&mut groups, 1), None, "no second outcome");
    }

    #[test]
    fn a_group_that_is_leased_again_waits_for_each_output_once() {
        let mut groups = groups(&[(1, 1), (2, 1)]);
        assert_eq!(publish(&mut groups, 1), None);
        groups.track(1, 1);
        groups.track(2, 1);
        assert_eq!(publish(&mut groups, 2), None);
        assert!(publish(&mut groups, 1).is_some());
        assert!(groups.members.is_empty() && groups.groups.is_empty());
    }

    #[test]
    fn only_groups_with_outcomes_are_dissolved() {
        let mut groups = groups(&[(1, 1), (2, 1), (3, 3), (4, 3)]);
        assert_eq!(groups.dissolve(), []);
        assert_eq!(publish(&mut groups, 1), None);
        let dissolved = groups.dissolve();
        let expected = GroupOutcome {
            number: 1,
            published: vec![place(1)],
            unpublished: Vec::new(),
            leased: vec![2],
        };
        assert_eq!(dissolved, [expected]);
        assert_eq!(groups.take(2), None, "it has a lease of its own now");
        assert_eq!(publish(&mut groups, 3), None);
        assert!(publish(&mut groups, 4).is_some());
    }
}
