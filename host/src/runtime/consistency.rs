//! Compares the database and NATS.
//!
//! A database restored to an earlier time lacks messages that workers acknowledged since. A
//! restored stream lacks messages that the database has handled. Either would silently lose or
//! repeat messages. So each host compares the two every two seconds. While they disagree, workers
//! and relay are held until `oncely recover`.
//!
//! While anything changes, a host writes a *watermark*: the ends of the streams and the ack floors
//! of the consumers. It is written to the database first, and then, as a name, to the watermark
//! stream.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Result;
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};

use super::Host;
use super::health_checks::PROBE_CONCURRENCY;
use crate::bus::{OtherInstallation, StoredWatermark, WATERMARK_STREAM, watermark_stream};
use crate::config::manifest::Worker;
use crate::drain::Stopping;
use crate::model::hint;
use crate::model::retry::LastError;
use crate::model::subject;
use crate::model::units;
use crate::store::{AckFloor, BrokerState, StreamEnd, Watermark, Watermarks};

/// Interval at which the database and NATS are compared.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// How many of the newest acknowledged messages of a worker are checked against the inbox, and how
/// many are read concurrently.
const CHECKED_EVENTS_MAX: u64 = 16;
const CHECK_CONCURRENCY: usize = 8;

/// The reason that the workers and the relay of a host are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    /// The database and NATS disagree; the reasons are for people.
    Restored(Vec<String>),
    /// Another installation has taken over.
    TakenOver(OtherInstallation),
}

impl std::fmt::Display for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Hold::Restored(why) => write!(
                f,
                "the database and NATS disagree, so workers and relay are held: {}; \
                 see `oncely recover --dry-run`",
                why.join("; ")
            ),
            Hold::TakenOver(other) => write!(
                f,
                "workers and relay are held: {other}; \
                 return it to this installation with: oncely run --take-over {}",
                other.owner_id
            ),
        }
    }
}

/// The result of a comparison.
pub(super) struct Comparison {
    pub hold: Option<Hold>,
    pub seen: BrokerState,
    /// The sequence of the last watermark on NATS, 0 for none.
    pub last_sequence: u64,
    pub watermarks: Watermarks,
}

/// The broker state in the last watermark of this host, and the count of published outputs then.
#[derive(Default)]
pub(super) struct LastWatermark(Option<(BrokerState, u64)>);

impl Host {
    /// The reason that workers and relay are held; none while they run.
    pub fn hold(&self) -> Option<Hold> {
        self.hold
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Compares the database and NATS.
    pub(super) async fn compare(&self) -> Result<Comparison> {
        // Check the owner of the streams.
        if let Some(other) = self.other_installation().await? {
            let hold = Some(Hold::TakenOver(other));
            return Ok(Comparison {
                hold,
                seen: BrokerState::default(),
                last_sequence: 0,
                watermarks: Watermarks::default(),
            });
        }

        // Compare the watermarks. That on NATS is read first, because it is written last.
        let stored = self.last_watermark().await?;
        let name = stored.as_ref().and_then(|stored| {
            self.services
                .store
                .output_ids()
                .open_watermark(&stored.text)
        });
        let watermarks = self.services.store.watermarks(name).await?;
        self.services
            .relay_state
            .set_check_recovered(watermarks.has_recovered);
        let mut why = Vec::new();
        if name.is_some() && watermarks.requested_written_at.is_none() {
            why.push(
                "the database was restored to an earlier time than NATS: \
                 it lacks the last watermark of NATS"
                    .to_owned(),
            );
        }
        why.extend(self.older_nats(&watermarks, stored.as_ref()).await?);
        if !why.is_empty() {
            // Held at once: the other checks are slow.
            self.set_hold(Some(Hold::Restored(why.clone()))).await;
        }

        // Compare the positions.
        let workers = self.services.deployed_workers().await?;
        let seen = self
            .read_positions(&workers, watermarks.last.as_ref())
            .await?;
        if let Some(last) = &watermarks.last {
            for (name, end) in &last.seen.streams {
                why.extend(self.changed_stream(name, end, seen.streams.get(name)).await);
            }
            for worker in &workers {
                why.extend(self.unknown_event(worker, &last.seen, &seen).await?);
            }
        }
        let last_sequence = stored.map_or(0, |stored| stored.sequence);
        let hold = (!why.is_empty()).then_some(Hold::Restored(why));
        Ok(Comparison {
            hold,
            seen,
            last_sequence,
            watermarks,
        })
    }

    /// The other installation, if the watermark stream belongs to one by now.
    ///
    /// A deleted stream is created again.
    async fn other_installation(&self) -> Result<Option<OtherInstallation>> {
        let owned = match self.services.bus.check_owner(WATERMARK_STREAM).await {
            Err(error) if hint::find_cause::<OtherInstallation>(&error).is_none() => self
                .services
                .bus
                .ensure_own_stream(&watermark_stream())
                .await
                .map(drop),
            owned => owned,
        };
        let Err(error) = owned else { return Ok(None) };
        hint::find_cause::<OtherInstallation>(&error)
            .cloned()
            .map_or(Err(error), |other| Ok(Some(other)))
    }

    /// The last watermark on NATS.
    pub(super) async fn last_watermark(&self) -> Result<Option<StoredWatermark>> {
        self.services
            .bus
            .last_watermark(&self.services.store.output_ids().watermark_subject())
            .await
    }

    /// The reason if NATS lost more watermarks than the outbox can repair.
    ///
    /// A power cut may lose the last minutes of streams. These outputs are still in the outbox and
    /// are published again.
    async fn older_nats(
        &self,
        watermarks: &Watermarks,
        stored: Option<&StoredWatermark>,
    ) -> Result<Option<String>> {
        let Some((written_at, sequence)) = watermarks.acknowledged else {
            return Ok(None);
        };
        let is_present = |stored: &StoredWatermark| stored.sequence >= sequence;
        if stored.is_some_and(is_present) {
            return Ok(None);
        }
        // Another host may have written a newer one.
        let stored = self.last_watermark().await?;
        if stored.as_ref().is_some_and(is_present) {
            return Ok(None);
        }
        let why = |text: String| {
            Ok(Some(format!(
                "NATS was restored to an earlier time than the database, or is another one: {text}"
            )))
        };

        // The loss: from the last watermark that NATS still has.
        let Some(stored) = stored else {
            return why("it has no watermark".to_owned());
        };
        let Some(name) = self
            .services
            .store
            .output_ids()
            .open_watermark(&stored.text)
        else {
            return Ok(None);
        };
        let watermarks = self.services.store.watermarks(Some(name)).await?;
        let Some(lost_since) = watermarks.requested_written_at else {
            return Ok(None);
        };
        let lost = written_at.duration_since(lost_since).unsigned_abs();
        if lost <= self.retention.outputs {
            return Ok(None);
        }
        why(format!(
            "it lost the last {} of messages",
            units::format_duration(Duration::from_secs(lost.as_secs()))
        ))
    }

    /// Reads the positions of consumers and streams for the next watermark.
    ///
    /// Where NATS does not respond, the entry of the watermark `before` is kept.
    pub(super) async fn read_positions(
        &self,
        workers: &[Worker],
        before: Option<&Watermark>,
    ) -> Result<BrokerState> {
        let mut seen = BrokerState::default();
        let queries: Vec<_> = workers
            .iter()
            .map(|worker| self.ack_floor(worker, before))
            .collect();
        let floors: Vec<_> = futures::stream::iter(queries)
            .buffer_unordered(PROBE_CONCURRENCY)
            .collect()
            .await;
        seen.consumers.extend(floors.into_iter().flatten());

        // Streams after consumers: a stream ends at or above every ack floor read before.
        let streams: BTreeSet<&String> = workers
            .iter()
            .filter_map(|worker| worker.stream.as_ref())
            .collect();
        for name in streams {
            let end = match self.stream_end(name).await {
                Ok(end) => end,
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::debug!(stream = name, error, "stream not readable");
                    before.and_then(|before| before.seen.streams.get(name).cloned())
                }
            };
            seen.streams.extend(end.map(|end| (name.clone(), end)));
        }
        Ok(seen)
    }

    /// The position of a worker's consumer, by its name; none without a stream or a consumer.
    async fn ack_floor(
        &self,
        worker: &Worker,
        before: Option<&Watermark>,
    ) -> Option<(String, AckFloor)> {
        let stream = worker.stream.as_ref()?;
        let probe = self
            .services
            .bus
            .probe(stream, &worker.subjects, &worker.durable());
        let floor = match probe.ack_floor().await {
            Ok(floor) => floor.map(|floor| AckFloor {
                stream: stream.clone(),
                sequence: floor.sequence,
                subjects: floor.subjects,
                skipped_up_to: floor.skipped_up_to,
            }),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::debug!(worker = worker.name, error, "consumer not readable");
                before.and_then(|before| before.seen.consumers.get(&worker.name).cloned())
            }
        };
        Some((worker.name.clone(), floor?))
    }

    async fn stream_end(&self, name: &str) -> Result<Option<StreamEnd>> {
        let Some(stream) = self.services.bus.stream(name).await? else {
            return Ok(None);
        };
        let (created, last_sequence) = (stream.created, stream.last_sequence);
        let stored_at = match last_sequence {
            0 => None,
            _ => self.services.bus.stored_at(name, last_sequence).await?,
        };
        Ok(Some(StreamEnd {
            created,
            last_sequence,
            stored_at,
        }))
    }

    /// The reason if a stream ends before its recorded end, or holds another message there.
    ///
    /// A stream that was created again is a different stream.
    async fn changed_stream(
        &self,
        name: &str,
        before: &StreamEnd,
        now: Option<&StreamEnd>,
    ) -> Option<String> {
        let now = now.filter(|now| now.created == before.created)?;
        if now.last_sequence < before.last_sequence {
            return Some(format!(
                "the stream {name} was restored to an earlier time than the database: \
                 it ends at {}, but ended at {} before",
                now.last_sequence, before.last_sequence
            ));
        }
        let stored_at = before.stored_at?;
        // An unreadable position proves nothing.
        let found = self
            .services
            .bus
            .stored_at(name, before.last_sequence)
            .await
            .unwrap_or_default();
        found.filter(|found| *found != stored_at).map(|_| {
            format!(
                "the stream {name} holds a different message at {} than before",
                before.last_sequence
            )
        })
    }

    /// The reason if the inbox lacks one of the newest messages that a worker has acknowledged.
    async fn unknown_event(
        &self,
        worker: &Worker,
        before: &BrokerState,
        now: &BrokerState,
    ) -> Result<Option<String>> {
        let (Some(floor), Some(previous)) = (
            now.consumers.get(&worker.name),
            before.consumers.get(&worker.name),
        ) else {
            return Ok(None);
        };
        // Messages skipped under other subjects were never delivered, so the inbox may lack them.
        let known_sequence = previous.sequence.max(floor.skipped_up_to);
        if floor.sequence <= known_sequence || floor.stream != previous.stream {
            return Ok(None);
        }

        // The newest acknowledged messages.
        let from = floor
            .sequence
            .saturating_sub(CHECKED_EVENTS_MAX)
            .max(known_sequence)
            + 1;
        let found = futures::stream::iter(from..=floor.sequence)
            .map(|sequence| async move {
                (
                    sequence,
                    self.services.bus.event_at(&floor.stream, sequence).await,
                )
            })
            .buffered(CHECK_CONCURRENCY);
        let found: Vec<_> = found.collect().await;
        let mut events = Vec::new();
        for (sequence, event) in found {
            let is_match = |subject: &str| {
                floor.subjects.is_empty()
                    || floor
                        .subjects
                        .iter()
                        .any(|pattern| subject::covers(pattern, subject))
            };
            // An unreadable message proves nothing.
            if let Ok(Some((_, event_id))) =
                event.map(|event| event.filter(|(subject, _)| is_match(subject)))
            {
                events.push((sequence, event_id));
            }
        }

        // Those that the inbox lacks.
        let ids: Vec<&str> = events
            .iter()
            .map(|(_, event_id)| event_id.as_str())
            .collect();
        let known = self.services.store.known_events(&worker.name, &ids).await?;
        let unknown = events
            .iter()
            .find(|(_, event_id)| !known.contains(event_id));
        Ok(unknown.map(|(sequence, _)| {
            format!(
                "the database was restored to an earlier time than NATS: \
                 worker {} has acknowledged message {sequence} of {}, but the inbox lacks it",
                worker.name, floor.stream
            )
        }))
    }

    /// Writes a watermark to the database and then to NATS. False when another host wrote one
    /// first.
    pub(super) async fn write_watermark(
        &self,
        seen: &BrokerState,
        last_sequence: u64,
    ) -> Result<bool> {
        let name = format!("{:032x}", rand::random::<u128>());
        self.services.store.write_watermark(&name, seen).await?;
        let ids = self.services.store.output_ids();
        let written = self
            .services
            .bus
            .write_watermark(
                &ids.watermark_subject(),
                ids.seal_watermark(&name),
                last_sequence,
            )
            .await?;
        if let Some(sequence) = written {
            self.services
                .store
                .acknowledge_watermark(&name, sequence)
                .await?;
        }
        Ok(written.is_some())
    }

    /// Holds workers and relay, or resumes them.
    pub(super) async fn set_hold(&self, hold: Option<Hold>) {
        let before = std::mem::replace(
            &mut *self.hold.lock().unwrap_or_else(PoisonError::into_inner),
            hold.clone(),
        );
        self.services.relay_state.set_suspended(hold.is_some());
        match (&before, &hold) {
            (None, Some(hold)) => {
                tracing::error!(reason = %hold, "workers and relay held");
                self.drain_message_workers().await;
            }
            (Some(_), None) => {
                tracing::info!("the database and NATS agree, workers and relay resumed");
                self.notify_deployed();
            }
            _ => {}
        }
    }

    /// Compares once, and acts on the result.
    async fn check_consistency(&self, last: &mut LastWatermark) -> Result<()> {
        // Skipped during a recovery, which writes a watermark at its end.
        let Ok(_guard) = self.recovering.try_lock() else {
            return Ok(());
        };
        let comparison = self.compare().await?;
        let is_held = comparison.hold.is_some();
        self.set_hold(comparison.hold).await;
        if is_held {
            return Ok(());
        }
        let published = self.services.relay_state.published();
        let is_new = last
            .0
            .as_ref()
            .is_none_or(|(seen, before)| *seen != comparison.seen || *before != published);
        if is_new || comparison.watermarks.last.is_none() {
            self.write_watermark(&comparison.seen, comparison.last_sequence)
                .await?;
            last.0 = Some((comparison.seen, published));
        }
        Ok(())
    }
}

/// Compares periodically, and after each new connection to NATS, until the host stops.
pub(super) async fn watch(host: Arc<Host>, mut stopping: Stopping) {
    let mut connections = host.services.bus.connections();
    let mut last = LastWatermark::default();
    let mut trouble = LastError::default();
    loop {
        match host.check_consistency(&mut last).await {
            Ok(()) => trouble.clear(),
            Err(error) => {
                let why = format!("{error:#}");
                if host.services.bus.is_connected() && trouble.is_new(&why) {
                    tracing::warn!(
                        error = why,
                        "failed to compare the database and NATS, retrying"
                    );
                }
            }
        }
        tokio::select! {
            biased;
            () = stopping.stopped() => return,
            Ok(()) = connections.changed() => {}
            () = tokio::time::sleep(CHECK_INTERVAL) => {}
        }
    }
}

/// The time from which outputs are searched on streams, ten minutes before the last watermark.
///
/// A restored database may lack publications from shortly before, and clocks may differ.
pub(super) fn outputs_since(written_at: Timestamp) -> Timestamp {
    written_at
        .checked_sub(SignedDuration::from_mins(10))
        .unwrap_or(Timestamp::UNIX_EPOCH)
}
