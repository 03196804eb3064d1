//! Dead letters: each has its inbox record, and its notice on the stream of dead letters.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::difference::Kind;
use super::{Findings, PAGE};
use crate::bus::{ScannedMessage, StartPosition, StreamInfo};
use crate::model::dead_letter::{self, DLQ_STREAM};
use crate::model::message::{Message, Origin, header};
use crate::model::verdict::{DeadLetter, Reason};
use crate::services::Services;
use crate::store::{AuditedDeadLetter, Cursor};

/// Maximum clock difference between the database and NATS.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_mins(2);

/// The dead letters of an audit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetterCounts {
    /// Those that died in the window.
    pub dead_letters: u64,
    /// Those whose notice is on the stream.
    pub notices: u64,
    /// Those whose notice is unpublished, or was dropped by an operator.
    pub unpublished: u64,
    /// Those whose notice may have left the stream.
    pub removed: u64,
}

/// A notice is known by the number of its dead letter, and by the generation.
type Notice = (i64, u32);

/// Checks the dead letters that died since a time. Returns those without a notice.
pub(super) async fn check(
    services: &Services,
    since: Timestamp,
    now: Timestamp,
    findings: &mut Findings,
) -> Result<(DeadLetterCounts, Vec<AuditedDeadLetter>)> {
    let Some(info) = services.bus.stream(DLQ_STREAM).await? else {
        findings.note(format!("the stream {DLQ_STREAM} does not exist"));
        return Ok(Default::default());
    };
    // Within the dedupe window the stream would refuse a notice that is sent again.
    let before = now - SignedDuration::try_from(info.duplicate_window).unwrap_or_default();
    let dead_letters = read(services, since, before).await?;
    for one in &dead_letters {
        check_inbox(one, findings);
    }

    // The outbox first: a notice that is published meanwhile is then found on the stream.
    let unpublished = services.store.unpublished_notices().await?;
    let (notices, first) = scan_notices(services, since - CLOCK_SKEW_MAX).await?;
    check_notices(services, &notices, findings).await?;

    let (mut counts, mut missing) = (DeadLetterCounts::default(), Vec::new());
    counts.dead_letters = dead_letters.len() as u64;
    for one in dead_letters {
        if notices.contains_key(&(one.id, one.generation)) {
            counts.notices += 1;
        } else if unpublished.contains(&(one.worker.clone(), one.event_id.clone())) {
            counts.unpublished += 1;
        } else if is_removed(&one, &info, first, now) {
            counts.removed += 1;
        } else {
            let mut difference = Kind::NoticeMissing
                .found(format!(
                    "the notice of dead letter {} is not on the stream {DLQ_STREAM}",
                    one.id
                ))
                .of_event(&one.worker, &one.event_id);
            difference.dead_letter = Some(one.id);
            findings.add(difference);
            missing.push(one);
        }
    }
    Ok((counts, missing))
}

async fn read(
    services: &Services,
    since: Timestamp,
    before: Timestamp,
) -> Result<Vec<AuditedDeadLetter>> {
    let mut found: Vec<AuditedDeadLetter> = Vec::new();
    let mut after = Cursor::at(since);
    loop {
        let page = services
            .store
            .dead_letters_by_age(after, before, PAGE as u32)
            .await?;
        let Some(last) = page.last() else { break };
        after = Cursor {
            at: last.died_at,
            number: last.id,
        };
        found.extend(page);
    }
    Ok(found)
}

/// A dead letter that an operator can still redrive keeps its inbox record, as `dead`.
fn check_inbox(one: &AuditedDeadLetter, findings: &mut Findings) {
    // The inbox record of a reused id belongs to the first message.
    if one.state != "open" || one.reason == Reason::IdReuse.as_str() {
        return;
    }
    let (id, event_id, worker) = (one.id, &one.event_id, &one.worker);
    let difference = match one.inbox.as_deref() {
        None => Kind::LetterWithoutOutcome.found(format!(
            "dead letter {id} is open, and event {event_id} is not in the inbox of {worker}"
        )),
        Some("done") => Kind::DoneAndDead.found(format!(
            "dead letter {id} is open, and event {event_id} of {worker} is done"
        )),
        Some(_) => return,
    };
    let mut difference = difference.of_event(worker, event_id);
    difference.dead_letter = Some(id);
    if difference.kind == Kind::DoneAndDead.as_str() {
        difference.action = format!("check the effects, then: oncely dlq resolve {id}");
    }
    findings.add(difference);
}

/// The notices on the stream since a time, with their sequences, and when its oldest message was
/// stored.
async fn scan_notices(
    services: &Services,
    since: Timestamp,
) -> Result<(BTreeMap<Notice, u64>, Option<Timestamp>)> {
    let mut notices = BTreeMap::new();
    let mut from = StartPosition::Time(since);
    loop {
        let mut last = None;
        let mut visit = |message: ScannedMessage| {
            last = Some(message.sequence);
            let number = |name| header(&message.headers, name)?.parse().ok();
            let Some(id) = number("Oncely-Dead-Letter") else {
                return;
            };
            let generation =
                number("Oncely-Redriven").and_then(|number| u32::try_from(number).ok());
            notices.insert((id, generation.unwrap_or_default()), message.sequence);
        };
        let has_more = services
            .bus
            .scan_messages(DLQ_STREAM, from, &[], PAGE, &mut visit)
            .await?;
        match last {
            Some(last) if has_more => from = StartPosition::Sequence(last + 1),
            _ => break,
        }
    }
    let first = match services.bus.stream(DLQ_STREAM).await? {
        Some(info) if info.messages > 0 => {
            services
                .bus
                .stored_at(DLQ_STREAM, info.first_sequence)
                .await?
        }
        _ => None,
    };
    Ok((notices, first))
}

/// Reports notices without a dead letter. Dead letters are never deleted.
async fn check_notices(
    services: &Services,
    notices: &BTreeMap<Notice, u64>,
    findings: &mut Findings,
) -> Result<()> {
    let ids: BTreeSet<i64> = notices.keys().map(|(id, _)| *id).collect();
    let ids: Vec<i64> = ids.into_iter().collect();
    let mut known = BTreeSet::new();
    for chunk in ids.chunks(PAGE) {
        known.extend(services.store.existing_dead_letters(chunk).await?);
    }
    for ((id, _), sequence) in notices.iter().filter(|((id, _), _)| !known.contains(id)) {
        let mut difference = Kind::NoticeWithoutLetter
            .found(format!(
                "message {sequence} of {DLQ_STREAM} is the notice of dead letter {id}, which does \
                 not exist"
            ))
            .at(DLQ_STREAM, *sequence);
        difference.dead_letter = Some(*id);
        findings.add(difference);
    }
    Ok(())
}

/// Whether the stream may have removed the notice: by age, or because it begins later.
fn is_removed(
    one: &AuditedDeadLetter,
    info: &StreamInfo,
    first: Option<Timestamp>,
    now: Timestamp,
) -> bool {
    let age = Duration::try_from(now.duration_since(one.died_at)).unwrap_or_default();
    if info.max_age.is_some_and(|max_age| age >= max_age) {
        return true;
    }
    match first {
        // A stream without a limit begins with its first notice, unless it was purged.
        Some(first) => one.died_at + CLOCK_SKEW_MAX < first,
        None => info.last_sequence > 0,
    }
}

/// Sends the notice of a dead letter again.
pub(super) async fn resend(services: &Services, one: &AuditedDeadLetter) -> Result<bool> {
    let Some(record) = services.store.find_dead_letter(one.id).await? else {
        return Ok(false);
    };
    let summary = record.summary;
    let reason = Reason::ALL
        .iter()
        .copied()
        .find(|reason| reason.as_str() == summary.reason)
        .with_context(|| format!("read the reason `{}`", summary.reason))?;
    let origin = summary.stream.zip(summary.stream_sequence);
    let dead_letter = DeadLetter {
        worker: summary.worker,
        version: summary.version,
        reason,
        code: summary.code,
        detail: summary.detail,
        frames: Vec::new(),
        attempts: summary.attempts,
        message: Message {
            event_id: summary.event_id,
            subject: summary.subject,
            headers: record.headers,
            body: record.body,
            origin: origin.map(|(stream, sequence)| Origin {
                stream,
                sequence,
                stored_at: record.stored_at,
            }),
            redriven: None,
        },
    };
    let notice = dead_letter::notice(&dead_letter, services.bus.max_payload());
    let since = std::time::Instant::now();
    let rows = services
        .store
        .resend_notice(&dead_letter, notice, one.id, one.generation)
        .await?;
    services.publish_outputs(rows, since).await;
    Ok(true)
}
