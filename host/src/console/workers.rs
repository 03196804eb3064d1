//! Workers: where they run, their versions, their grants, and the way back to an earlier version.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Serialize;

use super::chart;
use super::fields::Fields;
use super::links;
use super::now::run_state;
use super::page::Section;
use super::parts::{Tone, age, badge, cell, command, count, details, full_time, table, text, time};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::{self, Deployment, RetireRequest, RollbackRequest, WorkerOnHost};
use crate::config::manifest::Worker;
use crate::model::units;
use crate::runtime::{RunState, WorkerState};
use crate::store::{DeadLetterDepth, HISTORY_BUCKETS, HistoryPoint, OutboxLag, OutputFilter};

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
    let Json(deployments) = api::deployments(host(console), Path(worker.clone())).await?;
    let Json(hosts) = api::hosts(host(console), Path(worker.clone())).await?;
    let store = &console.host.services.store;
    let records = store.deployments(&worker).await?;
    let active = deployments.iter().find(|one| one.active);
    let shown = records
        .iter()
        .find(|record| active.is_some_and(|active| active.version == record.version))
        .or(records.first());
    let manifest = shown.and_then(|record| serde_json::from_str(&record.manifest).ok());
    let states = console.host.workers_with_backlog().await;
    let depths = store.dead_letter_depths().await?;
    let lags = store.outbox_lag().await?;
    Ok(View {
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
        (chart::week(&view.history, Timestamp::now()))
        (versions(view))
        (hosts_table(view))
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
        @for one in &view.deployments {
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
        }
    }
}

fn hosts_table(view: &View) -> Markup {
    let rows = html! {
        @for on in &view.hosts {
            tr {
                th scope="row" { (text(&on.host)) }
                @match &on.status {
                    Some(status) => {
                        td { (run_state(status.state)) }
                        td { @if let Some(version) = status.version { (version) } }
                        td.wrap { (text(status.error.as_deref().unwrap_or_default())) }
                    },
                    None => { td { (badge(Tone::Calm, "not started")) } td {} td {} },
                }
            }
        }
    };
    html! {
        section aria-labelledby="hosts" {
            h2 #hosts { "Hosts" }
            (table("Hosts", &["Host", "State", "Version", "Error"], rows))
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
        dropped: false,
        limit: 1,
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
