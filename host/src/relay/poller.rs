//! Poller: leases outputs that are due, and finds those that may already be on their streams.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};

use super::key_queues::SEND_TIMEOUT;
use super::{RelayState, duplicates, recorder, recovered};
use crate::bus::{Bus, StreamInfo, stream_for_subject};
use crate::delivery::HAND_OVER_LEASE;
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Published, Store, StoreError, Unpublished};

/// Maximum lag of the broker clock behind this one.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_mins(2);

/// The shortest dedupe window in which a stream recognizes an output whose acknowledgement is late.
pub const DUPLICATE_WINDOW_MIN: Duration = SEND_TIMEOUT.saturating_mul(2);

/// The result of a poll.
pub(super) struct OutputBatch {
    /// Outputs to send, in order.
    pub rows: Vec<OutboxRow>,
    /// All outputs that belong to a group, with its number.
    pub group_members: Vec<(i64, i64)>,
    /// A time before their leases began.
    pub since: Instant,
    /// Outputs that are already on their streams.
    pub already_published: Vec<Published>,
    pub unpublished: Vec<(i64, Unpublished)>,
    /// Whether the limit was reached, so that more outputs may be due.
    pub is_full: bool,
    /// The known streams. Empty when the server does not answer.
    pub streams: Arc<Vec<StreamInfo>>,
}

/// Leases up to `limit` outputs that are due and have no lease. A stream may have forgotten the id
/// of an earlier try. Such an output is searched there first, and sent only if it is missing.
///
/// # Errors
/// The database cannot be read or written.
pub(super) async fn poll(
    store: Arc<Store>,
    bus: Bus,
    metrics: Arc<Metrics>,
    state: Arc<RelayState>,
    limit: u32,
    streams_max_age: Duration,
) -> Result<OutputBatch, StoreError> {
    let since = Instant::now();
    let mut rows = store.lease_outputs(limit, HAND_OVER_LEASE).await?;
    let is_full = rows.len() >= limit as usize;
    if !rows.is_empty() {
        fault::point(fault::RELAY_LEASED);
    }
    // Before the lookup, because an output whose id is taken still blocks later ones of its key.
    OutboxRow::chain(&mut rows);
    // Without a list of streams the lookup is skipped. The broker then accepts hardly any output,
    // and an accepted one was first tried a short time ago.
    let streams = bus.streams(streams_max_age).await.unwrap_or_default();
    let group_members = recorder::members(&rows);
    let (rows, already_published) = recovered::split(&store, &state, rows).await?;
    let mut batch = OutputBatch {
        rows,
        group_members,
        since,
        already_published,
        unpublished: Vec::new(),
        is_full,
        streams,
    };
    batch.look_up_published(&bus, &metrics).await;
    Ok(batch)
}

impl OutputBatch {
    /// Searches the streams for outputs whose ids they may have forgotten.
    pub(super) async fn look_up_published(&mut self, bus: &Bus, metrics: &Metrics) {
        let streams = Arc::clone(&self.streams);
        let now = Timestamp::now();
        let mut by_stream: HashMap<String, Vec<OutboxRow>> = HashMap::new();
        for row in std::mem::take(&mut self.rows) {
            match stream_for_subject(&streams, &row.subject) {
                Some(stream) if is_old(&row, stream, now) => {
                    by_stream.entry(stream.name.clone()).or_default().push(row)
                }
                _ => self.rows.push(row),
            }
        }
        for (stream, rows) in by_stream {
            match look_up(bus, &stream, &rows).await {
                Ok(sequences) => {
                    self.sort_found(bus, &stream, rows, &sequences, metrics)
                        .await
                }
                Err(error) => self.retry_unchecked(&stream, &rows, &error, metrics),
            }
        }
        self.rows.sort_by_key(|row| row.seq);
    }

    /// Sorts rows after the lookup: missing ones are sent, and the others are compared with their
    /// stored messages.
    async fn sort_found(
        &mut self,
        bus: &Bus,
        stream: &str,
        rows: Vec<OutboxRow>,
        sequences: &HashMap<String, u64>,
        metrics: &Metrics,
    ) {
        let (found, missing): (Vec<_>, Vec<_>) = rows
            .into_iter()
            .map(|row| (sequences.get(&row.id).copied(), row))
            .partition(|(sequence, _)| sequence.is_some());
        self.rows.extend(missing.into_iter().map(|(_, row)| row));
        let compared = futures::stream::iter(found).map(|(sequence, row)| async move {
            let sequence = sequence.unwrap_or_default();
            let is_stored = duplicates::is_stored(bus, &row, stream, sequence).await;
            (row, sequence, is_stored)
        });
        let compared: Vec<_> = compared
            .buffered(duplicates::COMPARE_CONCURRENCY)
            .collect()
            .await;
        for (row, sequence, is_stored) in compared {
            match is_stored {
                Ok(true) => {
                    metrics.output(&row.worker, OutputOutcome::AlreadyStored);
                    let published = Published {
                        seq: row.seq,
                        stream: stream.to_owned(),
                        stream_sequence: sequence,
                    };
                    self.already_published.push(published);
                }
                Ok(false) => {
                    let why = duplicates::id_taken_message(stream, sequence);
                    self.unpublished
                        .push((row.seq, duplicates::retry_with_next_id(&row, why, metrics)));
                }
                Err(error) => self.retry_unchecked(stream, &[row], &error, metrics),
            }
        }
    }

    /// Schedules rows for another poll, because their lookup failed.
    fn retry_unchecked(
        &mut self,
        stream: &str,
        rows: &[OutboxRow],
        error: &anyhow::Error,
        metrics: &Metrics,
    ) {
        tracing::warn!(
            stream,
            count = rows.len(),
            error = format!("{error:#}"),
            "output lookup failed, retrying"
        );
        for row in rows {
            metrics.output(&row.worker, OutputOutcome::Failed);
            let error = Some(format!("stream lookup failed: {error:#}"));
            self.unpublished.push((
                row.seq,
                Unpublished::Later {
                    after: super::retry_after(row.failures),
                    error,
                },
            ));
        }
    }
}

/// Whether a stream may have forgotten the id of an output by the time it is sent, and can be
/// searched. A queue cannot be searched, because consumed messages are removed, so its outputs may
/// be published twice. Half of the deduplication window is reserved for clock differences and late
/// acks.
fn is_old(row: &OutboxRow, stream: &StreamInfo, now: Timestamp) -> bool {
    if stream.is_queue {
        return false;
    }
    now.duration_since(row.first_attempt_at).unsigned_abs()
        > (stream.duplicate_window / 2).saturating_sub(SEND_TIMEOUT)
}

/// The sequences of those rows that are on a stream, by id.
async fn look_up(bus: &Bus, stream: &str, rows: &[OutboxRow]) -> Result<HashMap<String, u64>> {
    let ids: HashSet<String> = rows.iter().map(|row| row.id.clone()).collect();
    let subjects: HashSet<String> = rows.iter().map(|row| row.subject.clone()).collect();
    let Some(since) = rows.iter().map(|row| row.first_attempt_at).min() else {
        return Ok(HashMap::new());
    };
    bus.find_published(
        stream,
        &subjects.into_iter().collect::<Vec<_>>(),
        since - CLOCK_SKEW_MAX,
        &ids,
    )
    .await
}
