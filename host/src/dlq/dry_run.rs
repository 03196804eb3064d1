//! The dry run of a redrive: its result with the active deployment and current data.
//!
//! All effects are rolled back.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bus::{ScannedMessage, StartPosition};
use crate::config::manifest::OrderingKey;
use crate::delivery::{Delivery, DryRunOutcome};
use crate::model::keyed_state::StateEntry;
use crate::model::message::{Message, Origin, Redriven, event_id};
use crate::model::verdict::Reason;
use crate::services::Services;
use crate::store::{Changes, DeadLetterRecord, DeadLetterState};

/// The maximum number of changed rows shown per table.
const ROWS_MAX: usize = 100;

/// How many messages of a stream are scanned for later ones of a key.
const LATER_MESSAGES_MAX: usize = 20_000;

/// The predicted result of a redrive.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Prediction {
    /// It would take effect.
    WouldSucceed,
    /// It would die for the same reason.
    SameFailure,
    /// It would die for a different reason.
    DifferentFailure,
    /// It took effect already, or the handler would change nothing.
    AlreadyApplied,
    /// It would take effect, after a later message of its ordering key.
    OrderHazard,
    /// It cannot be redriven, or a dry run is impossible.
    NotPossible,
}

impl Prediction {
    /// The text for people.
    pub fn label(self) -> &'static str {
        match self {
            Prediction::WouldSucceed => "would succeed",
            Prediction::SameFailure => "same failure",
            Prediction::DifferentFailure => "different failure",
            Prediction::AlreadyApplied => "already applied",
            Prediction::OrderHazard => "order hazard",
            Prediction::NotPossible => "not possible",
        }
    }
}

/// The dry run of one dead letter, for people and for plans.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Preview {
    pub dead_letter: i64,
    pub worker: String,
    pub event_id: String,
    pub prediction: Prediction,
    /// The prediction in a sentence.
    pub detail: String,
    /// The conditions under which the prediction holds.
    #[serde(flatten)]
    pub preconditions: Preconditions,
    pub outputs: Vec<UnsentOutput>,
    pub state: Vec<StateChange>,
    pub changes: Changes,
    pub logs: String,
}

/// The conditions under which a prediction holds. Another deployment, dead letter or data may lead
/// to another result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Preconditions {
    /// Number of earlier redrives of the dead letter.
    pub generation: u32,
    /// The active deployment; none when the worker has none.
    pub version: Option<u32>,
    /// Digest over the prediction, the rows and the state before, and the destinations of outputs.
    ///
    /// Values that a handler generates at each run, such as random numbers, are not included.
    pub fingerprint: String,
}

/// The reason that a plan does not hold any more; none when it holds.
pub fn stale_reason(planned: &Preconditions, current: &Preview) -> Option<String> {
    if *planned == current.preconditions {
        return None;
    }
    Some(match (planned.version, current.preconditions.version) {
        (Some(then), Some(version)) if then != version => {
            format!(
                "it was planned with version {then} of {}, but version {version} is active now; \
                 make a new plan",
                current.worker
            )
        }
        _ if planned.generation != current.preconditions.generation => {
            "it was redriven since".to_owned()
        }
        _ => format!(
            "its result changed since it was planned; now: {} ({})",
            current.prediction.label(),
            current.detail
        ),
    })
}

/// An output that the dry run did not send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UnsentOutput {
    pub id: String,
    pub subject: String,
    pub headers: Vec<(String, String)>,
    /// Base64.
    pub body: String,
}

/// A key of state before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DryRunStateChange")]
pub struct StateChange {
    pub key: String,
    pub before: Option<StateValue>,
    pub after: Option<StateValue>,
}

/// A value of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DryRunStateValue")]
pub struct StateValue {
    pub version: u64,
    /// Base64.
    pub value: String,
}

/// Runs a dry run of each dead letter on its own: none sees the changes of another.
///
/// Dead letters that do not exist are left out.
///
/// # Errors
/// The database or the broker failed.
pub async fn preview(services: &Services, ids: &[i64]) -> Result<Vec<Preview>> {
    let mut dead_letters = Vec::new();
    for id in ids {
        dead_letters.extend(services.store.find_dead_letter(*id).await?);
    }

    // One dry run after the other; a worker is loaded once.
    let mut workers: HashMap<String, Option<Delivery>> = HashMap::new();
    let mut preview = Vec::new();
    for dead_letter in &dead_letters {
        let worker = &dead_letter.summary.worker;
        if !workers.contains_key(worker) {
            workers.insert(worker.clone(), services.active_delivery(worker).await?);
        }
        let delivery = workers.get(worker).and_then(Option::as_ref);
        preview.push(preview_one(dead_letter, delivery).await?);
    }

    // Later messages of the same keys.
    for (worker, delivery) in &workers {
        if let Some(delivery) = delivery {
            mark_order_hazards(
                services,
                delivery,
                &dead_letters,
                preview.iter_mut().filter(|one| one.worker == *worker),
            )
            .await?;
        }
    }
    for one in &mut preview {
        one.preconditions.fingerprint = fingerprint(one);
    }
    Ok(preview)
}

async fn preview_one(
    dead_letter: &DeadLetterRecord,
    delivery: Option<&Delivery>,
) -> Result<Preview> {
    let summary = &dead_letter.summary;
    let mut preview = Preview {
        dead_letter: summary.id,
        worker: summary.worker.clone(),
        event_id: summary.event_id.clone(),
        prediction: Prediction::NotPossible,
        detail: String::new(),
        preconditions: Preconditions {
            generation: summary.generation,
            version: delivery.map(|delivery| delivery.version),
            fingerprint: String::new(),
        },
        outputs: Vec::new(),
        state: Vec::new(),
        changes: Changes::default(),
        logs: String::new(),
    };
    match (refusal(dead_letter), delivery) {
        (Some((prediction, detail)), _) => {
            (preview.prediction, preview.detail) = (prediction, detail.to_owned())
        }
        (None, None) => preview.detail = format!("worker {} is not deployed", summary.worker),
        (None, Some(delivery)) => {
            let outcome = delivery
                .dry_run(Arc::new(message(dead_letter)), ROWS_MAX)
                .await?;
            (preview.prediction, preview.detail) = predict(dead_letter, &outcome);
            preview.set_effects(outcome);
        }
    }
    Ok(preview)
}

/// The reason that no dry run is made; none when it is possible.
fn refusal(dead_letter: &DeadLetterRecord) -> Option<(Prediction, &'static str)> {
    let is = |reason: Reason| dead_letter.summary.reason == reason.as_str();
    let not = |detail| Some((Prediction::NotPossible, detail));
    match dead_letter.summary.state {
        _ if is(Reason::IdReuse) => not("its event id stands for another message"),
        DeadLetterState::Done => Some((
            Prediction::AlreadyApplied,
            "it was redriven before and took effect",
        )),
        DeadLetterState::Redriven => not("its redrive is in progress"),
        DeadLetterState::Resolved | DeadLetterState::Dropped => not("it is closed"),
        DeadLetterState::Open if is(Reason::Unreadable) => not("its headers cannot be read"),
        DeadLetterState::Open if is(Reason::CrashedHost) => {
            not("it crashed hosts, and a dry run could crash another one")
        }
        DeadLetterState::Open => None,
    }
}

/// The message that the worker would receive.
fn message(dead_letter: &DeadLetterRecord) -> Message {
    let summary = &dead_letter.summary;
    let stored_at = dead_letter.stored_at;
    let origin = summary.stream.clone().zip(summary.stream_sequence);
    Message {
        event_id: summary.event_id.clone(),
        subject: summary.subject.clone(),
        headers: dead_letter.headers.clone(),
        body: dead_letter
            .edits
            .last()
            .map_or(&dead_letter.body, |edit| &edit.body)
            .clone(),
        origin: origin.map(|(stream, sequence)| Origin {
            stream,
            sequence,
            stored_at,
        }),
        redriven: Some(Redriven {
            attempts_before: summary.attempts,
            payload_sha256: [0; 32],
        }),
    }
}

fn predict(dead_letter: &DeadLetterRecord, outcome: &DryRunOutcome) -> (Prediction, String) {
    let summary = &dead_letter.summary;
    if let Some((reason, failure)) = &outcome.failure {
        // A dry run is one attempt, which cannot show that a failure is deterministic.
        let is_deterministic = summary.reason == Reason::DeterministicFailure.as_str();
        let expected_reason = if is_deterministic {
            Reason::AttemptsExhausted.as_str()
        } else {
            summary.reason.as_str()
        };
        let is_same = expected_reason == reason.as_str()
            && summary.code == failure.code
            && (failure.code.is_some() || summary.detail == failure.message);
        let prediction = if is_same {
            Prediction::SameFailure
        } else {
            Prediction::DifferentFailure
        };
        let code = failure
            .code
            .as_ref()
            .map(|code| format!(" ({code})"))
            .unwrap_or_default();
        return (
            prediction,
            format!("{}{code}: {}", reason.as_str(), failure.message),
        );
    }
    let rows = outcome.changes.rows.len();
    let is_unchanged = rows == 0 && outcome.changes.omitted.is_empty();
    if is_unchanged && outcome.outputs.is_empty() && outcome.state.is_empty() {
        return (
            Prediction::AlreadyApplied,
            "the handler changes nothing and sends nothing".to_owned(),
        );
    }
    let count =
        |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    let (outputs, keys) = (
        count(outcome.outputs.len(), "output"),
        count(outcome.state.len(), "key"),
    );
    (
        Prediction::WouldSucceed,
        format!(
            "changes {} and {keys} of state, sends {outputs}",
            count(rows, "row")
        ),
    )
}

impl Preview {
    fn set_effects(&mut self, outcome: DryRunOutcome) {
        let value = |entry: StateEntry| StateValue {
            version: entry.version,
            value: STANDARD.encode(&entry.value),
        };
        self.state = outcome
            .state
            .into_iter()
            .map(|(key, before, after)| StateChange {
                key,
                before: before.map(value),
                after: after.map(value),
            })
            .collect();
        self.outputs = outcome
            .outputs
            .into_iter()
            .map(|output| UnsentOutput {
                id: output.id,
                subject: output.subject,
                headers: output.headers,
                body: STANDARD.encode(&output.body),
            })
            .collect();
        self.changes = outcome.changes;
        self.logs = outcome.logs;
    }
}

/// Finds later messages of the same keys that took effect, with one scan for all dead letters of a
/// worker.
async fn mark_order_hazards(
    services: &Services,
    delivery: &Delivery,
    dead_letters: &[DeadLetterRecord],
    previews: impl Iterator<Item = &mut Preview>,
) -> Result<()> {
    let worker = &delivery.worker;
    let (Some(ordering_key), Some(source)) = (&worker.ordering_key, &worker.stream) else {
        return Ok(());
    };

    // The keys and positions of the dead letters that would succeed.
    let mut candidates: Vec<(&mut Preview, String, u64)> = Vec::new();
    for one in previews.filter(|one| one.prediction == Prediction::WouldSucceed) {
        let Some(dead_letter) = dead_letters
            .iter()
            .find(|dead_letter| dead_letter.summary.id == one.dead_letter)
        else {
            continue;
        };
        let message = message(dead_letter);
        let place = message
            .origin
            .as_ref()
            .filter(|origin| origin.stream == *source);
        if let (Some(key), Some(place)) = (ordering_key.key_of(&message), place) {
            let sequence = place.sequence;
            candidates.push((one, key, sequence));
        }
    }
    let Some(first) = candidates.iter().map(|(_, _, sequence)| *sequence).min() else {
        return Ok(());
    };

    // The messages after the first of them.
    let mut passed = Vec::new();
    let is_truncated = services
        .bus
        .scan_messages(
            source,
            StartPosition::Sequence(first + 1),
            &worker.subjects,
            LATER_MESSAGES_MAX,
            |one| passed.push(one),
        )
        .await
        .context("scan for later messages of the same key")?;
    let stream = services
        .bus
        .stream(source)
        .await?
        .context("read the worker's stream")?;
    let later = events_by_key(passed, ordering_key, source, stream.created);
    for (one, key, sequence) in candidates {
        let events: Vec<&str> = later
            .get(&key)
            .into_iter()
            .flatten()
            .filter(|(later, _)| *later > sequence)
            .map(|(_, event_id)| event_id.as_str())
            .collect();
        let done = services.store.done_events(&worker.name, &events).await?;
        if let Some(event) = done.first() {
            one.prediction = Prediction::OrderHazard;
            one.detail = format!(
                "{} later messages of its key `{key}` took effect, such as {event}; {}",
                done.len(),
                one.detail
            );
        } else if is_truncated {
            one.changes.omitted.push(format!(
                "later messages of its key after message {}",
                first + LATER_MESSAGES_MAX as u64
            ));
        }
    }
    Ok(())
}

/// Sequence and event id of messages, by key.
fn events_by_key(
    messages: Vec<ScannedMessage>,
    ordering_key: &OrderingKey,
    stream: &str,
    created: Timestamp,
) -> HashMap<String, Vec<(u64, String)>> {
    let mut by_key: HashMap<String, Vec<(u64, String)>> = HashMap::new();
    for ScannedMessage {
        sequence,
        subject,
        headers,
        ..
    } in messages
    {
        let event_id = event_id(&headers, None, stream, created, sequence)
            .unwrap_or_else(|invalid| invalid.fallback_id);
        let body = bytes::Bytes::new();
        let message = Message {
            event_id,
            subject,
            headers,
            body,
            origin: None,
            redriven: None,
        };
        if let Some(key) = ordering_key.key_of(&message) {
            by_key
                .entry(key)
                .or_default()
                .push((sequence, message.event_id));
        }
    }
    by_key
}

/// Digest over everything that must not change for a plan to hold.
fn fingerprint(one: &Preview) -> String {
    let mut inserted: BTreeMap<&str, usize> = BTreeMap::new();
    let mut before: Vec<String> = Vec::new();
    for row in &one.changes.rows {
        match &row.before {
            Some(row_before) => before.push(format!(
                "{} {row_before} {}",
                row.table,
                row.after.is_some()
            )),
            None => *inserted.entry(&row.table).or_default() += 1,
        }
    }
    before.sort();
    let state: Vec<_> = one
        .state
        .iter()
        .map(|change| (&change.key, &change.before))
        .collect();
    let outputs: Vec<_> = one
        .outputs
        .iter()
        .map(|output| (&output.id, &output.subject))
        .collect();
    let inputs = serde_json::json!([
        one.prediction,
        inserted,
        before,
        state,
        outputs,
        one.changes.omitted
    ]);
    hex::encode(Sha256::digest(inputs.to_string().as_bytes()))
}
