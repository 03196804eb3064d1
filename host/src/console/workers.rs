//! Workers: where they run, their versions, their grants, and the way back to an earlier version.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};
use serde::Serialize;

use super::chart::{self, Mark};
use super::fields::Fields;
use super::links;
use super::now::run_state;
use super::page::Section;
use super::parts::{
    Tone, age, badge, cell, command, count, counted, details, full_time, table, text, time,
};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::{self, Deployment, RetireRequest, RollbackRequest, WorkerOnHost};
use crate::config::manifest::Worker;
use crate::consumer::HeldKey;
use crate::model::units;
use crate::runtime::{RunState, WorkerState};
use crate::store::{
    ActivityFilter, DeadLetterDepth, HISTORY_BUCKETS, HistoryPoint, LastAttempt, OutboxLag,
    OutputFilter,
};

/// The time of the charts.
const WEEK: SignedDuration = SignedDuration::from_hours(7 * 24);

/// The most deployments and rollbacks that a chart marks.
const MARKS_MAX: usize = 30;

/// The most versions that a page lists.
const VERSIONS_MAX: u32 = 50;

/// One worker.
#[derive(Debug, Serialize)]
struct View {
    worker: String,
    /// The worker on this host; none if it does not run here.
    state: Option<WorkerState>,
    /// Its versions, newest first.
    deployments: Vec<Deployment>,
    hosts: Vec<WorkerOnHost>,
    /// The manifest of the active version, or else of the newest one.
    manifest: Option<Worker>,
    dead_letters: Option<DeadLetterDepth>,
    outbox: Option<OutboxLag>,
    /// Seven days, by the hour.
    history: Vec<HistoryPoint>,
    /// The deployments and rollbacks of these days, newest first.
    marks: Vec<Mark>,
    /// The last failed attempts of the events that hold a key.
    held: Vec<LastAttempt>,
}

impl View {
    fn active(&self) -> Option<&Deployment> {
        self.deployments.iter().find(|one| one.active)
    }
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let states = console.host.workers_with_backlog().await;
    visitor.answer(Section::Workers, "Workers", &states, |states| {
        let heads = [
            "Worker",
            "State",
            "Takes",
            "#Waiting",
            "#Oldest",
            "Component",
        ];
        let rows = html! { @for state in states { (row(state)) } };
        html! {
            h1 { "Workers" }
            @if states.is_empty() {
                p.empty { "No workers are deployed. Deploy one with" }
                (command("oncely deploy"))
            } @else {
                (table("Workers", &heads, rows))
                p.caption { "The same in a terminal" }
                (command("oncely workers"))
            }
        }
    })
}

fn row(state: &WorkerState) -> Markup {
    let digest = state.digest.as_deref().unwrap_or_default();
    html! {
        tr {
            th scope="row" {
                a href=(links::worker(&state.worker)) { (text(&state.worker)) }
                @if let Some(version) = state.version { " " span.muted { "v" (version) } }
            }
            td { (run_state(state.state)) }
            td {
                @match &state.stream {
                    Some(stream) => { (text(stream)) " " span.muted { (text(&state.subjects.join(" "))) } },
                    None => (text(&state.routes.join(", "))),
                }
            }
            td.number { (state.pending.map_or_else(|| "–".to_owned(), count)) }
            td.number { (state.oldest_pending_ms.map_or_else(|| "–".to_owned(), age)) }
            td { code { (digest.get(..12).unwrap_or_default()) } }
        }
    }
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
) -> Answer {
    let view = find(&console, worker).await?;
    let title = format!("Worker {}", view.worker);
    visitor.answer(Section::Workers, &title, &view, |view| page(&visitor, view))
}

async fn find(console: &Console, worker: String) -> Result<View, Problem> {
    let deployments = api::last_deployments(&console.host, &worker, VERSIONS_MAX + 1).await?;
    let Json(hosts) = api::hosts(host(console), Path(worker.clone())).await?;
    let store = &console.host.services.store;
    let active = store.active_deployments().await?;
    let active = active.into_iter().find(|record| record.worker == worker);
    let shown = match active {
        Some(active) => Some(active),
        None => store.last_deployments(&worker, 1).await?.pop(),
    };
    let manifest = shown.and_then(|record| serde_json::from_str(&record.manifest).ok());
    let states = console.host.workers_with_backlog().await;
    let depths = store.dead_letter_depths().await?;
    let lags = store.outbox_lag().await?;
    let held: Vec<String> = held_keys(&hosts)
        .map(|(_, held)| held.event_id.clone())
        .collect();
    Ok(View {
        marks: marks(console, &worker, &deployments).await?,
        held: store.last_attempts(&worker, &held).await?,
        state: states.into_iter().find(|state| state.worker == worker),
        dead_letters: depths.into_iter().find(|depth| depth.worker == worker),
        history: store
            .history(Some(&worker), HISTORY_BUCKETS, chart::WEEK_STEP)
            .await?,
        outbox: lags.into_iter().find(|lag| lag.worker == worker),
        deployments,
        hosts,
        manifest,
        worker,
    })
}

/// When versions were activated in the last seven days: all deployments, and rollbacks by name.
async fn marks(
    console: &Console,
    worker: &str,
    deployments: &[Deployment],
) -> Result<Vec<Mark>, Problem> {
    let since = Timestamp::now() - WEEK;
    let filter = ActivityFilter {
        worker: Some(worker.to_owned()),
        verb: Some("rollback".to_owned()),
        since: Some(since),
        limit: MARKS_MAX as u32,
        ..ActivityFilter::default()
    };
    let rollbacks = console.host.services.store.activities(&filter).await?;
    let rollbacks = rollbacks.iter().filter_map(|activity| {
        let version = activity.result.as_ref()?.get("version")?.as_u64()?;
        Some(Mark {
            at: activity.ended_at.unwrap_or(activity.at),
            version: u32::try_from(version).ok()?,
            is_rollback: true,
        })
    });
    let deployed = deployments.iter().filter(|one| one.created_at >= since);
    let deployed = deployed.map(|one| Mark {
        at: one.created_at,
        version: one.version,
        is_rollback: false,
    });
    let mut marks: Vec<Mark> = deployed.chain(rollbacks).collect();
    marks.sort_by_key(|mark| std::cmp::Reverse(mark.at));
    marks.truncate(MARKS_MAX);
    Ok(marks)
}

/// The held keys of all hosts, each with its host.
fn held_keys(hosts: &[WorkerOnHost]) -> impl Iterator<Item = (&str, &HeldKey)> {
    hosts.iter().flat_map(|on| {
        let lanes = on.status.as_ref().and_then(|status| status.lanes.as_ref());
        let keys = lanes.into_iter().flat_map(|lanes| &lanes.held_keys);
        keys.map(|held| (on.host.as_str(), held))
    })
}

fn page(visitor: &Visitor, view: &View) -> Markup {
    let name = &view.worker;
    let state = view.state.as_ref();
    html! {
        p.crumbs { a href="/workers" { "Workers" } }
        div.heading {
            h1 {
                "Worker " (text(name)) " "
                @match state {
                    Some(state) => (run_state(state.state)),
                    None if view.active().is_none() => (badge(Tone::Calm, "retired")),
                    None => (badge(Tone::Warn, "not on this host")),
                }
            }
            p.actions {
                a.button.quiet href=(links::failures_of(name)) { "Failures" }
                a.button.quiet href={ (links::worker(name)) "/state" } { "State" }
                @if view.active().is_some() {
                    a.button.quiet href={ (links::worker(name)) "/pause" } { "Pause…" }
                    a.button.quiet href={ (links::worker(name)) "/retire" } { "Retire…" }
                }
            }
        }
        @if let Some(pause) = state.and_then(|state| state.pause.as_ref()) {
            form.panel action={ (links::worker(name)) "/resume" } method="post" {
                (visitor.form_token())
                p.lead { "It is " (text(&pause.to_string())) ", " (time(pause.at)) "." }
                div.submit { button type="submit" { "Resume" } }
            }
        }
        @if let Some(error) = state.and_then(|state| state.error.as_deref()) {
            section.panel.problem aria-label="Error" {
                p.lead {
                    @if state.is_some_and(|state| state.state == RunState::Broken) { "It cannot run: " }
                    (text(error))
                }
            }
        }
        (figures(view))
        (chart::week(&view.history, &view.marks, Timestamp::now()))
        (hosts_table(view))
        (held_table(view))
        (versions(view))
        @if let Some(manifest) = &view.manifest { (grants(manifest)) (manifest_text(manifest)) }
        p.caption { "The same in a terminal" }
        (command(&format!("oncely workers {name}")))
    }
}

fn figures(view: &View) -> Markup {
    let dash = || "–".to_owned();
    let state = view.state.as_ref();
    let open = view.dead_letters.as_ref();
    let lag = view.outbox.as_ref();
    html! {
        dl.figures {
            div { dt { "Waiting messages" }
                dd { (state.and_then(|state| state.pending).map_or_else(dash, count)) } }
            div { dt { "Oldest unhandled" }
                dd { (state.and_then(|state| state.oldest_pending_ms).map_or_else(dash, age)) } }
            div { dt { "Open dead letters" } dd { (count(open.map_or(0, |depth| depth.open))) } }
            div { dt { "Oldest dead letter" }
                dd { (open.map_or_else(dash, |depth| age(depth.oldest_ms))) } }
            div { dt { "Unpublished outputs" } dd { (count(lag.map_or(0, |lag| lag.unpublished))) } }
            div { dt { "Oldest unpublished" }
                dd { (lag.and_then(|lag| lag.oldest_ms).map_or_else(dash, age)) } }
            @if let Some(state) = state {
                div { dt { "Handled here" } dd { (count(state.done)) } }
                div { dt { "Retries here" } dd { (count(state.retries)) } }
            }
        }
    }
}

fn versions(view: &View) -> Markup {
    let active = view.active().map(|one| one.version);
    let rows = html! {
        @for one in view.deployments.iter().take(VERSIONS_MAX as usize) {
            tr {
                th scope="row" { (one.version) }
                td { @if one.active { (badge(Tone::Good, "active")) } }
                td { (time(one.created_at)) }
                td {
                    code { (one.digest.get(..12).unwrap_or_default()) }
                    @if let Some(component) = &one.component { " " (cell(&component.to_string())) }
                }
                td {
                    @if active.is_some() && !one.active {
                        a href={ (links::worker(&view.worker)) "/rollback?to=" (one.version) } {
                            @if active.is_some_and(|active| one.version < active) { "Roll back…" }
                            @else { "Activate…" }
                        }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="versions" {
            h2 #versions { "Versions" }
            (table("Versions", &["Version", "State", "Deployed", "Component", "Action"], rows))
            @if view.deployments.len() > VERSIONS_MAX as usize {
                p.caption { "The newest " (VERSIONS_MAX) " are shown." }
            }
        }
    }
}

fn hosts_table(view: &View) -> Markup {
    let number = |number: usize| html! { td.number { (count(number as u64)) } };
    let rows = html! {
        @for on in &view.hosts {
            tr {
                th scope="row" { (text(&on.host)) }
                @match &on.status {
                    Some(status) => {
                        td { (run_state(status.state)) }
                        td { @if let Some(version) = status.version { (version) } }
                        (number(status.in_flight))
                        @match &status.lanes {
                            Some(lanes) => {
                                td.number {
                                    (count(lanes.busy as u64)) " of " (count(lanes.limit as u64))
                                    @if lanes.limit < lanes.lanes {
                                        br; span.muted { "of " (lanes.lanes) " after conflicts" }
                                    }
                                }
                                (number(lanes.held))
                            },
                            None => { td.number { "–" } td.number { "–" } },
                        }
                        td.wrap { (text(status.error.as_deref().unwrap_or_default())) }
                    },
                    None => {
                        td { (badge(Tone::Calm, "not started")) } td {} td {} td {} td {} td {}
                    },
                }
            }
        }
    };
    let heads = [
        "Host",
        "State",
        "Version",
        "#In flight",
        "#Busy lanes",
        "#Held keys",
        "Error",
    ];
    html! {
        section aria-labelledby="hosts" {
            h2 #hosts { "Hosts" }
            (table("Hosts", &heads, rows))
            p.caption { "Each host reports its lanes once a second." }
        }
    }
}

/// The keys whose messages wait for an earlier one that failed.
fn held_table(view: &View) -> Markup {
    let keys: Vec<(&str, &HeldKey)> = held_keys(&view.hosts).collect();
    if keys.is_empty() {
        return html! {};
    }
    let number = |on: &WorkerOnHost| {
        let lanes = on.status.as_ref().and_then(|status| status.lanes.as_ref());
        lanes.map_or(0, |lanes| lanes.held)
    };
    let all: usize = view.hosts.iter().map(number).sum();
    let rows = html! {
        @for (host, held) in &keys {
            @let last = view.held.iter().find(|last| last.event_id == held.event_id);
            tr {
                th scope="row" { (cell(&held.key)) }
                td { (time(held.since)) }
                td.failure {
                    a href=(links::event(&view.worker, &held.event_id)) { (cell(&held.event_id)) }
                    " failed " (counted(held.attempt.into(), "time"))
                    @if let Some(last) = last { span.shape { (cell(&last.error)) } }
                }
                td { (time(held.due)) }
                td { (text(host)) }
            }
        }
    };
    html! {
        section aria-labelledby="held" {
            h2 #held { "Held keys" }
            (table("Held keys", &["Key", "Since", "Because", "Next attempt", "Host"], rows))
            @if all > keys.len() {
                p.caption { "Each host reports the 10 that are held longest. All hosts hold " (count(all as u64)) "." }
            }
        }
    }
}

/// Everything that the component may use.
fn grants(manifest: &Worker) -> Markup {
    let all = |patterns: &[String], none: &'static str| {
        html! {
            @if patterns.is_empty() { (none) }
            @for pattern in patterns { code.tag { (text(pattern)) } " " }
        }
    };
    let takes = match &manifest.stream {
        Some(stream) => html! {
            (text(stream)) " " (all(&manifest.subjects, "all subjects"))
        },
        None => html! {
            @for route in &manifest.routes {
                code.tag { (text(&route.methods.join(","))) " " (text(&route.path)) } " "
            }
        },
    };
    let limits = &manifest.limits;
    html! {
        section aria-labelledby="grants" {
            h2 #grants { "Grants and limits" }
            (details([
                ("Takes", takes),
                ("May publish to", all(&manifest.outputs, "nothing")),
                ("Lanes on each host", html! { (manifest.concurrency) }),
                ("Messages per transaction", html! { "at most " (manifest.batch) }),
                ("Time of an attempt", html! { (units::format_duration(limits.time)) }),
                ("Memory", html! { (units::format_size(limits.memory)) }),
                ("Statements", html! { (limits.sql_statements) }),
                ("Configuration", html! {
                    @if manifest.config.is_empty() { "none" }
                    @for key in manifest.config.keys() { code.tag { (text(key)) } " " }
                }),
            ]))
        }
    }
}

fn manifest_text(manifest: &Worker) -> Markup {
    let json = serde_json::to_string_pretty(manifest).unwrap_or_default();
    html! {
        details {
            summary { "Manifest with all defaults" }
            pre.body role="region" aria-label="Manifest" tabindex="0" { code { (super::parts::lines(&json)) } }
        }
    }
}

pub async fn confirm_rollback(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
) -> Answer {
    let view = find(&console, worker).await?;
    let name = &view.worker;
    let wanted: Option<u32> = visitor.query.number("to");
    let target = view
        .deployments
        .iter()
        .find(|one| Some(one.version) == wanted);
    let Some(target) = target else {
        let why = format!("worker {name} has no such version");
        return Err(Problem::not_found(why, &format!("oncely workers {name}")));
    };
    let title = format!("Activate version {} of {name}?", target.version);
    let body = html! {
        p.crumbs { a href=(links::worker(name)) { "Worker " (text(name)) } }
        h1 { (text(&title)) }
        section.panel aria-label="Version" {
            (details([
                ("Deployed", full_time(target.created_at)),
                ("Component", html! { code.wrap { (target.digest) } }),
                ("Active now", html! {
                    @match view.active() {
                        Some(active) => { "version " (active.version) },
                        None => "none",
                    }
                }),
            ]))
        }
        p {
            "All hosts switch to it without losing or repeating a message. The data stay as they "
            "are: migrations are not undone."
        }
        form.stack action={ (links::worker(name)) "/rollback" } method="post" {
            (visitor.form_token())
            input type="hidden" name="to" value=(target.version);
            div.submit {
                button type="submit" { "Activate version " (target.version) }
                a href=(links::worker(name)) { "Cancel" }
            }
        }
        (command(&format!("oncely rollback {name} --to {}", target.version)))
    };
    Ok(visitor.page(Section::Workers, &title, body))
}

pub async fn rollback(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let request = RollbackRequest {
        worker: worker.clone(),
        to: fields.number("to"),
        from: None,
    };
    let result = match api::rollback(host(&console), visitor.caller.clone(), Json(request)).await {
        Ok(Json(now)) => Ok(format!(
            "version {} of {} is active",
            now.version, now.worker
        )),
        Err(error) => Err(Problem::from(error).line()),
    };
    visitor.go(&console, &links::worker(&worker), result)
}

pub async fn confirm_retire(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
) -> Answer {
    let view = find(&console, worker).await?;
    let name = &view.worker;
    let waiting = OutputFilter {
        worker: Some(name.clone()),
        unpublished: true,
        limit: 1,
        ..OutputFilter::default()
    };
    let has_outputs = !console
        .host
        .services
        .store
        .outputs(&waiting)
        .await?
        .is_empty();
    let title = format!("Retire {name}?");
    let body = html! {
        p.crumbs { a href=(links::worker(name)) { "Worker " (text(name)) } }
        h1 { (text(&title)) }
        p {
            "All hosts stop it, and its consumers are deleted. Its tables, dead letters and history "
            "stay. Messages that wait on its stream are not handled."
        }
        @if has_outputs { p { "It has unpublished outputs, which are published nevertheless." } }
        form.stack action={ (links::worker(name)) "/retire" } method="post" {
            (visitor.form_token())
            div.check {
                input #keep type="checkbox" name="keep" value="1";
                label for="keep" { "Keep its consumers, so that a later deployment continues there" }
            }
            div {
                label for="name" { "Name of the worker, to confirm" }
                input #name name="name" required autocomplete="off" spellcheck="false";
            }
            div.submit {
                button.danger type="submit" { "Retire" }
                a href=(links::worker(name)) { "Cancel" }
            }
        }
        (command(&format!("oncely retire {name}")))
    };
    Ok(visitor.page(Section::Workers, &title, body))
}

pub async fn retire(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let here = links::worker(&worker);
    if fields.get("name") != Some(worker.as_str()) {
        let wrong = "the name differs, so nothing was retired".to_owned();
        return visitor.go(&console, &here, Err(wrong));
    }
    let request = RetireRequest {
        worker: worker.clone(),
        keep_consumers: fields.is_set("keep"),
    };
    let result = match api::retire(host(&console), visitor.caller.clone(), Json(request)).await {
        Ok(_) => Ok(format!("{worker} is retired")),
        Err(error) => Err(Problem::from(error).line()),
    };
    visitor.go(&console, &here, result)
}
