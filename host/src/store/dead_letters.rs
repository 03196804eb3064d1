//! Dead letters as people read them, and what may be done with each.

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Result, Store};
use crate::model::failure_group::FailureGroup;
use crate::model::message::{Headers, Message};
use crate::model::subject;
use crate::model::verdict::{Reason, Settled};

/// How many letters are read at a time.
const PAGE_SIZE: u32 = 500;

/// Where a dead letter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeadLetterState {
    /// It waits for somebody.
    Open,
    /// It was put back, and nothing is known of it yet.
    Redriven,
    /// It was put back and took effect.
    Done,
    /// A person found that nothing is to be done.
    Resolved,
    /// A person gave it up.
    Dropped,
}

impl DeadLetterState {
    pub fn as_str(self) -> &'static str {
        match self {
            DeadLetterState::Open => "open",
            DeadLetterState::Redriven => "redriven",
            DeadLetterState::Done => "done",
            DeadLetterState::Resolved => "resolved",
            DeadLetterState::Dropped => "dropped",
        }
    }

    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "open" => DeadLetterState::Open,
            "redriven" => DeadLetterState::Redriven,
            "done" => DeadLetterState::Done,
            "resolved" => DeadLetterState::Resolved,
            "dropped" => DeadLetterState::Dropped,
            other => anyhow::bail!("`{other}` is no state of a dead letter"),
        })
    }
}

/// A counted failed attempt, as people read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRecord {
    pub attempt: u32,
    pub at: Timestamp,
    pub version: u32,
    pub code: Option<String>,
    pub error: String,
    pub logs: String,
}

/// One dead letter in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterSummary {
    pub id: i64,
    pub state: DeadLetterState,
    pub worker: String,
    pub event_id: String,
    pub reason: String,
    pub code: Option<String>,
    pub detail: String,
    /// The letters it died with of the same failure; none for one that is older than groups are.
    pub group: Option<String>,
    pub subject: String,
    pub attempts: u32,
    pub version: u32,
    /// The last time, if it died more than once.
    pub died_at: Timestamp,
    /// How often it was put back.
    pub generation: u32,
    /// When it was last put back or closed.
    pub last_action_at: Option<Timestamp>,
    /// Where the message stood; none when it was from no stream.
    pub stream: Option<String>,
    pub stream_sequence: Option<u64>,
}

/// A corrected body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EditRecord {
    pub at: Timestamp,
    pub actor: String,
    pub note: String,
    pub body: Bytes,
}

/// What somebody did to a letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    pub at: Timestamp,
    /// `redrive`, `edit`, `resolve` or `drop`.
    pub action: String,
    pub generation: u32,
    pub actor: String,
    pub note: Option<String>,
}

/// An output of the event of a letter, after it took effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterOutput {
    /// The readable id.
    pub id: String,
    /// What travels as `Nats-Msg-Id`.
    pub message_id: String,
    pub subject: String,
    /// None until it is published.
    pub stream: Option<String>,
    pub stream_sequence: Option<u64>,
}

/// One dead letter, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterRecord {
    pub summary: DeadLetterSummary,
    pub headers: Headers,
    /// The original.
    pub body: Bytes,
    /// When it died the first time, if it was put back since.
    pub first_died_at: Option<Timestamp>,
    /// When its stream stored the message; for an old letter, when it died.
    pub stored_at: Timestamp,
    /// Every failed attempt of its event id at its worker, first to last.
    pub attempts: Vec<AttemptRecord>,
    /// Corrected bodies, first to last.
    pub edits: Vec<EditRecord>,
    pub audit: Vec<AuditRecord>,
    /// `done` or `dead` and since when, if the event is settled.
    pub settled: Option<(String, Timestamp)>,
    /// Those that are still in the outbox.
    pub outputs: Vec<DeadLetterOutput>,
}

/// Which dead letters to list, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeadLetterFilter {
    /// These alone; all when it is empty.
    pub ids: Vec<i64>,
    pub worker: Option<String>,
    pub reason: Option<String>,
    pub code: Option<String>,
    /// The id of a group.
    pub group: Option<String>,
    /// A subject, or a pattern as NATS has them.
    pub subject: Option<String>,
    /// Those that died at this time or later.
    pub since: Option<Timestamp>,
    /// Those that died before this time.
    pub until: Option<Timestamp>,
    /// Also those that are done, resolved or dropped.
    pub closed: bool,
    /// Only ids below this one.
    pub below: Option<i64>,
    pub limit: u32,
}

impl DeadLetterFilter {
    fn matches_subject(&self, dead_letter: &DeadLetterSummary) -> bool {
        self.subject
            .as_ref()
            .is_none_or(|pattern| subject::matches(pattern, &dead_letter.subject))
    }
}

/// Letters that died of the same failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterGroup {
    /// None for letters that are older than groups are.
    pub group: Option<FailureGroup>,
    pub worker: String,
    /// How many of them fit the filter.
    pub dead_letters: u64,
    /// When the first and the last of those died.
    pub first_died_at: Timestamp,
    pub last_died_at: Timestamp,
    /// The newest of those.
    pub last_dead_letter: i64,
    /// The subject of all of them, while they are sorted by it.
    #[serde(skip)]
    pub(super) subject: String,
}

/// How many letters of a worker wait for somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterDepth {
    pub worker: String,
    pub open: u64,
    /// For how long the oldest of them has, in milliseconds.
    pub oldest_ms: u64,
}

/// The groups of all letters that fit, most letters first.
pub async fn grouped_dead_letters(
    store: &dyn Store,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterGroup>> {
    let mut groups: Vec<DeadLetterGroup> = Vec::new();
    for found in store.dead_letter_groups(filter).await? {
        if filter
            .subject
            .as_ref()
            .is_some_and(|pattern| !subject::matches(pattern, &found.subject))
        {
            continue;
        }
        let same = |group: &&mut DeadLetterGroup| {
            group.group == found.group && group.worker == found.worker
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.add(&found),
            None => groups.push(found),
        }
    }
    groups.sort_by_key(|group| {
        (
            std::cmp::Reverse(group.dead_letters),
            group.last_dead_letter,
        )
    });
    groups.truncate(usize::try_from(filter.limit).unwrap_or(usize::MAX));
    Ok(groups)
}

impl DeadLetterGroup {
    fn add(&mut self, other: &DeadLetterGroup) {
        self.dead_letters += other.dead_letters;
        self.first_died_at = self.first_died_at.min(other.first_died_at);
        self.last_died_at = self.last_died_at.max(other.last_died_at);
        self.last_dead_letter = self.last_dead_letter.max(other.last_dead_letter);
    }
}

/// All letters that fit, up to the filter's limit, newest first.
pub async fn all_dead_letters(
    store: &dyn Store,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterSummary>> {
    let wanted = usize::try_from(filter.limit).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    let mut page = DeadLetterFilter {
        limit: PAGE_SIZE,
        ..filter.clone()
    };
    loop {
        let dead_letters = store.dead_letters(&page).await?;
        let is_last = dead_letters.len() < PAGE_SIZE as usize;
        page.below = dead_letters.last().map(|dead_letter| dead_letter.id);
        found.extend(
            dead_letters
                .into_iter()
                .filter(|dead_letter| filter.matches_subject(dead_letter)),
        );
        if is_last || found.len() >= wanted {
            found.truncate(wanted);
            return Ok(found);
        }
    }
}

/// A letter to put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redrive {
    pub id: i64,
    /// Only if it was put back this often so far.
    pub generation: Option<u32>,
    /// Also if it is under way, or closed.
    pub again: bool,
}

/// Who does something, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribution {
    pub actor: String,
    pub note: Option<String>,
}

/// What is done to letters, other than putting them back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeadLetterAction {
    /// Nothing is to be done.
    Resolve,
    /// They are given up.
    Drop,
    /// The worker is to be given this body.
    Edit(Bytes),
}

impl DeadLetterAction {
    /// As the audit has it.
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            DeadLetterAction::Resolve => "resolve",
            DeadLetterAction::Drop => "drop",
            DeadLetterAction::Edit(_) => "edit",
        }
    }

    /// The state that follows; none when it stays as it is.
    pub(super) fn closed_state(&self) -> Option<DeadLetterState> {
        match self {
            DeadLetterAction::Resolve => Some(DeadLetterState::Resolved),
            DeadLetterAction::Drop => Some(DeadLetterState::Dropped),
            DeadLetterAction::Edit(_) => None,
        }
    }
}

/// What came of doing something to one letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterActionResult {
    pub id: i64,
    /// Why it was not done, for a person; none when it was done.
    pub refused: Option<String>,
    /// It was not done because its event took effect meanwhile.
    #[serde(default)]
    pub took_effect: bool,
}

/// What a worker that was pointed to a letter finds.
#[derive(Debug)]
pub enum RedriveLookup {
    /// The message as it was, with its last corrected body if it has one; for this version of the worker, the active one.
    Message(Box<Message>, u32),
    /// Nothing to do: the letter was closed, died again, took effect or was put back once more.
    OutOfDate(Settled),
}

/// A letter as a transaction that is to change it finds it.
pub(super) struct LockedDeadLetter {
    pub id: i64,
    pub worker: String,
    pub event_id: String,
    pub payload_sha256: Vec<u8>,
    pub reason: String,
    pub state: DeadLetterState,
    pub generation: u32,
    /// What the inbox says of its event, unless that is about another payload.
    pub inbox: Option<String>,
}

impl LockedDeadLetter {
    fn is_id_reuse(&self) -> bool {
        self.reason == Reason::IdReuse.as_str()
    }

    /// Whether its event id is its own, so that the inbox speaks of it.
    pub fn owns_event(&self) -> bool {
        !self.is_id_reuse()
    }

    fn is_done(&self) -> bool {
        self.owns_event()
            && (self.state == DeadLetterState::Done || self.inbox.as_deref() == Some("done"))
    }

    /// Why it cannot be put back; none when it can.
    pub fn redrive_refusal(&self, wanted: &Redrive) -> Option<String> {
        if wanted
            .generation
            .is_some_and(|generation| generation != self.generation)
        {
            return Some("somebody put it back since".to_owned());
        }
        match self.state {
            _ if self.is_done() => Some(TOOK_EFFECT.to_owned()),
            _ if self.is_id_reuse() => Some(ID_REUSE.to_owned()),
            _ if self.reason == Reason::Unreadable.as_str() => Some(UNREADABLE.to_owned()),
            DeadLetterState::Redriven if !wanted.again => {
                Some("it was put back and is under way".to_owned())
            }
            DeadLetterState::Resolved | DeadLetterState::Dropped if !wanted.again => {
                Some(format!("it is closed ({})", self.state.as_str()))
            }
            _ => None,
        }
    }

    /// Why it cannot be changed like that; none when it can.
    pub fn action_refusal(&self, action: &DeadLetterAction) -> Option<String> {
        let is_closed = matches!(
            self.state,
            DeadLetterState::Resolved | DeadLetterState::Dropped
        );
        match action {
            _ if self.is_done() => Some(TOOK_EFFECT.to_owned()),
            _ if is_closed => Some(format!("it is closed already ({})", self.state.as_str())),
            DeadLetterAction::Edit(_) if self.is_id_reuse() => Some(ID_REUSE.to_owned()),
            DeadLetterAction::Edit(_) if self.reason == Reason::Unreadable.as_str() => {
                Some(UNREADABLE.to_owned())
            }
            DeadLetterAction::Edit(_) if self.state == DeadLetterState::Redriven => {
                Some("it was put back and is under way".to_owned())
            }
            _ => None,
        }
    }
}

const ID_REUSE: &str = "its event id stands for another message, so the inbox would never let it through; publish its body \
    under an id of its own (`oncely dlq show ID --raw | oncely publish SUBJECT --id NEW`), then resolve it";

const UNREADABLE: &str = "its headers cannot be read, so the worker would not see what was sent; publish its body with proper \
    headers (`oncely dlq show ID --raw | oncely publish SUBJECT --id NEW`), then resolve it";

const TOOK_EFFECT: &str = "it took effect since; nothing is to be done";

/// What came of it for each letter that was asked for, in that order.
pub(super) fn action_results(
    ids: impl IntoIterator<Item = i64>,
    refused: &[(i64, String)],
    done: &[i64],
) -> Vec<DeadLetterActionResult> {
    let why = |id: i64| match refused.iter().find(|(refused, _)| *refused == id) {
        Some((_, why)) => Some(why.clone()),
        None if done.contains(&id) => None,
        None => Some("there is no such letter".to_owned()),
    };
    let moved = |(id, refused): (i64, Option<String>)| {
        let took_effect = refused.as_deref() == Some(TOOK_EFFECT);
        DeadLetterActionResult {
            id,
            refused,
            took_effect,
        }
    };
    ids.into_iter().map(|id| moved((id, why(id)))).collect()
}
