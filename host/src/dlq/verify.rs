//! Verifies redrives, from the inbox and the streams: no event took effect twice, no output was
//! published twice.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bus::StartPosition;
use crate::config::manifest::Worker;
use crate::model::message::{header, output_id};
use crate::model::output_ids::{self, OUTPUT_ID_HEADER};
use crate::model::verdict::Reason;
use crate::services::Services;
use crate::store::{DeadLetterRecord, DeadLetterState, DeadLetterSummary};

/// The maximum number of messages scanned per stream.
const MESSAGES_MAX: usize = 1_000_000;

/// The check of one dead letter's event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetterCheck {
    pub dead_letter: i64,
    pub worker: String,
    pub event_id: String,
    pub state: DeadLetterState,
    /// `done` or `dead`, a single record by its key; none while the event is in progress.
    pub inbox: Option<String>,
    /// Ids of its outputs on their streams, each with its number of occurrences.
    pub outputs: BTreeMap<String, u64>,
    /// The problem, if there is one.
    pub problem: Option<String>,
}

/// All checks, and the limits of the scan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Verification {
    pub dead_letters: Vec<DeadLetterCheck>,
    /// Streams with more messages than were scanned.
    pub truncated: Vec<String>,
}

/// Checks the inbox for each dead letter, and scans the streams of its worker for its outputs.
///
/// # Errors
/// The database or the broker failed.
pub async fn verify(services: &Services, ids: &[i64]) -> Result<Verification> {
    let mut dead_letters = Vec::new();
    for id in ids {
        if let Some(mut dead_letter) = services.store.find_dead_letter(*id).await? {
            // Bodies and edits are not needed here, and there may be many dead letters.
            dead_letter.body.clear();
            dead_letter.edits.clear();
            dead_letters.push(dead_letter);
        }
    }
    let mut found: HashMap<String, BTreeMap<String, u64>> = HashMap::new();
    let mut truncated = Vec::new();
    if let Some(since) = dead_letters
        .iter()
        .map(|dead_letter| dead_letter.stored_at)
        .min()
    {
        for stream in output_streams(services, &dead_letters).await? {
            let is_truncated =
                count_outputs(services, &stream, since, &dead_letters, &mut found).await?;
            truncated.extend(is_truncated.then_some(stream));
        }
    }
    let checks = dead_letters.iter().map(|dead_letter| {
        check(
            dead_letter,
            found.remove(&prefix(dead_letter)).unwrap_or_default(),
        )
    });
    Ok(Verification {
        dead_letters: checks.collect(),
        truncated,
    })
}

/// The streams that the workers of the dead letters may publish to.
async fn output_streams(
    services: &Services,
    dead_letters: &[DeadLetterRecord],
) -> Result<BTreeSet<String>> {
    let names: BTreeSet<&str> = dead_letters
        .iter()
        .map(|dead_letter| dead_letter.summary.worker.as_str())
        .collect();
    let mut streams: BTreeSet<String> = dead_letters
        .iter()
        .flat_map(|dead_letter| {
            dead_letter
                .outputs
                .iter()
                .filter_map(|output| output.stream.clone())
        })
        .collect();
    for deployment in services.store.active_deployments().await? {
        if names.contains(deployment.worker.as_str()) {
            let worker: Worker =
                serde_json::from_str(&deployment.manifest).context("read the worker's manifest")?;
            for pattern in &worker.outputs {
                streams.extend(services.bus.stream_name_for_subject(pattern).await?);
            }
        }
    }
    Ok(streams)
}

/// Counts the outputs on a stream by dead letter. True when the stream has more messages than were
/// scanned.
async fn count_outputs(
    services: &Services,
    stream: &str,
    since: Timestamp,
    dead_letters: &[DeadLetterRecord],
    found: &mut HashMap<String, BTreeMap<String, u64>>,
) -> Result<bool> {
    let events: HashMap<String, &DeadLetterSummary> = dead_letters
        .iter()
        .map(|dead_letter| (prefix(dead_letter), &dead_letter.summary))
        .collect();
    let kept: HashMap<&str, String> = dead_letters
        .iter()
        .flat_map(|dead_letter| {
            dead_letter
                .outputs
                .iter()
                .map(|output| (output.message_id.as_str(), prefix(dead_letter)))
        })
        .collect();
    let ids = services.store.output_ids();
    let count = |passed: crate::bus::ScannedMessage| {
        let (Some(id), Some(readable)) = (
            header(&passed.headers, "Nats-Msg-Id"),
            header(&passed.headers, OUTPUT_ID_HEADER),
        ) else {
            return;
        };
        // A readable id can be forged; the keyed one proves the origin.
        let is_derived = |event: &str, ordinal: &str| {
            events
                .get(event)
                .is_some_and(|event| ids.is_id_of(id, &event.worker, &event.event_id, ordinal))
        };
        let colon = readable.rfind(':').map_or(0, |colon| colon + 1);
        let own = readable
            .split_at_checked(colon)
            .filter(|(event, ordinal)| is_derived(event, ordinal));
        if let Some(event) = kept
            .get(id)
            .map(String::as_str)
            .or(own.map(|(event, _)| event))
        {
            *found
                .entry(event.to_owned())
                .or_default()
                .entry(readable.to_owned())
                .or_default() += 1;
        }
    };
    services
        .bus
        .scan_messages(stream, StartPosition::Time(since), &[], MESSAGES_MAX, count)
        .await
        .context("scan for outputs")
}

/// The common prefix of the ids of an event's outputs.
fn prefix(dead_letter: &DeadLetterRecord) -> String {
    let first = output_ids::one_line(&output_id(
        &dead_letter.summary.worker,
        &dead_letter.summary.event_id,
        0,
    ));
    first.strip_suffix('0').unwrap_or(&first).to_owned()
}

fn check(dead_letter: &DeadLetterRecord, outputs: BTreeMap<String, u64>) -> DeadLetterCheck {
    let summary = &dead_letter.summary;
    let inbox = dead_letter.inbox.as_ref().map(|(state, _)| state.clone());
    let owns_event_id = summary.reason != Reason::IdReuse.as_str();
    let duplicate = outputs.iter().find(|(_, count)| **count > 1);
    let unpublished = dead_letter
        .outputs
        .iter()
        .filter(|output| output.stream.is_none())
        .count();
    let problem = if let Some((id, count)) = duplicate {
        Some(format!("output {id} is on its stream {count} times"))
    } else if owns_event_id && inbox.as_deref() == Some("dead") && !outputs.is_empty() {
        Some("it is dead, but one of its outputs is on a stream".to_owned())
    } else if owns_event_id
        && summary.state == DeadLetterState::Done
        && inbox.as_deref() != Some("done")
    {
        Some("it took effect, but the inbox has no record of it".to_owned())
    } else if unpublished > 0 {
        Some(format!(
            "{unpublished} of its outputs are not published yet"
        ))
    } else {
        None
    };
    DeadLetterCheck {
        dead_letter: summary.id,
        worker: summary.worker.clone(),
        event_id: summary.event_id.clone(),
        state: summary.state,
        inbox,
        outputs,
        problem,
    }
}
