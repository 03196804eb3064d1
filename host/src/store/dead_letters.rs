//! Dead letters as operators see them, and the actions on them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use bytes::Bytes;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GroupNote, Result, Store};
use crate::model::failure_group::FailureGroup;
use crate::model::message::{Headers, Message};
use crate::model::schema::Time;
use crate::model::subject;
use crate::model::verdict::{Reason, Settled};

/// How many dead letters are read per page.
const PAGE_SIZE: u32 = 500;

/// The state of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeadLetterState {
    /// It waits for an operator.
    Open,
    /// It was redriven, and the new delivery has no outcome yet.
    Redriven,
    /// It was redriven and took effect.
    Done,
    /// An operator closed it: no action is needed.
    Resolved,
    /// An operator dropped it: it will not be handled.
    Dropped,
}

impl DeadLetterState {
    /// The name in the database and in JSON.
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
            other => anyhow::bail!("`{other}` is not a dead-letter state"),
        })
    }
}

/// A counted failed attempt, for display.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttemptRecord {
    /// 1 for the first attempt at the event.
    pub attempt: u32,
    /// When the attempt was counted.
    #[schemars(with = "Time")]
    pub at: Timestamp,
    /// The version of the worker that made the attempt.
    pub version: u32,
    /// The handler's own code, or a code of the host such as `trap`; `None` for no code.
    pub code: Option<String>,
    /// The failure in words.
    pub error: String,
    /// The handler's log, one line per entry.
    pub logs: String,
}

/// One dead letter in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetterSummary {
    /// The number that operators pass to the commands, unique in the database.
    pub id: i64,
    /// Whether it is open, redriven or closed.
    pub state: DeadLetterState,
    /// The name of the worker.
    pub worker: String,
    /// The deduplication key of the message.
    pub event_id: String,
    /// The name of a [`Reason`], such as `attempts-exhausted`.
    pub reason: String,
    /// The handler's own code for the failure, if any.
    pub code: Option<String>,
    /// The failure in words, for display.
    pub detail: String,
    /// The group of dead letters with the same failure; `None` for a dead letter that is older than
    /// groups.
    pub group: Option<String>,
    /// The subject the message was published to.
    pub subject: String,
    /// Failed attempts at the event when it was last dead-lettered; 0 if it was not handled.
    pub attempts: u32,
    /// The version of the worker that dead-lettered it last.
    pub version: u32,
    /// The last time, if it was dead-lettered more than once.
    #[schemars(with = "Time")]
    pub died_at: Timestamp,
    /// How many times it was redriven.
    pub generation: u32,
    /// When it was last redriven or closed.
    #[schemars(with = "Option<Time>")]
    pub last_action_at: Option<Timestamp>,
    /// The stream of the message; `None` if it came from no stream.
    pub stream: Option<String>,
    /// The sequence on that stream.
    pub stream_sequence: Option<u64>,
}

impl DeadLetterSummary {
    /// The sort key for redrives: the order of the streams.
    pub fn stream_order(&self) -> (&str, Option<&str>, Option<u64>, i64) {
        let stream = self.stream.as_deref();
        (&self.worker, stream, self.stream_sequence, self.id)
    }
}

/// A corrected body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EditRecord {
    /// When the body was stored.
    pub at: Timestamp,
    /// The name of the operator.
    pub actor: String,
    /// The reason, as the operator wrote it.
    pub note: String,
    /// The whole corrected body.
    pub body: Bytes,
}

/// An operator's action on a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditRecord {
    /// When the action was done.
    #[schemars(with = "Time")]
    pub at: Timestamp,
    /// `redrive`, `edit`, `resolve` or `drop`.
    pub action: String,
    /// How many times the dead letter was redriven by then, this action included.
    pub generation: u32,
    /// The name of the operator's token.
    pub actor: String,
    /// The name that the client stated.
    pub stated_name: Option<String>,
    /// The reason, as the operator wrote it; `None` if none was stated.
    pub note: Option<String>,
}

/// An output of a dead letter's event, after the event took effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetterOutput {
    /// The readable id.
    pub id: String,
    /// The value of `Nats-Msg-Id`.
    pub message_id: String,
    /// The subject to publish to.
    pub subject: String,
    /// `None` until it is published.
    pub stream: Option<String>,
    /// The sequence on that stream; `None` until it is published.
    pub stream_sequence: Option<u64>,
}

/// One dead letter with all its details.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterRecord {
    /// The fields that a list shows as well.
    pub summary: DeadLetterSummary,
    /// The headers of the message, in order.
    pub headers: Headers,
    /// The original body.
    pub body: Bytes,
    /// When it was first dead-lettered, if it was redriven since.
    pub first_died_at: Option<Timestamp>,
    /// When the stream stored the message. For an old dead letter, when it was dead-lettered.
    pub stored_at: Timestamp,
    /// Every failed attempt of its event id at its worker, oldest first.
    pub attempts: Vec<AttemptRecord>,
    /// Corrected bodies, oldest first.
    pub edits: Vec<EditRecord>,
    /// The operators' actions, oldest first.
    pub audit: Vec<AuditRecord>,
    /// The state of its event id in the inbox, `done` or `dead`, with the time; `None` for no row.
    pub inbox: Option<(String, Timestamp)>,
    /// The outputs that are still in the outbox.
    pub outputs: Vec<DeadLetterOutput>,
}

/// A filter for dead letters. Results are sorted newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DeadLetterFilter {
    /// Only these ids; all if it is empty.
    pub ids: Vec<i64>,
    /// The name of a worker; `None` for all workers.
    pub worker: Option<String>,
    /// The name of a [`Reason`]; `None` for all reasons.
    pub reason: Option<String>,
    /// The handler's own code for the failure; `None` for all.
    pub code: Option<String>,
    /// The id of a group.
    pub group: Option<String>,
    /// A subject, or a pattern with NATS wildcards.
    pub subject: Option<String>,
    /// Dead-lettered at this time or later.
    #[schemars(with = "Option<Time>")]
    pub since: Option<Timestamp>,
    /// Dead-lettered before this time.
    #[schemars(with = "Option<Time>")]
    pub until: Option<Timestamp>,
    /// Include done, resolved and dropped ones.
    pub closed: bool,
    /// Only ids below this one.
    pub below: Option<i64>,
    /// The maximum number of results.
    pub limit: u32,
}

impl DeadLetterFilter {
    /// The subject, unless it is a pattern.
    pub(super) fn exact_subject(&self) -> Option<&str> {
        let subject = self.subject.as_deref();
        subject.filter(|subject| !subject.contains(['*', '>']))
    }

    /// The text before the first wildcard of a pattern: all subjects that match begin with it.
    pub(super) fn subject_prefix(&self) -> Option<&str> {
        let pattern = self.subject.as_deref()?;
        let (prefix, _) = pattern.split_at(pattern.find(['*', '>'])?);
        Some(prefix)
    }

    /// Whether the subject is a pattern that the database cannot compare: its prefix does not
    /// decide, as that of `orders.>` does.
    pub(super) fn has_wildcard(&self) -> bool {
        let (Some(pattern), Some(prefix)) = (self.subject.as_deref(), self.subject_prefix()) else {
            return false;
        };
        let is_decided = pattern.get(prefix.len()..) == Some(">")
            && (prefix.is_empty() || prefix.ends_with('.'));
        !is_decided
    }

    fn matches_subject(&self, dead_letter: &DeadLetterSummary) -> bool {
        self.subject
            .as_ref()
            .is_none_or(|pattern| subject::matches(pattern, &dead_letter.subject))
    }
}

/// Dead letters with the same failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetterGroup {
    /// `None` for dead letters that are older than groups.
    pub group: Option<FailureGroup>,
    /// The name of the worker.
    pub worker: String,
    /// How many of them match the filter.
    pub dead_letters: u64,
    /// When the first and the last of them were dead-lettered.
    #[schemars(with = "Time")]
    pub first_died_at: Timestamp,
    /// Equal to `first_died_at` if there is one dead letter.
    #[schemars(with = "Time")]
    pub last_died_at: Timestamp,
    /// The id of the newest one.
    pub last_dead_letter: i64,
    /// The owner and the note of the group, if an operator has set them.
    #[serde(default)]
    pub note: Option<GroupNote>,
    /// The subject of all of them, before groups of different subjects are merged.
    #[serde(skip)]
    pub(super) subject: String,
}

/// Count and age of a worker's open dead letters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterDepth {
    /// The name of the worker.
    pub worker: String,
    /// How many are open; redriven and closed ones do not count.
    pub open: u64,
    /// Age of the oldest one, in milliseconds.
    pub oldest_ms: u64,
}

/// The groups of all matching dead letters, largest group first.
pub async fn grouped_dead_letters(
    store: &Store,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterGroup>> {
    let found = store.dead_letter_groups(filter).await?;
    let Some(pattern) = filter.subject.as_ref().filter(|_| filter.has_wildcard()) else {
        return Ok(found);
    };

    // Merge the groups of all subjects that match.
    let mut merged: HashMap<(String, Option<String>), DeadLetterGroup> = HashMap::new();
    for found in found {
        if !subject::matches(pattern, &found.subject) {
            continue;
        }
        let id = found.group.as_ref().map(|group| group.id.clone());
        match merged.entry((found.worker.clone(), id)) {
            Entry::Occupied(mut group) => group.get_mut().add(&found),
            Entry::Vacant(free) => {
                free.insert(found);
            }
        }
    }
    let mut groups: Vec<DeadLetterGroup> = merged.into_values().collect();
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

/// All matching dead letters up to the filter's limit, newest first.
pub async fn all_dead_letters(
    store: &Store,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetterSummary>> {
    Ok(dead_letters_within(store, filter, u32::MAX).await?.0)
}

/// Like [`all_dead_letters`], but reads at most `pages_max` pages of 500 dead letters. A subject
/// with wildcards may match few of many. The second value is the last id that was read, if there
/// may be more below it.
pub async fn dead_letters_within(
    store: &Store,
    filter: &DeadLetterFilter,
    pages_max: u32,
) -> Result<(Vec<DeadLetterSummary>, Option<i64>)> {
    let wanted = usize::try_from(filter.limit).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    let mut page = DeadLetterFilter {
        limit: PAGE_SIZE,
        ..filter.clone()
    };
    // Without wildcards all that are read match.
    if !filter.has_wildcard() {
        page.limit = PAGE_SIZE.min(filter.limit);
    }
    let mut pages = 0;
    loop {
        let dead_letters = store.dead_letters(&page).await?;
        pages += 1;
        let is_last = dead_letters.len() < page.limit as usize;
        page.below = dead_letters.last().map(|dead_letter| dead_letter.id);
        found.extend(
            dead_letters
                .into_iter()
                .filter(|dead_letter| filter.matches_subject(dead_letter)),
        );
        if is_last || found.len() >= wanted || pages >= pages_max {
            let is_cut = found.len() > wanted;
            found.truncate(wanted);
            let last = match found.last() {
                Some(last) if is_cut => Some(last.id),
                _ => page.below,
            };
            return Ok((found, last.filter(|_| is_cut || !is_last)));
        }
    }
}

/// How many dead letters match a filter, and the id of the newest one.
pub async fn count_dead_letters(
    store: &Store,
    filter: &DeadLetterFilter,
) -> Result<(u64, Option<i64>)> {
    if !filter.has_wildcard() {
        return store.count_dead_letters(filter).await;
    }
    let all = DeadLetterFilter {
        limit: u32::MAX,
        ..filter.clone()
    };
    let groups = grouped_dead_letters(store, &all).await?;
    let newest = groups.iter().map(|group| group.last_dead_letter).max();
    Ok((groups.iter().map(|group| group.dead_letters).sum(), newest))
}

/// A dead letter to redrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Redrive {
    /// The id of the dead letter.
    pub id: i64,
    /// Refuse unless this is its number of redrives so far.
    pub generation: Option<u32>,
    /// Redrive it even if a redrive is in progress or it is closed.
    pub again: bool,
}

/// The actor of an action, and the actor's reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribution {
    /// The name of the operator's token.
    pub actor: String,
    /// The name that the client states. Nothing vouches for it.
    #[serde(default)]
    pub stated_name: Option<String>,
    /// The reason, as the operator wrote it; `None` if none was stated.
    pub note: Option<String>,
}

/// An action on dead letters other than a redrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeadLetterAction {
    /// Close them: no action is needed.
    Resolve,
    /// Drop them: they will not be handled.
    Drop,
    /// Replace the body that the worker receives.
    Edit(Bytes),
}

impl DeadLetterAction {
    /// The name of the action in the audit.
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            DeadLetterAction::Resolve => "resolve",
            DeadLetterAction::Drop => "drop",
            DeadLetterAction::Edit(_) => "edit",
        }
    }

    /// The state after the action; `None` if the state does not change.
    pub(super) fn closed_state(&self) -> Option<DeadLetterState> {
        match self {
            DeadLetterAction::Resolve => Some(DeadLetterState::Resolved),
            DeadLetterAction::Drop => Some(DeadLetterState::Dropped),
            DeadLetterAction::Edit(_) => None,
        }
    }
}

/// A dead letter as a client saw it. An action with it is refused if the dead letter has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SeenDeadLetter {
    /// The id of the dead letter.
    pub id: i64,
    /// Its state.
    pub state: DeadLetterState,
    /// How many times it was redriven.
    pub generation: u32,
    /// How many corrected bodies it has.
    pub edits: u32,
}

/// The result of an action on one dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetterActionResult {
    /// The id of the dead letter.
    pub id: i64,
    /// The reason for a refusal, for display; `None` if the action was done.
    pub refused: Option<String>,
    /// The action was refused because the event took effect meanwhile.
    #[serde(default)]
    pub took_effect: bool,
    /// The action was refused because the dead letter was redriven meanwhile, and the result of
    /// that is pending.
    #[serde(default)]
    pub in_progress: bool,
}

/// The result of following a pointer to a dead letter.
#[derive(Debug)]
pub enum RedriveLookup {
    /// The original message with its last corrected body, if any, and the active version of the
    /// worker.
    Message(Box<Message>, u32),
    /// Nothing to do: the dead letter was closed, dead-lettered again, took effect or was redriven
    /// again.
    OutOfDate(Settled),
}

/// A locked dead letter, in the transaction that is about to change it.
pub(super) struct LockedDeadLetter {
    pub id: i64,
    pub worker: String,
    pub event_id: String,
    pub reason: String,
    pub state: DeadLetterState,
    pub generation: u32,
    /// The state of its event id in the inbox. Check `owns_event` first: the record of a reused id
    /// is about another message.
    pub inbox: Option<String>,
}

impl LockedDeadLetter {
    fn is_id_reuse(&self) -> bool {
        self.reason == Reason::IdReuse.as_str()
    }

    /// Whether its event id is its own, so that the inbox record is about it.
    pub fn owns_event(&self) -> bool {
        !self.is_id_reuse()
    }

    fn is_done(&self) -> bool {
        self.owns_event()
            && (self.state == DeadLetterState::Done || self.inbox.as_deref() == Some("done"))
    }

    /// The reason why it cannot be redriven; `None` if it can.
    pub fn redrive_refusal(&self, wanted: &Redrive) -> Option<String> {
        let is_outdated = wanted
            .generation
            .is_some_and(|generation| generation != self.generation);
        if is_outdated && self.is_done() {
            return Some(TOOK_EFFECT.to_owned());
        }
        if is_outdated && self.state == DeadLetterState::Redriven && !wanted.again {
            return Some(IN_PROGRESS.to_owned());
        }
        if is_outdated {
            return Some("it was redriven since".to_owned());
        }
        match self.state {
            _ if self.is_done() => Some(TOOK_EFFECT.to_owned()),
            _ if self.is_id_reuse() => Some(ID_REUSE.to_owned()),
            _ if self.reason == Reason::Unreadable.as_str() => Some(UNREADABLE.to_owned()),
            DeadLetterState::Redriven if !wanted.again => Some(IN_PROGRESS.to_owned()),
            DeadLetterState::Resolved | DeadLetterState::Dropped if !wanted.again => {
                Some(format!("it is closed ({})", self.state.as_str()))
            }
            _ => None,
        }
    }

    /// The reason why an action is refused whose client saw it otherwise; `None` if it did not.
    pub fn change_since(&self, seen: &SeenDeadLetter, edits: u32) -> Option<String> {
        match () {
            () if seen.generation != self.generation => Some("it was redriven since".to_owned()),
            () if seen.state != self.state => Some(format!(
                "it was {} and is {} now",
                seen.state.as_str(),
                self.state.as_str()
            )),
            () if seen.edits != edits => Some("its body was corrected since".to_owned()),
            () => None,
        }
    }

    /// The reason why the action is refused; `None` if it is not.
    pub fn action_refusal(&self, action: &DeadLetterAction) -> Option<String> {
        let is_closed = matches!(
            self.state,
            DeadLetterState::Resolved | DeadLetterState::Dropped
        );
        match action {
            _ if self.is_done() => Some(TOOK_EFFECT.to_owned()),
            _ if is_closed => Some(format!("it is already closed ({})", self.state.as_str())),
            DeadLetterAction::Edit(_) if self.is_id_reuse() => Some(ID_REUSE.to_owned()),
            DeadLetterAction::Edit(_) if self.reason == Reason::Unreadable.as_str() => {
                Some(UNREADABLE.to_owned())
            }
            DeadLetterAction::Edit(_) if self.state == DeadLetterState::Redriven => {
                Some(IN_PROGRESS.to_owned())
            }
            _ => None,
        }
    }
}

const ID_REUSE: &str = "its event id stands for another message, so the inbox would reject it; \
    publish its body under a new id \
    (`oncely dlq show ID --raw | oncely publish SUBJECT --id NEW`), then resolve it";

const UNREADABLE: &str = "its headers cannot be read, so the worker would receive another message; \
    publish its body with valid headers \
    (`oncely dlq show ID --raw | oncely publish SUBJECT --id NEW`), then resolve it";

const TOOK_EFFECT: &str = "it took effect since; nothing to do";
const IN_PROGRESS: &str = "its redrive is in progress";

/// The results for all requested dead letters, in the order of `ids`.
pub(super) fn action_results(
    ids: impl IntoIterator<Item = i64>,
    refused: &[(i64, String)],
    done: &[i64],
) -> Vec<DeadLetterActionResult> {
    let why = |id: i64| match refused.iter().find(|(refused, _)| *refused == id) {
        Some((_, why)) => Some(why.clone()),
        None if done.contains(&id) => None,
        None => Some("no such dead letter".to_owned()),
    };
    ids.into_iter()
        .map(|id| action_result(id, why(id)))
        .collect()
}

/// The result for one dead letter, from the reason of its refusal, if it was refused.
pub(super) fn action_result(id: i64, refused: Option<String>) -> DeadLetterActionResult {
    let took_effect = refused.as_deref() == Some(TOOK_EFFECT);
    let in_progress = refused.as_deref() == Some(IN_PROGRESS);
    DeadLetterActionResult {
        id,
        refused,
        took_effect,
        in_progress,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_database_compares_patterns_that_end_with_all_tokens() {
        let filter = |subject: &str| DeadLetterFilter {
            subject: Some(subject.to_owned()),
            ..DeadLetterFilter::default()
        };
        for (subject, prefix, has_wildcard) in [
            ("orders.placed", None, false),
            ("orders.>", Some("orders."), false),
            (">", Some(""), false),
            ("orders.*.paid", Some("orders."), true),
            ("*.paid.>", Some(""), true),
            ("orders>", Some("orders"), true),
        ] {
            let filter = filter(subject);
            assert_eq!(filter.subject_prefix(), prefix, "{subject}");
            assert_eq!(filter.has_wildcard(), has_wildcard, "{subject}");
        }
        assert!(!DeadLetterFilter::default().has_wildcard());
    }
}
