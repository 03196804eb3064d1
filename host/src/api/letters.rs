//! Dead letters over the control API: finding them, and what people do with them.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Answer, Failure};
use crate::dlq::dry_run::{self, Basis, Rehearsed};
use crate::dlq::replay::{self, Replayable};
use crate::dlq::verify::{self, Verification};
use crate::model::hint::WithHint;
use crate::model::message;
use crate::runtime::Host;
use crate::store::conflict::pause_after;
use crate::store::{
    self, AttemptRecord, AuditRecord, By, LetterFilter, LetterGroup, LetterOutput, LetterRecord, LetterSummary, Move,
    Moved, Redrive, StoreError,
};

/// How many letters one request may move: each request is one transaction.
const MOVED_MAX: usize = 500;

/// How often a transaction is run again at once because another one stood in its way.
const CONFLICTS_MAX: u32 = 5;

pub(super) fn routes() -> Router<Arc<Host>> {
    Router::new()
        .route("/letters/find", post(find))
        .route("/letters/groups", post(groups))
        .route("/letters/{id}", get(letter))
        .route("/letters/{id}/replay", get(replayable))
        .route("/letters/redrive", post(redrive))
        .route("/letters/rehearse", post(rehearse))
        .route("/letters/verify", post(verify))
        .route("/letters/redrive-planned", post(redrive_planned))
        .route("/letters/close", post(close))
        .route("/letters/{id}/edit", post(edit))
}

async fn find(State(host): State<Arc<Host>>, Json(filter): Json<LetterFilter>) -> Answer<Vec<LetterSummary>> {
    Ok(Json(store::all_letters(&*host.services.store, &filter).await?))
}

async fn groups(State(host): State<Arc<Host>>, Json(filter): Json<LetterFilter>) -> Answer<Vec<LetterGroup>> {
    Ok(Json(store::groups_of(&*host.services.store, &filter).await?))
}

/// One dead letter, whole.
#[derive(Debug, Serialize, Deserialize)]
pub struct Letter {
    #[serde(flatten)]
    pub summary: LetterSummary,
    /// When it died the first time, if it was put back since.
    pub first_died_at: Option<Timestamp>,
    /// Of its `traceparent`.
    pub trace_id: Option<String>,
    pub headers: Vec<(String, String)>,
    /// The original, in Base64.
    pub body: String,
    /// Every failed attempt.
    pub story: Vec<AttemptRecord>,
    /// Corrected bodies, first to last; the last one is what the worker is given.
    pub edits: Vec<Edited>,
    /// What people did.
    pub audit: Vec<AuditRecord>,
    /// What the inbox says of its event.
    pub settled: Option<Settled>,
    /// What its event sent, as long as it is in the outbox.
    pub outputs: Vec<LetterOutput>,
}

/// A corrected body.
#[derive(Debug, Serialize, Deserialize)]
pub struct Edited {
    pub at: Timestamp,
    pub actor: String,
    pub note: String,
    /// Base64.
    pub body: String,
}

/// The final word on an event.
#[derive(Debug, Serialize, Deserialize)]
pub struct Settled {
    /// `done` or `dead`.
    pub state: String,
    pub at: Timestamp,
}

impl From<LetterRecord> for Letter {
    fn from(record: LetterRecord) -> Self {
        let edited = |edit: store::EditRecord| Edited {
            at: edit.at,
            actor: edit.actor,
            note: edit.note,
            body: STANDARD.encode(&edit.body),
        };
        Letter {
            trace_id: message::header(&record.headers, "traceparent").and_then(trace_id),
            summary: record.summary,
            first_died_at: record.first_died_at,
            headers: record.headers,
            body: STANDARD.encode(&record.body),
            story: record.attempts,
            edits: record.edits.into_iter().map(edited).collect(),
            audit: record.audit,
            settled: record.settled.map(|(state, at)| Settled { state, at }),
            outputs: record.outputs,
        }
    }
}

/// The trace of a W3C `traceparent`: the second of its four parts.
fn trace_id(traceparent: &str) -> Option<String> {
    let id = traceparent.split('-').nth(1)?;
    (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned())
}

async fn letter(State(host): State<Arc<Host>>, Path(id): Path<i64>) -> Answer<Letter> {
    let record = host.services.store.letter(id).await?.ok_or_else(|| no_such_letter(id))?;
    Ok(Json(record.into()))
}

/// What a replay of its last attempt needs, but for the component.
async fn replayable(State(host): State<Arc<Host>>, Path(id): Path<i64>) -> Answer<Option<Replayable>> {
    let letter = host.services.store.letter(id).await?.ok_or_else(|| no_such_letter(id))?;
    Ok(Json(replay::replayable(&*host.services.store, &letter).await?))
}

fn no_such_letter(id: i64) -> Failure {
    Failure(StatusCode::NOT_FOUND, anyhow!("there is no dead letter {id}").hint("oncely dlq list"))
}

/// Letters to put back.
#[derive(Debug, Serialize, Deserialize)]
pub struct RedriveRequest {
    pub letters: Vec<Redrive>,
    pub by: By,
}

async fn redrive(State(host): State<Arc<Host>>, Json(request): Json<RedriveRequest>) -> Answer<Vec<Moved>> {
    check_count(request.letters.len())?;
    let since = Instant::now();
    let (moved, rows) = insisting(|| host.services.store.redrive(&request.letters, &request.by)).await?;
    host.services.publish_soon(rows, since).await;
    Ok(Json(moved))
}

/// Letters to rehearse or to verify.
#[derive(Debug, Serialize, Deserialize)]
pub struct LettersRequest {
    pub ids: Vec<i64>,
}

async fn rehearse(State(host): State<Arc<Host>>, Json(request): Json<LettersRequest>) -> Answer<Vec<Rehearsed>> {
    check_count(request.ids.len())?;
    Ok(Json(dry_run::rehearse(&host.services, &request.ids).await?))
}

async fn verify(State(host): State<Arc<Host>>, Json(request): Json<LettersRequest>) -> Answer<Verification> {
    Ok(Json(verify::verify(&host.services, &request.ids).await?))
}

/// Letters to put back if they would still come to what was planned.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlannedRequest {
    pub letters: Vec<Planned>,
    pub by: By,
}

/// What was planned for one letter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Planned {
    pub id: i64,
    pub basis: Basis,
}

/// Rehearses again right before it puts letters back, and leaves those that would come to something else.
async fn redrive_planned(State(host): State<Arc<Host>>, Json(request): Json<PlannedRequest>) -> Answer<Vec<Moved>> {
    check_count(request.letters.len())?;
    let ids: Vec<i64> = request.letters.iter().map(|planned| planned.id).collect();
    let now = dry_run::rehearse(&host.services, &ids).await?;
    let mut answers = Vec::new();
    let mut letters = Vec::new();
    for planned in &request.letters {
        let now = now.iter().find(|rehearsed| rehearsed.letter == planned.id);
        match now.map_or_else(|| Some("there is no such letter".to_owned()), |now| moved_since(&planned.basis, now)) {
            Some(why) => answers.push(Moved { id: planned.id, refused: Some(why), took_effect: false }),
            None => {
                let generation = Some(planned.basis.generation);
                letters.push(Redrive { id: planned.id, generation, again: false });
            }
        }
    }
    let since = Instant::now();
    let (moved, rows) = insisting(|| host.services.store.redrive(&letters, &request.by)).await?;
    host.services.publish_soon(rows, since).await;
    answers.extend(moved);
    Ok(Json(answers))
}

/// Why a plan does not hold any more; none when it does.
fn moved_since(planned: &Basis, now: &Rehearsed) -> Option<String> {
    if *planned == now.basis {
        return None;
    }
    Some(match (planned.version, now.basis.version) {
        (Some(then), Some(version)) if then != version => {
            format!(
                "it was planned with version {then} of {}, and version {version} is deployed now; plan anew",
                now.worker
            )
        }
        _ if planned.generation != now.basis.generation => "somebody put it back since".to_owned(),
        _ => format!("what it would change moved since it was planned; now it {}: {}", now.class.in_words(), now.why),
    })
}

/// Letters to close.
#[derive(Debug, Serialize, Deserialize)]
pub struct CloseRequest {
    pub ids: Vec<i64>,
    pub closing: Closing,
    pub by: By,
}

/// How to close a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Closing {
    Resolve,
    Drop,
}

async fn close(State(host): State<Arc<Host>>, Json(request): Json<CloseRequest>) -> Answer<Vec<Moved>> {
    check_count(request.ids.len())?;
    let what = match request.closing {
        Closing::Resolve => Move::Resolve,
        Closing::Drop => Move::Drop,
    };
    Ok(Json(insisting(|| host.services.store.move_letters(&request.ids, &what, &request.by)).await?))
}

/// A corrected body for one letter.
#[derive(Debug, Serialize, Deserialize)]
pub struct EditRequest {
    /// Base64.
    pub body: String,
    pub by: By,
}

async fn edit(
    State(host): State<Arc<Host>>,
    Path(id): Path<i64>,
    Json(request): Json<EditRequest>,
) -> Answer<Vec<Moved>> {
    if request.by.note.as_deref().is_none_or(|note| note.trim().is_empty()) {
        return Err(anyhow!("a corrected body needs a note that says why").hint("--note 'what was wrong'").into());
    }
    if host.services.store.letter(id).await?.is_none() {
        return Err(no_such_letter(id));
    }
    let what = Move::Edit(STANDARD.decode(&request.body).context("read the body")?.into());
    let ids = [id];
    Ok(Json(insisting(|| host.services.store.move_letters(&ids, &what, &request.by)).await?))
}

fn check_count(count: usize) -> anyhow::Result<()> {
    anyhow::ensure!(count <= MOVED_MAX, "{count} letters are too many for one request; {MOVED_MAX} are allowed");
    Ok(())
}

/// Runs a transaction again while others stand in its way.
async fn insisting<T, Fut>(operation: impl Fn() -> Fut) -> store::Result<T>
where
    Fut: Future<Output = store::Result<T>>,
{
    let mut conflicts = 0;
    loop {
        match operation().await {
            Err(StoreError::Conflict(_)) if conflicts < CONFLICTS_MAX => {
                conflicts += 1;
                pause_after(conflicts).await;
            }
            answer => return answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_read_from_a_traceparent_that_is_one() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace_id(&format!("00-{trace}-00f067aa0ba902b7-01")).as_deref(), Some(trace));
        assert!(trace_id("garbage").is_none() && trace_id("00-xyz-1-1").is_none());
    }
}
