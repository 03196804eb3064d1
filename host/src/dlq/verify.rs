//! After letters were put back: the proof that nothing doubled, from the inbox and from the streams themselves.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::bus::From;
use crate::config::manifest::Worker;
use crate::model::message::{header, output_id};
use crate::model::output_ids::{self, OUTPUT_ID};
use crate::model::verdict::Reason;
use crate::services::Services;
use crate::store::{LetterRecord, LetterState, LetterSummary};

/// How many messages of each stream are looked at.
const LOOK_MAX: usize = 1_000_000;

/// What is known of one letter's event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    pub letter: i64,
    pub worker: String,
    pub event_id: String,
    pub state: LetterState,
    /// `done` or `dead`, which is one record by its key; none while the event is under way.
    pub inbox: Option<String>,
    /// Ids of its outputs that are on their streams, with how often each stands there.
    pub outputs: BTreeMap<String, u64>,
    /// What is wrong; none when all is well.
    pub wrong: Option<String>,
}

/// All of it, and what was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    pub letters: Vec<Verified>,
    /// Streams that hold more than was looked at.
    pub cut: Vec<String>,
}

/// Looks at the inbox for each letter, and on the streams of its worker's outputs for what its event sent.
pub async fn verify(services: &Services, ids: &[i64]) -> Result<Verification> {
    let mut letters = Vec::new();
    for id in ids {
        if let Some(mut letter) = services.store.letter(*id).await? {
            // There may be many.
            letter.body.clear();
            letter.edits.clear();
            letters.push(letter);
        }
    }
    let mut found: HashMap<String, BTreeMap<String, u64>> = HashMap::new();
    let mut cut = Vec::new();
    if let Some(since) = letters.iter().map(|letter| letter.stored_at).min() {
        for stream in output_streams(services, &letters).await? {
            let is_cut = count_outputs(services, &stream, since, &letters, &mut found).await?;
            cut.extend(is_cut.then_some(stream));
        }
    }
    let judged = letters.iter().map(|letter| judge(letter, found.remove(&prefix(letter)).unwrap_or_default()));
    Ok(Verification { letters: judged.collect(), cut })
}

/// The streams that the letters' workers may publish to.
async fn output_streams(services: &Services, letters: &[LetterRecord]) -> Result<BTreeSet<String>> {
    let names: BTreeSet<&str> = letters.iter().map(|letter| letter.summary.worker.as_str()).collect();
    let mut streams: BTreeSet<String> =
        letters.iter().flat_map(|letter| letter.outputs.iter().filter_map(|output| output.stream.clone())).collect();
    for deployment in services.store.active_deployments().await? {
        if names.contains(deployment.worker.as_str()) {
            let worker: Worker = serde_json::from_str(&deployment.manifest).context("read the worker's manifest")?;
            for pattern in &worker.outputs {
                streams.extend(services.bus.stream_of_subject(pattern).await?);
            }
        }
    }
    Ok(streams)
}

/// Counts, by letter, the outputs on a stream; true when there is more on it than was looked at.
async fn count_outputs(
    services: &Services,
    stream: &str,
    since: Timestamp,
    letters: &[LetterRecord],
    found: &mut HashMap<String, BTreeMap<String, u64>>,
) -> Result<bool> {
    let events: HashMap<String, &LetterSummary> =
        letters.iter().map(|letter| (prefix(letter), &letter.summary)).collect();
    let kept: HashMap<&str, String> = letters
        .iter()
        .flat_map(|letter| letter.outputs.iter().map(|output| (output.message_id.as_str(), prefix(letter))))
        .collect();
    let ids = services.store.output_ids();
    let count = |passed: crate::bus::Passed| {
        let (Some(id), Some(readable)) = (header(&passed.headers, "Nats-Msg-Id"), header(&passed.headers, OUTPUT_ID))
        else {
            return;
        };
        // A readable id can be forged; the keyed one says whose message it is.
        let is_derived = |event: &str, ordinal: &str| {
            events.get(event).is_some_and(|event| ids.is_of(id, &event.worker, &event.event_id, ordinal))
        };
        let colon = readable.rfind(':').map_or(0, |colon| colon + 1);
        let own = readable.split_at_checked(colon).filter(|(event, ordinal)| is_derived(event, ordinal));
        if let Some(event) = kept.get(id).map(String::as_str).or(own.map(|(event, _)| event)) {
            *found.entry(event.to_owned()).or_default().entry(readable.to_owned()).or_default() += 1;
        }
    };
    services.bus.passed(stream, From::Time(since), &[], LOOK_MAX, count).await.context("look for outputs")
}

/// What the ids of an event's outputs begin with.
fn prefix(letter: &LetterRecord) -> String {
    let first = output_ids::one_line(&output_id(&letter.summary.worker, &letter.summary.event_id, 0));
    first.strip_suffix('0').unwrap_or(&first).to_owned()
}

fn judge(letter: &LetterRecord, outputs: BTreeMap<String, u64>) -> Verified {
    let summary = &letter.summary;
    let inbox = letter.settled.as_ref().map(|(state, _)| state.clone());
    let owns_its_event = summary.reason != Reason::IdReuse.as_str();
    let twice = outputs.iter().find(|(_, count)| **count > 1);
    let unpublished = letter.outputs.iter().filter(|output| output.stream.is_none()).count();
    let wrong = if let Some((id, count)) = twice {
        Some(format!("output {id} is on its stream {count} times"))
    } else if owns_its_event && inbox.as_deref() == Some("dead") && !outputs.is_empty() {
        Some("it is dead, and an output of it is on a stream".to_owned())
    } else if owns_its_event && summary.state == LetterState::Done && inbox.as_deref() != Some("done") {
        Some("it took effect, and the inbox does not know of it any more".to_owned())
    } else if unpublished > 0 {
        Some(format!("{unpublished} of its outputs are not published yet"))
    } else {
        None
    };
    Verified {
        letter: summary.id,
        worker: summary.worker.clone(),
        event_id: summary.event_id.clone(),
        state: summary.state,
        inbox,
        outputs,
        wrong,
    }
}
