//! Before a dead letter is put back: what would come of it, by the deployment and the data of now. Nothing of it takes effect.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bus::{From, Passed};
use crate::config::manifest::OrderingKey;
use crate::delivery::{Delivery, Rehearsal};
use crate::model::keyed_state::StateEntry;
use crate::model::message::{Message, Origin, Redriven, event_id};
use crate::model::verdict::Reason;
use crate::services::Services;
use crate::store::{Changes, LetterRecord, LetterState};

/// How many changed rows of each table are told of.
const ROWS_MAX: usize = 100;

/// How many messages of a stream are looked at for later ones of a key.
const LATER_MAX: usize = 20_000;

/// What putting a letter back would come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// It would take effect.
    WouldSucceed,
    /// It would die for the reason it died for.
    FailsTheSame,
    /// It would die for another reason.
    FailsDifferently,
    /// It took effect, or the handler finds nothing left to change.
    AlreadyApplied,
    /// It would take effect, after a later message of its ordering key.
    OrderHazard,
    /// It cannot be put back, or not be rehearsed.
    NotPossible,
}

impl Class {
    /// As people read it.
    pub fn in_words(self) -> &'static str {
        match self {
            Class::WouldSucceed => "would succeed",
            Class::FailsTheSame => "fails the same",
            Class::FailsDifferently => "fails differently",
            Class::AlreadyApplied => "already applied",
            Class::OrderHazard => "order hazard",
            Class::NotPossible => "not possible",
        }
    }
}

/// One letter's rehearsal, for people and for plans.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsed {
    pub letter: i64,
    pub worker: String,
    pub event_id: String,
    pub class: Class,
    /// The class in a sentence.
    pub why: String,
    /// What it is the rehearsal of.
    #[serde(flatten)]
    pub basis: Basis,
    pub outputs: Vec<SentOutput>,
    pub state: Vec<StateChange>,
    pub changes: Changes,
    pub logs: String,
}

/// What a rehearsal holds for: another deployment, letter or data may come to something else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// How often the letter was put back before.
    pub generation: u32,
    /// The deployment that was rehearsed; none when the worker has none.
    pub version: Option<u32>,
    /// Over the class, the rows and the state as they were, and where outputs go. What a handler makes up anew each time, such
    /// as a random number, is not in it.
    pub fingerprint: String,
}

/// An output that was not sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentOutput {
    pub id: String,
    pub subject: String,
    pub headers: Vec<(String, String)>,
    /// Base64.
    pub body: String,
}

/// A key of state before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateChange {
    pub key: String,
    pub before: Option<StateValue>,
    pub after: Option<StateValue>,
}

/// A value of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateValue {
    pub version: u64,
    /// Base64.
    pub value: String,
}

/// Rehearses letters, each by itself: what one of them would change, the next one does not see. Those that are not there are
/// left out.
pub async fn rehearse(services: &Services, ids: &[i64]) -> Result<Vec<Rehearsed>> {
    let mut letters = Vec::new();
    for id in ids {
        letters.extend(services.store.letter(*id).await?);
    }
    let mut workers: HashMap<String, Option<Delivery>> = HashMap::new();
    let mut rehearsed = Vec::new();
    for letter in &letters {
        let worker = &letter.summary.worker;
        if !workers.contains_key(worker) {
            workers.insert(worker.clone(), services.current(worker).await?);
        }
        let delivery = workers.get(worker).and_then(Option::as_ref);
        rehearsed.push(rehearse_one(letter, delivery).await?);
    }
    for (worker, delivery) in &workers {
        if let Some(delivery) = delivery {
            mark_hazards(services, delivery, &letters, rehearsed.iter_mut().filter(|one| one.worker == *worker))
                .await?;
        }
    }
    for one in &mut rehearsed {
        one.basis.fingerprint = fingerprint(one);
    }
    Ok(rehearsed)
}

async fn rehearse_one(letter: &LetterRecord, delivery: Option<&Delivery>) -> Result<Rehearsed> {
    let summary = &letter.summary;
    let mut rehearsed = Rehearsed {
        letter: summary.id,
        worker: summary.worker.clone(),
        event_id: summary.event_id.clone(),
        class: Class::NotPossible,
        why: String::new(),
        basis: Basis {
            generation: summary.generation,
            version: delivery.map(|delivery| delivery.version),
            fingerprint: String::new(),
        },
        outputs: Vec::new(),
        state: Vec::new(),
        changes: Changes::default(),
        logs: String::new(),
    };
    match (against(letter), delivery) {
        (Some((class, why)), _) => (rehearsed.class, rehearsed.why) = (class, why.to_owned()),
        (None, None) => rehearsed.why = format!("worker {} is not deployed", summary.worker),
        (None, Some(delivery)) => {
            let rehearsal = delivery.rehearse(Arc::new(message(letter)), ROWS_MAX).await?;
            (rehearsed.class, rehearsed.why) = classify(letter, &rehearsal);
            rehearsed.fill(rehearsal);
        }
    }
    Ok(rehearsed)
}

/// Why a letter is not rehearsed; none when it is.
fn against(letter: &LetterRecord) -> Option<(Class, &'static str)> {
    let is = |reason: Reason| letter.summary.reason == reason.as_str();
    let not = |why| Some((Class::NotPossible, why));
    match letter.summary.state {
        _ if is(Reason::IdReuse) => not("its event id stands for another message"),
        LetterState::Done => Some((Class::AlreadyApplied, "it was put back before and took effect")),
        LetterState::Redriven => not("it was put back and is under way"),
        LetterState::Resolved | LetterState::Dropped => not("it is closed"),
        LetterState::Open if is(Reason::Unreadable) => not("its headers cannot be read"),
        LetterState::Open if is(Reason::CrashedHost) => not("hosts died of it, and it is not tried on one that lives"),
        LetterState::Open => None,
    }
}

/// What the worker would be given.
fn message(letter: &LetterRecord) -> Message {
    let summary = &letter.summary;
    let stored_at = letter.stored_at;
    let origin = summary.stream.clone().zip(summary.stream_sequence);
    Message {
        event_id: summary.event_id.clone(),
        subject: summary.subject.clone(),
        headers: letter.headers.clone(),
        body: letter.edits.last().map_or(&letter.body, |edit| &edit.body).clone(),
        origin: origin.map(|(stream, sequence)| Origin { stream, sequence, stored_at }),
        redriven: Some(Redriven { attempts_before: summary.attempts, payload_sha256: [0; 32] }),
    }
}

fn classify(letter: &LetterRecord, rehearsal: &Rehearsal) -> (Class, String) {
    let summary = &letter.summary;
    if let Some((reason, failure)) = &rehearsal.failure {
        // A rehearsal is one attempt, which proves nothing.
        let proved = summary.reason == Reason::ProvedPoison.as_str();
        let died_of = if proved { Reason::AttemptsExhausted.as_str() } else { summary.reason.as_str() };
        let is_same = died_of == reason.as_str()
            && summary.code == failure.code
            && (failure.code.is_some() || summary.detail == failure.message);
        let class = if is_same { Class::FailsTheSame } else { Class::FailsDifferently };
        let code = failure.code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default();
        return (class, format!("{}{code}: {}", reason.as_str(), failure.message));
    }
    let rows = rehearsal.changes.rows.len();
    let nothing = rows == 0 && rehearsal.changes.not_shown.is_empty();
    if nothing && rehearsal.outputs.is_empty() && rehearsal.state.is_empty() {
        return (Class::AlreadyApplied, "the handler finds nothing to change and nothing to send".to_owned());
    }
    let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let (outputs, keys) = (count(rehearsal.outputs.len(), "output"), count(rehearsal.state.len(), "key"));
    (Class::WouldSucceed, format!("changes {} and {keys} of state, sends {outputs}", count(rows, "row")))
}

impl Rehearsed {
    fn fill(&mut self, rehearsal: Rehearsal) {
        let value = |entry: StateEntry| StateValue { version: entry.version, value: STANDARD.encode(&entry.value) };
        self.state = rehearsal
            .state
            .into_iter()
            .map(|(key, before, after)| StateChange { key, before: before.map(value), after: after.map(value) })
            .collect();
        self.outputs = rehearsal
            .outputs
            .into_iter()
            .map(|output| SentOutput {
                id: output.id,
                subject: output.subject,
                headers: output.headers,
                body: STANDARD.encode(&output.body),
            })
            .collect();
        self.changes = rehearsal.changes;
        self.logs = rehearsal.logs;
    }
}

/// Looks for later messages of the letters' keys that took effect, once for all letters of a worker.
async fn mark_hazards(
    services: &Services,
    delivery: &Delivery,
    letters: &[LetterRecord],
    rehearsed: impl Iterator<Item = &mut Rehearsed>,
) -> Result<()> {
    let worker = &delivery.worker;
    let (Some(ordering_key), Some(source)) = (&worker.ordering_key, &worker.stream) else { return Ok(()) };
    let mut asked: Vec<(&mut Rehearsed, String, u64)> = Vec::new();
    for one in rehearsed.filter(|one| one.class == Class::WouldSucceed) {
        let Some(letter) = letters.iter().find(|letter| letter.summary.id == one.letter) else { continue };
        let message = message(letter);
        let place = message.origin.as_ref().filter(|origin| origin.stream == *source);
        if let (Some(key), Some(place)) = (ordering_key.key_of(&message), place) {
            let sequence = place.sequence;
            asked.push((one, key, sequence));
        }
    }
    let Some(first) = asked.iter().map(|(_, _, sequence)| *sequence).min() else { return Ok(()) };
    let mut passed = Vec::new();
    let is_cut = services
        .bus
        .passed(source, From::Sequence(first + 1), &worker.subjects, LATER_MAX, |one| passed.push(one))
        .await
        .context("look for later messages of the same key")?;
    let stream = services.bus.stream(source).await?.context("look at the worker's stream")?;
    let later = by_key(passed, ordering_key, source, stream.created);
    for (one, key, sequence) in asked {
        let events: Vec<String> = later
            .get(&key)
            .into_iter()
            .flatten()
            .filter(|(later, _)| *later > sequence)
            .map(|(_, event_id)| event_id.clone())
            .collect();
        let done = services.store.done_events(&worker.name, &events).await?;
        if let Some(event) = done.first() {
            one.class = Class::OrderHazard;
            one.why = format!("{} later of its key `{key}` took effect, such as {event}; {}", done.len(), one.why);
        } else if is_cut {
            one.changes.not_shown.push(format!("whether its key is later than message {}", first + LATER_MAX as u64));
        }
    }
    Ok(())
}

/// Sequence and event id of messages, by key.
fn by_key(
    messages: Vec<Passed>,
    ordering_key: &OrderingKey,
    stream: &str,
    created: Timestamp,
) -> HashMap<String, Vec<(u64, String)>> {
    let mut by_key: HashMap<String, Vec<(u64, String)>> = HashMap::new();
    for Passed { sequence, subject, headers } in messages {
        let event_id = event_id(&headers, None, stream, created, sequence).unwrap_or_else(|invalid| invalid.stand_in);
        let body = bytes::Bytes::new();
        let message = Message { event_id, subject, headers, body, origin: None, redriven: None };
        if let Some(key) = ordering_key.key_of(&message) {
            by_key.entry(key).or_default().push((sequence, message.event_id));
        }
    }
    by_key
}

/// What must be as it was for a plan to hold.
fn fingerprint(one: &Rehearsed) -> String {
    let mut inserted: BTreeMap<&str, usize> = BTreeMap::new();
    let mut before: Vec<String> = Vec::new();
    for row in &one.changes.rows {
        match &row.before {
            Some(row_before) => before.push(format!("{} {row_before} {}", row.table, row.after.is_some())),
            None => *inserted.entry(&row.table).or_default() += 1,
        }
    }
    before.sort();
    let state: Vec<_> = one.state.iter().map(|change| (&change.key, &change.before)).collect();
    let outputs: Vec<_> = one.outputs.iter().map(|output| (&output.id, &output.subject)).collect();
    let basis = serde_json::json!([one.class, inserted, before, state, outputs, one.changes.not_shown]);
    hex::encode(Sha256::digest(basis.to_string().as_bytes()))
}
