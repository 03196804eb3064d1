//! The tools that read. Each returns data of the host, in pages.

use std::sync::Arc;

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Session;
use super::answer::Answer;
use super::selection::{
    Filters, limit, parse_time, requested, segment, split_page, worker_segment,
};
use super::untrusted::show_bodies;
use crate::api::dead_letters::DeadLettersRequest;
use crate::api::jobs::{JobItemsQuery, JobsQuery};
use crate::api::{StateFilter, StateKey};
use crate::audit::AuditRequest;
use crate::cli::explain;
use crate::doctor::{Level, Report};
use crate::store::{
    ActivityFilter, ActivityRecord, DeadLetterFilter, DeadLetterGroup, DeadLetterSummary, JobItem,
    OutputFilter, OutputSummary, RedriveJob,
};

/// No arguments.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

pub async fn status(session: Arc<Session>, _: Nothing) -> Result<Answer> {
    Ok(Answer::untrusted(
        session.client()?.get::<Value>("/status").await?,
    ))
}

/// A worker.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfWorker {
    /// The name of the worker.
    worker: String,
}

pub async fn worker(session: Arc<Session>, arguments: OfWorker) -> Result<Answer> {
    let client = session.client()?;
    let path = format!("/workers/{}", worker_segment(&arguments.worker)?);
    let deployments: Value = client.get(&format!("{path}/deployments")).await?;
    let hosts: Value = client.get(&format!("{path}/hosts")).await?;
    // A retired worker has deployments only.
    let drain: Option<Value> = client.get(&format!("{path}/drain")).await.ok();
    Ok(Answer::untrusted(json!({
        "deployments": deployments,
        "hosts": hosts,
        "pause_and_drain": drain,
    })))
}

/// A page of groups.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupsPage {
    #[serde(default)]
    filters: Filters,
    /// At most 100; by default 20.
    limit: Option<u32>,
    /// `next_offset` of the previous page.
    #[serde(default)]
    offset: u32,
}

pub async fn groups(session: Arc<Session>, arguments: GroupsPage) -> Result<Answer> {
    let (offset, limit) = (arguments.offset, limit(arguments.limit));
    let filter = arguments.filters.filter(requested(offset, limit)?)?;
    let client = session.client()?;
    let found: Vec<DeadLetterGroup> = client.post("/dead-letters/groups", &filter).await?;
    let (page, next) = split_page(found, offset as usize, limit as usize);
    Ok(paged(Answer::untrusted(page), "next_offset", next))
}

/// Adds the position of the next page, if there is one.
fn paged(answer: Answer, name: &str, next: Option<impl serde::Serialize>) -> Answer {
    match next {
        Some(next) => answer.with(name, next),
        None => answer,
    }
}

/// A page of dead letters.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeadLettersPage {
    #[serde(default)]
    filters: Filters,
    /// At most 100; by default 20.
    limit: Option<u32>,
    /// `next_below` of the previous page: only dead letters with lower ids.
    below: Option<i64>,
}

pub async fn dead_letters(session: Arc<Session>, arguments: DeadLettersPage) -> Result<Answer> {
    let limit = limit(arguments.limit);
    let filter = DeadLetterFilter {
        below: arguments.below,
        ..arguments.filters.filter(limit + 1)?
    };
    let client = session.client()?;
    let found: Vec<DeadLetterSummary> = client.post("/dead-letters/find", &filter).await?;
    let (page, next) = split_page(found, 0, limit as usize);
    let below = next.and(page.last().map(|one| one.id));
    Ok(paged(Answer::untrusted(page), "next_below", below))
}

/// One dead letter.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfDeadLetter {
    /// The number of the dead letter.
    id: i64,
    /// `next_offset` of the previous part of the body, in bytes.
    #[serde(default)]
    body_offset: usize,
}

pub async fn dead_letter(session: Arc<Session>, arguments: OfDeadLetter) -> Result<Answer> {
    let path = format!("/dead-letters/{}", arguments.id);
    let mut found: Value = session.client()?.get(&path).await?;
    show_bodies(&mut found, &["body"], arguments.body_offset);
    show_bodies(&mut found, &["edits", "*", "body"], arguments.body_offset);
    Ok(Answer::untrusted(found))
}

/// An event.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfEvent {
    /// The name of the worker.
    worker: String,
    /// The id of the event.
    event_id: String,
    /// Count the copies of its outputs on their streams. This reads the streams.
    #[serde(default)]
    count_copies: bool,
}

pub async fn event(session: Arc<Session>, arguments: OfEvent) -> Result<Answer> {
    let worker = worker_segment(&arguments.worker)?;
    let event = segment(&arguments.event_id)?;
    let count = if arguments.count_copies {
        "?count=1"
    } else {
        ""
    };
    let path = format!("/workers/{worker}/events/{event}{count}");
    Ok(Answer::untrusted(
        session.client()?.page::<Value>(&path).await?,
    ))
}

/// A search.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Search {
    /// An event id, the number of a dead letter, or a subject.
    query: String,
}

pub async fn search(session: Arc<Session>, arguments: Search) -> Result<Answer> {
    ensure!(!arguments.query.trim().is_empty(), "the query is empty");
    let path = format!("/search?q={}", segment(&arguments.query)?);
    Ok(Answer::untrusted(
        session.client()?.page::<Value>(&path).await?,
    ))
}

/// A page of outputs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputsPage {
    /// The name of a worker.
    worker: Option<String>,
    /// All unpublished outputs, not only parked ones.
    #[serde(default)]
    unpublished: bool,
    /// Dropped outputs instead.
    #[serde(default)]
    dropped: bool,
    /// Only outputs to this stream.
    stream: Option<String>,
    /// At most 100; by default 20.
    limit: Option<u32>,
    /// `next_offset` of the previous page.
    #[serde(default)]
    offset: u32,
}

pub async fn outputs(session: Arc<Session>, arguments: OutputsPage) -> Result<Answer> {
    let (offset, limit) = (arguments.offset, limit(arguments.limit));
    let filter = OutputFilter {
        worker: arguments.worker,
        unpublished: arguments.unpublished,
        dropped: arguments.dropped,
        stream: arguments.stream,
        subjects: Vec::new(),
        limit: requested(offset, limit)?,
    };
    let found: Vec<OutputSummary> = session.client()?.get_with("/outbox", &filter).await?;
    let (page, next) = split_page(found, offset as usize, limit as usize);
    Ok(paged(Answer::untrusted(page), "next_offset", next))
}

/// One output.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfOutput {
    /// The number of the output.
    number: i64,
    /// `next_offset` of the previous part of the body, in bytes.
    #[serde(default)]
    body_offset: usize,
}

pub async fn output(session: Arc<Session>, arguments: OfOutput) -> Result<Answer> {
    let path = format!("/outbox/{}", arguments.number);
    let mut found: Value = session.client()?.get(&path).await?;
    show_bodies(&mut found, &["body"], arguments.body_offset);
    Ok(Answer::untrusted(found))
}

pub async fn streams(session: Arc<Session>, _: Nothing) -> Result<Answer> {
    Ok(Answer::untrusted(
        session.client()?.page::<Value>("/streams").await?,
    ))
}

/// Keyed state.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfState {
    /// The name of the worker.
    worker: String,
    /// Only this key, with its whole value.
    key: Option<String>,
    /// The prefix of the keys.
    #[serde(default)]
    prefix: String,
    /// At most 100; by default 20.
    limit: Option<u32>,
    /// `next_offset` of the previous part of the value, in bytes.
    #[serde(default)]
    value_offset: usize,
}

pub async fn state(session: Arc<Session>, arguments: OfState) -> Result<Answer> {
    let client = session.client()?;
    let path = format!("/workers/{}/state", worker_segment(&arguments.worker)?);
    if let Some(key) = arguments.key {
        let query = StateKey { key };
        let mut found: Value = client.get_with(&format!("{path}/entry"), &query).await?;
        show_bodies(&mut found, &["value"], arguments.value_offset);
        return Ok(Answer::untrusted(found));
    }
    let query = StateFilter {
        prefix: arguments.prefix,
        limit: limit(arguments.limit),
    };
    let mut found: Value = client.get_with(&path, &query).await?;
    show_bodies(&mut found, &["*", "value"], 0);
    Ok(Answer::untrusted(found))
}

/// Jobs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfJobs {
    /// Only this job, with its dead letters.
    id: Option<i64>,
    /// At most 100; by default 20.
    limit: Option<u32>,
    /// `next_from` of the previous page of dead letters.
    #[serde(default)]
    from: u64,
}

pub async fn jobs(session: Arc<Session>, arguments: OfJobs) -> Result<Answer> {
    let client = session.client()?;
    let limit = limit(arguments.limit);
    let Some(id) = arguments.id else {
        let jobs: Vec<RedriveJob> = client
            .get_with("/dead-letters/jobs", &JobsQuery { limit })
            .await?;
        return Ok(Answer::untrusted(jobs));
    };
    let job: RedriveJob = client.get(&format!("/dead-letters/jobs/{id}")).await?;
    let query = JobItemsQuery {
        from: arguments.from,
        limit: limit + 1,
    };
    let path = format!("/dead-letters/jobs/{id}/items");
    let items: Vec<JobItem> = client.get_with(&path, &query).await?;
    let (items, next) = split_page(items, 0, limit as usize);
    let next = next.and(items.last().map(|one| one.position + 1));
    let answer = Answer::untrusted(json!({ "job": job, "items": items }));
    Ok(paged(answer, "next_from", next))
}

/// Redriven dead letters.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Verified {
    /// The numbers of at most 100 dead letters.
    ids: Vec<i64>,
}

pub async fn verify(session: Arc<Session>, arguments: Verified) -> Result<Answer> {
    let ids = super::selection::distinct(&arguments.ids, 100)?;
    let request = DeadLettersRequest { ids };
    let client = session.client()?;
    let found: Value = client.post("/dead-letters/verify", &request).await?;
    Ok(Answer::untrusted(found))
}

/// A page of the activity log.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ActivityPage {
    /// The name of a worker.
    worker: Option<String>,
    /// The name of a token.
    actor: Option<String>,
    /// The name of a command, such as `pause` or `dlq redrive`.
    verb: Option<String>,
    /// Since: a duration ago (`2h`), or a time (`2026-01-31T12:00:00Z`).
    since: Option<String>,
    /// At most 100; by default 20.
    limit: Option<u32>,
    /// `next_below` of the previous page.
    below: Option<i64>,
}

pub async fn activity(session: Arc<Session>, arguments: ActivityPage) -> Result<Answer> {
    let limit = limit(arguments.limit);
    let filter = ActivityFilter {
        worker: arguments.worker,
        actor: arguments.actor,
        verb: arguments.verb,
        since: arguments.since.as_deref().map(parse_time).transpose()?,
        below: arguments.below,
        limit: limit + 1,
    };
    let found: Vec<ActivityRecord> = session.client()?.get_with("/activity", &filter).await?;
    let (page, next) = split_page(found, 0, limit as usize);
    let below = next.and(page.last().map(|one| one.id));
    Ok(paged(Answer::untrusted(page), "next_below", below))
}

/// The checks to show.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Doctor {
    /// Show all checks, not only advice and problems.
    #[serde(default)]
    all: bool,
}

pub async fn doctor(session: Arc<Session>, arguments: Doctor) -> Result<Answer> {
    let mut report: Report = session.client()?.get("/doctor").await?;
    let ok = report.count(Level::Ok);
    if !arguments.all {
        report.findings.retain(|finding| finding.level != Level::Ok);
    }
    Ok(Answer::untrusted(report).with("ok", ok))
}

/// The window of an audit.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Since: a duration ago (`1h`, the default), or a time (`2026-01-31T12:00:00Z`).
    since: Option<String>,
    /// Check the messages of this worker only.
    worker: Option<String>,
}

pub async fn audit(session: Arc<Session>, arguments: Window) -> Result<Answer> {
    let request = AuditRequest {
        since: parse_time(arguments.since.as_deref().unwrap_or("1h"))?,
        worker: arguments.worker,
        repair: false,
    };
    let found: Value = session.client()?.post("/audit", &request).await?;
    Ok(Answer::untrusted(found))
}

/// A code.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OfCode {
    /// The code, such as `attempts-exhausted` or `id-reuse`.
    code: String,
}

pub async fn explain(_: Arc<Session>, arguments: OfCode) -> Result<Answer> {
    let found = explain::find(&arguments.code);
    ensure!(
        !found.is_empty(),
        "Oncely has no such code; a handler may have its own"
    );
    let explained = found.into_iter().map(|(of, one)| {
        json!({ "code": one.code, "of": of, "meaning": one.meaning, "reaction": one.action })
    });
    Ok(Answer::default().with("explanations", explained.collect::<Vec<Value>>()))
}
