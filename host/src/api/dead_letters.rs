//! Dead letters in the control API: find, inspect, redrive, edit and close them.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::access::{Caller, StatedBy};
use super::activity::{on_object, recorded};
use super::{ApiError, ApiResult};
use crate::dlq::dry_run::{self, Preconditions, Preview};
use crate::dlq::replay::{self, Replayable};
use crate::dlq::verify::{self, Verification};
use crate::model::hint::WithHint;
use crate::model::message;
use crate::model::schema::Time;
use crate::runtime::Host;
use crate::store::conflict::pause_after;
use crate::store::{
    self, AttemptRecord, Attribution, AuditRecord, DeadLetterAction, DeadLetterActionResult,
    DeadLetterFilter, DeadLetterGroup, DeadLetterOutput, DeadLetterRecord, DeadLetterSummary,
    NewActivity, Redrive, SeenDeadLetter, StoreError,
};

/// The maximum number of dead letters per request: each request is one transaction.
const DEAD_LETTERS_MAX: usize = 500;

/// Maximum number of retries of a transaction at once after conflicts.
const CONFLICTS_MAX: u32 = 5;

pub async fn find(
    State(host): State<Arc<Host>>,
    Json(filter): Json<DeadLetterFilter>,
) -> ApiResult<Vec<DeadLetterSummary>> {
    Ok(Json(
        store::all_dead_letters(&host.services.store, &filter).await?,
    ))
}

pub async fn groups(
    State(host): State<Arc<Host>>,
    Json(filter): Json<DeadLetterFilter>,
) -> ApiResult<Vec<DeadLetterGroup>> {
    Ok(Json(
        store::grouped_dead_letters(&host.services.store, &filter).await?,
    ))
}

/// One complete dead letter.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetter {
    #[serde(flatten)]
    pub summary: DeadLetterSummary,
    /// When it died for the first time, if it was redriven since.
    #[schemars(with = "Option<Time>")]
    pub first_died_at: Option<Timestamp>,
    /// The trace id in its `traceparent`.
    pub trace_id: Option<String>,
    pub headers: Vec<(String, String)>,
    /// The original, in Base64.
    pub body: String,
    /// Every failed attempt.
    pub failure_history: Vec<AttemptRecord>,
    /// Corrected bodies, oldest first. The worker receives the last one.
    pub edits: Vec<BodyEdit>,
    /// The actions of operators.
    pub audit: Vec<AuditRecord>,
    /// The inbox record of its event.
    pub inbox: Option<InboxEntry>,
    /// The outputs of its event, as long as they are in the outbox.
    pub outputs: Vec<DeadLetterOutput>,
}

/// A corrected body.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct BodyEdit {
    #[schemars(with = "Time")]
    pub at: Timestamp,
    pub actor: String,
    pub note: String,
    /// Base64.
    pub body: String,
}

/// The final state of an event.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct InboxEntry {
    /// `done` or `dead`.
    pub state: String,
    #[schemars(with = "Time")]
    pub at: Timestamp,
}

impl From<DeadLetterRecord> for DeadLetter {
    fn from(record: DeadLetterRecord) -> Self {
        let body_edit = |edit: store::EditRecord| BodyEdit {
            at: edit.at,
            actor: edit.actor,
            note: edit.note,
            body: STANDARD.encode(&edit.body),
        };
        DeadLetter {
            trace_id: message::header(&record.headers, "traceparent").and_then(trace_id),
            summary: record.summary,
            first_died_at: record.first_died_at,
            headers: record.headers,
            body: STANDARD.encode(&record.body),
            failure_history: record.attempts,
            edits: record.edits.into_iter().map(body_edit).collect(),
            audit: record.audit,
            inbox: record.inbox.map(|(state, at)| InboxEntry { state, at }),
            outputs: record.outputs,
        }
    }
}

/// The trace of a W3C `traceparent`: the second of its four parts.
fn trace_id(traceparent: &str) -> Option<String> {
    let id = traceparent.split('-').nth(1)?;
    (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned())
}

pub async fn dead_letter(
    State(host): State<Arc<Host>>,
    Path(id): Path<i64>,
) -> ApiResult<DeadLetter> {
    let record = host
        .services
        .store
        .find_dead_letter(id)
        .await?
        .ok_or_else(|| dead_letter_not_found(id))?;
    Ok(Json(record.into()))
}

/// The data for a replay of its last attempt, without the component.
pub async fn replayable(
    State(host): State<Arc<Host>>,
    Path(id): Path<i64>,
) -> ApiResult<Option<Replayable>> {
    let dead_letter = host
        .services
        .store
        .find_dead_letter(id)
        .await?
        .ok_or_else(|| dead_letter_not_found(id))?;
    Ok(Json(
        replay::replayable(&host.services.store, &dead_letter).await?,
    ))
}

fn dead_letter_not_found(id: i64) -> ApiError {
    ApiError(
        StatusCode::NOT_FOUND,
        anyhow!("there is no dead letter {id}").hint("oncely dlq list"),
    )
}

/// Dead letters to redrive.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RedriveRequest {
    pub dead_letters: Vec<Redrive>,
    pub by: StatedBy,
}

/// Redrives dead letters at once. See `api/jobs.rs` for many.
pub async fn redrive(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<RedriveRequest>,
) -> ApiResult<Vec<DeadLetterActionResult>> {
    check_count(request.dead_letters.len())?;
    let caller = caller.stating(&request.by);
    let ids: Vec<i64> = request.dead_letters.iter().map(|one| one.id).collect();
    let activity = activity("dlq redrive", &ids, &request.by);
    let by = caller.attribution(request.by.note);
    let change = {
        let host = Arc::clone(&host);
        async move {
            let since = Instant::now();
            let redrive = || host.services.store.redrive(&request.dead_letters, &by);
            let (results, rows) = retry_on_conflict(redrive).await?;
            host.services.publish_outputs(rows, since).await;
            let recorded = counts(&results);
            Ok((results, recorded))
        }
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

/// The activity of a command on dead letters.
fn activity(verb: &'static str, ids: &[i64], by: &StatedBy) -> NewActivity {
    let object = match ids {
        [id] => format!("dead letter {id}"),
        ids => format!("{} dead letters", ids.len()),
    };
    on_object(verb, object, json!({ "ids": ids, "note": by.note }))
}

/// The recorded result of an action on dead letters.
fn counts(results: &[DeadLetterActionResult]) -> Value {
    let refused = results
        .iter()
        .filter(|result| result.refused.is_some())
        .count();
    json!({ "done": results.len() - refused, "refused": refused })
}

/// Dead letters for a dry run or a verification.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct DeadLettersRequest {
    pub ids: Vec<i64>,
}

pub async fn dry_run(
    State(host): State<Arc<Host>>,
    Json(request): Json<DeadLettersRequest>,
) -> ApiResult<Vec<Preview>> {
    check_count(request.ids.len())?;
    Ok(Json(dry_run::preview(&host.services, &request.ids).await?))
}

pub async fn verify(
    State(host): State<Arc<Host>>,
    Json(request): Json<DeadLettersRequest>,
) -> ApiResult<Verification> {
    Ok(Json(verify::verify(&host.services, &request.ids).await?))
}

/// The plan for one dead letter.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PlannedRedrive {
    pub id: i64,
    pub preconditions: Preconditions,
}

/// Dead letters to close.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct CloseRequest {
    pub ids: Vec<i64>,
    pub action: CloseAction,
    pub by: StatedBy,
    /// Those of them that are refused if they are not as seen; by default none.
    #[serde(default)]
    pub seen: Vec<SeenDeadLetter>,
}

/// How to close a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CloseAction {
    Resolve,
    Drop,
}

/// Resolves or drops dead letters.
pub async fn close(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<CloseRequest>,
) -> ApiResult<Vec<DeadLetterActionResult>> {
    check_count(request.ids.len())?;
    let (verb, action) = match request.action {
        CloseAction::Resolve => ("dlq resolve", DeadLetterAction::Resolve),
        CloseAction::Drop => ("dlq drop", DeadLetterAction::Drop),
    };
    let caller = caller.stating(&request.by);
    let activity = activity(verb, &request.ids, &request.by);
    let by = caller.attribution(request.by.note);
    let change = DeadLetterChange {
        ids: request.ids,
        action,
        seen: request.seen,
    };
    update(&host, &caller, activity, change, by).await
}

/// An action on dead letters, and those that must be as seen.
struct DeadLetterChange {
    ids: Vec<i64>,
    action: DeadLetterAction,
    seen: Vec<SeenDeadLetter>,
}

/// Closes or edits dead letters, and records that.
async fn update(
    host: &Arc<Host>,
    caller: &Caller,
    activity: NewActivity,
    change: DeadLetterChange,
    by: Attribution,
) -> ApiResult<Vec<DeadLetterActionResult>> {
    let store = Arc::clone(&host.services.store);
    let change = async move {
        let DeadLetterChange { ids, action, seen } = change;
        let update = || store.update_seen_dead_letters(&ids, &action, &by, &seen);
        let results = retry_on_conflict(update).await?;
        let recorded = counts(&results);
        Ok((results, recorded))
    };
    Ok(Json(recorded(host, caller, activity, change).await?))
}

/// A corrected body for one dead letter.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct EditRequest {
    /// Base64.
    pub body: String,
    pub by: StatedBy,
    /// Refuse unless the dead letter is as seen.
    #[serde(default)]
    pub seen: Option<SeenDeadLetter>,
}

/// Stores a corrected body, which the next redrive sends.
pub async fn edit(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(id): Path<i64>,
    Json(request): Json<EditRequest>,
) -> ApiResult<Vec<DeadLetterActionResult>> {
    if request
        .by
        .note
        .as_deref()
        .is_none_or(|note| note.trim().is_empty())
    {
        return Err(anyhow!("a corrected body needs a note")
            .hint("oncely dlq edit ID --body FILE --note 'wrong currency'")
            .into());
    }
    if host.services.store.find_dead_letter(id).await?.is_none() {
        return Err(dead_letter_not_found(id));
    }
    let body = STANDARD.decode(&request.body).context("read the body")?;
    let caller = caller.stating(&request.by);
    let activity = activity("dlq edit", &[id], &request.by);
    let by = caller.attribution(request.by.note);
    let change = DeadLetterChange {
        ids: vec![id],
        action: DeadLetterAction::Edit(body.into()),
        seen: request.seen.into_iter().collect(),
    };
    update(&host, &caller, activity, change, by).await
}

fn check_count(count: usize) -> anyhow::Result<()> {
    anyhow::ensure!(
        count <= DEAD_LETTERS_MAX,
        "{count} dead letters are too many for one request; the limit is {DEAD_LETTERS_MAX}"
    );
    Ok(())
}

/// Retries a transaction after conflicts, at most [`CONFLICTS_MAX`] times.
async fn retry_on_conflict<T, Fut>(operation: impl Fn() -> Fut) -> store::Result<T>
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
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_id_is_read_from_a_valid_traceparent() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(
            trace_id(&format!("00-{trace}-00f067aa0ba902b7-01")).as_deref(),
            Some(trace)
        );
        assert!(trace_id("garbage").is_none() && trace_id("00-xyz-1-1").is_none());
    }
}
