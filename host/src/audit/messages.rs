//! Messages: each acknowledged message of a worker's stream has one outcome in its inbox.

use std::collections::{BTreeSet, HashMap};

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::difference::{Difference, Kind};
use super::{Findings, PAGE};
use crate::bus::{ScannedMessage, StartPosition};
use crate::config::manifest::Worker;
use crate::model::cloud_events;
use crate::model::message::{event_id, header};
use crate::services::Services;
use crate::store::Outcome;

/// Number of messages that are read with their bodies at the same time.
const READ_CONCURRENCY: usize = 16;

/// The messages of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerCounts {
    pub worker: String,
    pub stream: String,
    /// Messages of the window that are acknowledged.
    pub messages: u64,
    /// Those of them whose event is done, by this message.
    pub done: u64,
    /// Those whose event was settled by another copy.
    pub duplicates: u64,
    /// Those whose event is dead.
    pub dead: u64,
    /// Those that are no event, such as markers of deleted keys.
    pub no_events: u64,
    /// Messages that no host has acknowledged yet. They have no outcome so far.
    pub pending: u64,
}

/// A message with the event id that it seems to have.
struct Candidate {
    sequence: u64,
    event_id: String,
}

/// Checks the messages of a worker that were stored since a time.
///
/// The ack floor is read first: every message below it was settled before. Messages above it are
/// pending or in flight.
pub(super) async fn check(
    services: &Services,
    worker: &Worker,
    stream: &str,
    since: Timestamp,
    findings: &mut Findings,
) -> Result<WorkerCounts> {
    let mut counts = WorkerCounts {
        worker: worker.name.clone(),
        stream: stream.to_owned(),
        ..WorkerCounts::default()
    };
    let Some(info) = services.bus.stream(stream).await? else {
        findings.note(format!(
            "the stream {stream} of {} does not exist",
            worker.name
        ));
        return Ok(counts);
    };
    let probe = services
        .bus
        .probe(stream, &worker.subjects, &worker.durable());
    let Some(floor) = probe.ack_floor().await? else {
        findings.note(format!("the worker {} has no consumer yet", worker.name));
        return Ok(counts);
    };
    let backlog = probe.backlog().await?;
    counts.pending = backlog.pending + backlog.ack_pending;
    if info.is_queue {
        findings.note(format!(
            "the stream {stream} removes acknowledged messages, so those of {} are not checked",
            worker.name
        ));
        return Ok(counts);
    }
    // Under other subjects, the consumer skipped messages.
    let first = floor.skipped_up_to.saturating_add(1);

    let mut from = StartPosition::Time(since);
    loop {
        let mut page: Vec<ScannedMessage> = Vec::new();
        let has_more = services
            .bus
            .scan_messages(stream, from, &worker.subjects, PAGE, |message| {
                page.push(message);
            })
            .await?;
        let Some(last) = page.last().map(|message| message.sequence) else {
            break;
        };
        page.retain(|message| (first..=floor.sequence).contains(&message.sequence));
        check_page(services, worker, stream, &page, &mut counts, findings).await?;
        if !has_more || last >= floor.sequence {
            break;
        }
        from = StartPosition::Sequence(last + 1);
    }
    Ok(counts)
}

async fn check_page(
    services: &Services,
    worker: &Worker,
    stream: &str,
    page: &[ScannedMessage],
    counts: &mut WorkerCounts,
    findings: &mut Findings,
) -> Result<()> {
    counts.messages += page.len() as u64;

    // Most ids are in the headers.
    let (known, unknown): (Vec<_>, Vec<_>) = page.iter().partition(|message| has_own_id(message));
    let known = known.into_iter().map(|message| Candidate {
        sequence: message.sequence,
        event_id: id_by_headers(stream, message),
    });
    let mut unsettled: Vec<u64> = unknown.iter().map(|message| message.sequence).collect();
    unsettled.extend(judge(services, worker, stream, known.collect(), counts, findings).await?);

    // The others have to be read with their bodies.
    let read = futures::stream::iter(unsettled).map(|sequence| async move {
        let event = services.bus.event_at(stream, sequence).await?;
        anyhow::Ok((sequence, event))
    });
    let read: Vec<_> = read.buffered(READ_CONCURRENCY).try_collect().await?;
    let (events, others): (Vec<_>, Vec<_>) =
        read.into_iter().partition(|(_, event)| event.is_some());
    counts.no_events += others.len() as u64;
    let ids: HashMap<u64, String> = events
        .iter()
        .filter_map(|(sequence, event)| Some((*sequence, event.as_ref()?.1.clone())))
        .collect();
    let candidates = events.into_iter().filter_map(|(sequence, event)| {
        let (_, event_id) = event?;
        Some(Candidate { sequence, event_id })
    });
    let missing = judge(
        services,
        worker,
        stream,
        candidates.collect(),
        counts,
        findings,
    )
    .await?;
    for sequence in missing {
        let event_id = ids.get(&sequence).map_or("", String::as_str);
        findings.add(
            Kind::MessageWithoutOutcome
                .found(format!(
                    "message {sequence} of {stream} is acknowledged, and event {event_id} is not \
                     in the inbox of {}",
                    worker.name
                ))
                .of_event(&worker.name, event_id)
                .at(stream, sequence),
        );
    }
    Ok(())
}

/// Whether the headers alone decide on the event id.
fn has_own_id(message: &ScannedMessage) -> bool {
    header(&message.headers, "ce-id").is_some()
        || cloud_events::media_type(&message.headers) != cloud_events::STRUCTURED
}

fn id_by_headers(stream: &str, message: &ScannedMessage) -> String {
    event_id(
        &message.headers,
        None,
        stream,
        message.stored_at,
        message.sequence,
    )
    .unwrap_or_else(|invalid| invalid.fallback_id)
}

/// Looks up the outcomes of messages, and counts them. Returns the sequences without one.
async fn judge(
    services: &Services,
    worker: &Worker,
    stream: &str,
    candidates: Vec<Candidate>,
    counts: &mut WorkerCounts,
    findings: &mut Findings,
) -> Result<Vec<u64>> {
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    // Copies of an event are looked up once.
    let ids: BTreeSet<&str> = candidates.iter().map(|one| one.event_id.as_str()).collect();
    let ids: Vec<&str> = ids.into_iter().collect();
    let outcomes = services.store.outcomes(&worker.name, &ids).await?;
    let mut missing = Vec::new();
    for Candidate { sequence, event_id } in &candidates {
        let Some(outcome) = outcomes.get(event_id) else {
            missing.push(*sequence);
            continue;
        };
        let is_own = outcome.stream_sequence == Some(*sequence);
        match (outcome.is_done, is_own) {
            (false, _) => counts.dead += 1,
            (true, true) => counts.done += 1,
            (true, false) => counts.duplicates += 1,
        }
        if is_own {
            findings.extend(faults(worker, stream, *sequence, event_id, outcome));
        }
    }
    Ok(missing)
}

/// The faults of an outcome.
fn faults(
    worker: &Worker,
    stream: &str,
    sequence: u64,
    event_id: &str,
    outcome: &Outcome,
) -> Vec<Difference> {
    let name = &worker.name;
    let mut faults = Vec::new();
    if outcome.rows > 1 {
        let rows = outcome.rows;
        faults.push(Kind::SettledTwice.found(format!(
            "event {event_id} has {rows} rows in the inbox of {name}"
        )));
    }
    if outcome.is_dead && outcome.dead_letters.is_empty() {
        faults.push(Kind::DeadWithoutLetter.found(format!(
            "event {event_id} of {name} is dead, and has no dead letter"
        )));
    }
    faults
        .into_iter()
        .map(|fault| fault.of_event(name, event_id).at(stream, sequence))
        .collect()
}
