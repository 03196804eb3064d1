//! The relay: publishes what committed.
//!
//! On the happy path committed outputs come from memory. What a crash, an outage or a delay left behind is found by a
//! sweep over what is due and unpublished; there is no cursor that could skip a row. Rows are leased in the database,
//! so that hosts do not publish the same row twice; the row is marked only with the broker's acknowledgement.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;

use crate::bus::{Bus, Outgoing, PublishError};
use crate::delivery::HAND_OVER_LEASE;
use crate::drain::Stopping;
use crate::fault;
use crate::redrive;
use crate::retry::Backoff;
use crate::store::{OutboxRow, Published, Store};

/// Batches of outputs that wait for the relay; lanes wait when it is full, so effects and publishing cannot drift apart.
const HAND_OVER_MAX: usize = 64;

/// How many outputs are published at a time.
const PUBLISH_MAX: usize = 1_000;

/// How often the sweep looks for what is due.
const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// A row first sent longer ago than this is looked up on its stream before it is sent again: the broker's own dedupe
/// window (two minutes unless the stream says otherwise) may be over.
const LOOK_UP_AFTER: Duration = Duration::from_secs(45);

/// What lanes hold of the relay. Cheap to clone.
#[derive(Clone)]
pub struct HandOver {
    sender: mpsc::Sender<Vec<OutboxRow>>,
}

impl HandOver {
    /// Hands committed outputs over; waits while the relay is behind. If the relay is gone, a sweep finds them.
    pub async fn hand_over(&self, outputs: Vec<OutboxRow>) {
        if !outputs.is_empty() {
            let _ = self.sender.send(outputs).await;
        }
    }
}

/// The one task that publishes.
pub struct Relay {
    store: Arc<dyn Store>,
    bus: Bus,
    handed_over: mpsc::Receiver<Vec<OutboxRow>>,
}

impl Relay {
    pub fn new(store: Arc<dyn Store>, bus: Bus) -> (Self, HandOver) {
        let (sender, handed_over) = mpsc::channel(HAND_OVER_MAX);
        (Relay { store, bus, handed_over }, HandOver { sender })
    }

    /// Runs until all lanes are gone and what they handed over is published. After `stopping` there are no more sweeps:
    /// what is not published stays in the outbox for the next host.
    pub async fn run(mut self, stopping: Stopping) {
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // What was handed over is ready to go; the sweep only looks for leftovers.
                biased;
                rows = self.next_handed_over() => match rows {
                    Some(rows) => self.publish(rows).await,
                    None => return,
                },
                _ = sweep.tick(), if !stopping.is_stopping() => self.sweep(&stopping).await,
            }
        }
    }

    /// All that has been handed over, up to one publication's worth.
    async fn next_handed_over(&mut self) -> Option<Vec<OutboxRow>> {
        let mut rows = self.handed_over.recv().await?;
        while rows.len() < PUBLISH_MAX
            && let Ok(more) = self.handed_over.try_recv()
        {
            rows.extend(more);
        }
        Some(rows)
    }

    /// Publishes what is due and leased to nobody, until nothing is left.
    async fn sweep(&mut self, stopping: &Stopping) {
        while self.bus.is_connected() && !stopping.is_stopping() {
            let mut rows = match self.store.lease_outputs(PUBLISH_MAX as u32, HAND_OVER_LEASE).await {
                Ok(rows) => rows,
                Err(error) => {
                    tracing::debug!("sweep again soon: {:#}", anyhow::Error::from(error));
                    return;
                }
            };
            let found = rows.len();
            if found > 0 {
                fault::point(fault::RELAY_LEASED);
            }
            rows.retain(|row| !(fault::mutant(fault::CURSOR_BY_SEQ) && fault::is_behind(row.seq)));
            self.publish(rows).await;
            if found < PUBLISH_MAX {
                return;
            }
        }
    }

    /// Publishes rows, marks those the broker acknowledged and gives the others back.
    async fn publish(&mut self, rows: Vec<OutboxRow>) {
        let rows = self.without_those_already_there(rows).await;
        if rows.is_empty() {
            return;
        }
        fault::point(fault::BEFORE_PUBLISH);
        if fault::mutant(fault::CURSOR_BY_SEQ) {
            for row in &rows {
                fault::is_behind(row.seq);
            }
        }
        if fault::mutant(fault::MARK_BEFORE_PUBACK) {
            let place = |row: &OutboxRow| Published { seq: row.seq, stream: String::new(), stream_sequence: 0 };
            self.mark(&rows.iter().map(place).collect::<Vec<_>>()).await;
        }
        let outgoing = rows.iter().map(outgoing).collect();
        let answers = self.bus.publish(outgoing).await;
        let mut published = Vec::new();
        let mut failed = Vec::new();
        for (row, answer) in rows.iter().zip(answers) {
            match answer {
                Ok(place) => {
                    if place.duplicate {
                        fault::witness(fault::DUPLICATE_OUTPUT);
                    }
                    published.push(Published { seq: row.seq, stream: place.stream, stream_sequence: place.sequence });
                }
                Err(error) => failed.push((row, error)),
            }
        }
        fault::point(fault::BEFORE_MARK);
        self.mark(&published).await;
        fault::point(fault::AFTER_MARK);
        self.give_back(&failed).await;
    }

    /// Looks up rows whose first sending is so long ago that the broker may have forgotten their ids.
    async fn without_those_already_there(&self, rows: Vec<OutboxRow>) -> Vec<OutboxRow> {
        let now = Timestamp::now();
        // A pointer leaves its stream when it is acknowledged, and a second one finds nothing to do.
        let is_old = |row: &OutboxRow| {
            now.duration_since(row.first_attempt_at).unsigned_abs() > LOOK_UP_AFTER
                && !redrive::is_pointer(&row.subject)
        };
        let (old, mut fresh): (Vec<OutboxRow>, Vec<OutboxRow>) = rows.into_iter().partition(is_old);
        let mut by_subject: HashMap<String, Vec<OutboxRow>> = HashMap::new();
        for row in old {
            by_subject.entry(row.subject.clone()).or_default().push(row);
        }
        let mut there = Vec::new();
        for (subject, rows) in by_subject {
            match self.look_up(&subject, &rows).await {
                Ok(places) => {
                    for row in rows {
                        match places.get(&row.id) {
                            Some(place) => there.push(Published { seq: row.seq, ..place.clone() }),
                            None => fresh.push(row),
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!("output to {subject} not published yet, looking it up failed: {error:#}");
                    let failed: Vec<_> =
                        rows.iter().map(|row| (row, PublishError::Unavailable(format!("{error:#}")))).collect();
                    self.give_back(&failed).await;
                }
            }
        }
        self.mark(&there).await;
        fresh.sort_by_key(|row| row.seq);
        fresh
    }

    /// Which of these rows stand on the stream of their subject already, by id.
    async fn look_up(&self, subject: &str, rows: &[OutboxRow]) -> anyhow::Result<HashMap<String, Published>> {
        let Some(stream) = self.bus.stream_of_subject(subject).await? else { return Ok(HashMap::new()) };
        let ids: HashSet<String> = rows.iter().map(|row| row.id.clone()).collect();
        let Some(since) = rows.iter().map(|row| row.first_attempt_at).min() else { return Ok(HashMap::new()) };
        // The broker's clock may be behind ours.
        let since = since - jiff::SignedDuration::from_mins(2);
        let found = self.bus.find_published(&stream, subject, since, &ids).await?;
        let place = |(id, sequence)| (id, Published { seq: 0, stream: stream.clone(), stream_sequence: sequence });
        Ok(found.into_iter().map(place).collect())
    }

    /// Marks rows as published. If the database is out of reach they are swept and sent again: within its window the
    /// broker knows them, beyond it they are looked up.
    async fn mark(&self, published: &[Published]) {
        if published.is_empty() {
            return;
        }
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            match self.store.mark_published(published).await {
                Ok(()) => return,
                Err(error) => tracing::warn!("published outputs not marked yet: {:#}", anyhow::Error::from(error)),
            }
            tokio::time::sleep(backoff.next(rand::random())).await;
        }
    }

    /// Gives rows back to the sweep, to be due again after a backoff by how often they failed.
    async fn give_back(&self, failed: &[(&OutboxRow, PublishError)]) {
        let mut groups: HashMap<(u32, String), Vec<i64>> = HashMap::new();
        for (row, error) in failed {
            groups.entry((row.failures.min(8), error.to_string())).or_default().push(row.seq);
        }
        for ((failures, error), seqs) in groups {
            let delay = Duration::from_millis(250) * 2_u32.pow(failures);
            tracing::warn!("{} outputs not published, again in {delay:?}: {error}", seqs.len());
            if let Err(error) = self.store.defer_outputs(&seqs, delay, &error).await {
                tracing::debug!("outputs not given back, their lease runs out: {:#}", anyhow::Error::from(error));
            }
        }
    }
}

fn outgoing(row: &OutboxRow) -> Outgoing {
    Outgoing { subject: row.subject.clone(), headers: row.headers.clone(), id: row.id.clone(), body: row.body.clone() }
}
