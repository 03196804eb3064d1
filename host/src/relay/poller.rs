//! The sweep: takes what was left behind, and looks up what may be on its stream already.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};

use super::key_queues::SEND_TIMEOUT;
use super::{RelayState, duplicates, recovered};
use crate::bus::{Bus, StreamInfo, stream_for_subject};
use crate::delivery::HAND_OVER_LEASE;
use crate::fault;
use crate::metrics::{Metrics, OutputOutcome};
use crate::store::{OutboxRow, Published, Store, StoreError, Unpublished};

/// The broker's clock may be behind ours.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_mins(2);

/// What a sweep found.
pub(super) struct OutputBatch {
    /// To be sent, in order.
    pub rows: Vec<OutboxRow>,
    /// Not later than their leases began.
    pub since: Instant,
    /// On their streams already.
    pub already_published: Vec<Published>,
    pub unpublished: Vec<(i64, Unpublished)>,
    /// As many as asked for: there may be more.
    pub is_full: bool,
    /// As they are known; none when the server does not say.
    pub streams: Arc<Vec<StreamInfo>>,
}

/// Leases what is due and nobody's. Of that, what was first sent so long ago that its stream may have forgotten the id is
/// looked up, and sent again only if it is not there.
pub(super) async fn poll(
    store: Arc<dyn Store>,
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
    // Before the look-up: a row that it puts back, as its id is taken, still holds those of its key behind it.
    OutboxRow::chain(&mut rows);
    // Without a list of streams hardly anything will be sent; whatever is sent was first sent a short while ago.
    let streams = bus.streams(streams_max_age).await.unwrap_or_default();
    let (rows, already_published) = recovered::split(&*store, &state, rows).await?;
    let mut batch = OutputBatch {
        rows,
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
                Ok(places) => self.sort_found(bus, &stream, rows, &places, metrics).await,
                Err(error) => self.retry_unchecked(&stream, &rows, &error, metrics),
            }
        }
        self.rows.sort_by_key(|row| row.seq);
    }

    /// Rows that are not on the stream are sent; those whose id was found there are compared first.
    async fn sort_found(
        &mut self,
        bus: &Bus,
        stream: &str,
        rows: Vec<OutboxRow>,
        places: &HashMap<String, u64>,
        metrics: &Metrics,
    ) {
        let (found, missing): (Vec<_>, Vec<_>) = rows
            .into_iter()
            .map(|row| (places.get(&row.id).copied(), row))
            .partition(|(place, _)| place.is_some());
        self.rows.extend(missing.into_iter().map(|(_, row)| row));
        let compared = futures::stream::iter(found).map(|(place, row)| async move {
            let sequence = place.unwrap_or_default();
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
                    let place = Published {
                        seq: row.seq,
                        stream: stream.to_owned(),
                        stream_sequence: sequence,
                    };
                    self.already_published.push(place);
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

    fn retry_unchecked(
        &mut self,
        stream: &str,
        rows: &[OutboxRow],
        error: &anyhow::Error,
        metrics: &Metrics,
    ) {
        tracing::warn!(
            "{} outputs to {stream} not published yet, looking them up failed: {error:#}",
            rows.len()
        );
        for row in rows {
            metrics.output(&row.worker, OutputOutcome::Failed);
            let error = Some(format!("looking it up failed: {error:#}"));
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

/// Whether a stream may have forgotten the id of an output by the time it is sent, and can be looked through. A queue cannot:
/// what was taken from it may come a second time. Half of the window is for clocks that
/// run apart and for answers that are late.
fn is_old(row: &OutboxRow, stream: &StreamInfo, now: Timestamp) -> bool {
    if stream.is_queue {
        return false;
    }
    now.duration_since(row.first_attempt_at).unsigned_abs()
        > (stream.duplicate_window / 2).saturating_sub(SEND_TIMEOUT)
}

/// Which of these rows stand on a stream, by id, and where.
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
