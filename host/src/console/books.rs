//! The books: the last audits with their differences, and the start of another one.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};
use serde::Serialize;

use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{
    Tone, badge, cell, command, count, counted, details, full_time, sentence, table, text, time,
};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::audit_runs::{self, AuditRunReport, AuditRunRequest, AuditRunState, RunsQuery};
use crate::audit::{Audit, Difference, WorkerCounts};
use crate::model::units;

/// How many audits the page lists.
const RUNS_SHOWN: u32 = 50;

/// How many differences of an audit are shown.
const DIFFERENCES_SHOWN: usize = 100;

/// The windows that the form offers, in hours.
const WINDOWS: [i64; 3] = [1, 6, 24];

/// The last audits.
#[derive(Debug, Serialize)]
struct View {
    runs: Vec<AuditRunState>,
    /// The deployed workers that consume a stream.
    workers: Vec<String>,
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let query = Query(RunsQuery { limit: RUNS_SHOWN });
    let Json(runs) = audit_runs::list(host(&console), query).await?;
    let workers = console.host.services.deployed_workers().await?;
    let consuming = workers.into_iter().filter(|worker| worker.stream.is_some());
    let view = View {
        runs,
        workers: consuming.map(|worker| worker.name).collect(),
    };
    visitor.answer(Section::Books, "Books", &view, |view| {
        list_page(&visitor, view)
    })
}

fn list_page(visitor: &Visitor, view: &View) -> Markup {
    let heads = ["Audit", "Result", "Window", "Worker", "Started", "By"];
    html! {
        h1 { "Books" }
        p {
            "An audit compares the database with the streams: each message has one outcome, and each "
            "output and each notice is on its stream once. It changes nothing, and hosts work on."
        }
        (start_form(visitor, &view.workers))
        section aria-labelledby="audits" {
            h2 #audits { "Audits" }
            @if view.runs.is_empty() { p.empty { "No audit has run yet." } }
            @else { (table("Audits", &heads, html! { @for state in &view.runs { (row(state)) } })) }
        }
        p.caption { "The same in a terminal" }
        (command("oncely audit --since 1h"))
    }
}

fn start_form(visitor: &Visitor, workers: &[String]) -> Markup {
    html! {
        form.panel.filters action="/books" method="post" aria-label="Audit" {
            (visitor.form_token())
            div {
                label for="hours" { "Window" }
                select #hours name="hours" {
                    @for hours in WINDOWS { option value=(hours) { "last " (hours) " h" } }
                }
            }
            div {
                label for="worker" { "Messages of" }
                select #worker name="worker" {
                    option value="" { "all workers" }
                    @for worker in workers { option { (worker) } }
                }
            }
            div.submit { button type="submit" { "Audit" } }
        }
    }
}

fn row(state: &AuditRunState) -> Markup {
    let run = &state.run;
    html! {
        tr {
            th scope="row" { a href=(links::audit(run.id)) { (run.id) } }
            td { (result(state)) }
            td { "since " (units::format_time(run.since)) }
            td { @match &run.worker { Some(worker) => (cell(worker)), None => "all" } }
            td { (time(run.started_at)) }
            td { (cell(run.stated_name.as_deref().unwrap_or(&run.actor))) }
        }
    }
}

/// The result in a word, or the number of differences that are left.
fn result(state: &AuditRunState) -> Markup {
    let run = &state.run;
    if run.error.is_some() {
        return badge(Tone::Bad, "failed");
    }
    let Some(differences) = run.differences else {
        return match state.is_running {
            true => badge(Tone::Busy, "running"),
            false => badge(Tone::Warn, "interrupted"),
        };
    };
    let repaired = run.repaired.unwrap_or_default();
    match differences.saturating_sub(repaired) {
        0 if repaired > 0 => badge(Tone::Good, &format!("{repaired} repaired")),
        0 => badge(Tone::Good, "correct"),
        left => badge(Tone::Bad, &counted(left, "difference")),
    }
}

/// Starts an audit.
pub async fn start(
    State(console): State<Arc<Console>>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let hours = fields
        .number("hours")
        .filter(|hours| WINDOWS.contains(hours));
    let Some(hours) = hours else {
        let unknown = "the form has no known window".to_owned();
        return visitor.go(&console, "/books", Err(unknown));
    };
    // The limit of the window counts from the arrival of the request.
    let since = Timestamp::now() - SignedDuration::from_hours(hours) + SignedDuration::from_secs(1);
    let request = AuditRunRequest {
        since,
        worker: fields.text("worker"),
        by: visitor.stated(),
    };
    let caller = visitor.caller.clone();
    match audit_runs::create(host(&console), caller, Json(request)).await {
        Ok(Json(run)) => {
            let started = format!("audit {} is running", run.id);
            visitor.go(&console, &links::audit(run.id), Ok(started))
        }
        Err(error) => visitor.go(&console, "/books", Err(Problem::from(error).line())),
    }
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let Json(view) = audit_runs::show(host(&console), Path(id)).await?;
    let title = format!("Audit {id}");
    visitor.answer(Section::Books, &title, &view, |view| page(&title, view))
}

fn page(title: &str, view: &AuditRunReport) -> Markup {
    let run = &view.state.run;
    let mut pairs = vec![
        ("Since", full_time(run.since)),
        (
            "Messages of",
            html! {
                @match &run.worker {
                    Some(worker) => a href=(links::worker(worker)) { (text(worker)) },
                    None => "all workers",
                }
            },
        ),
        ("Started", full_time(run.started_at)),
        ("By", text(run.stated_name.as_deref().unwrap_or(&run.actor))),
        ("Host", text(&run.host)),
    ];
    if let Some(at) = run.ended_at {
        pairs.push(("Ended", full_time(at)));
    }
    html! {
        p.crumbs { a href="/books" { "Books" } }
        div.heading {
            h1 { (title) " " (result(&view.state)) }
            @if view.state.is_running {
                p.actions { a.button.quiet href=(links::audit(run.id)) { "Refresh" } }
            }
        }
        @if let Some(error) = &run.error {
            section.panel.problem aria-label="Error" { p.lead { (text(error)) } }
        }
        @if run.ended_at.is_none() && !view.state.is_running {
            section.panel.problem aria-label="Error" {
                p.lead { "Its host ended before it. It changed nothing; start another one." }
            }
        }
        (details(pairs))
        @match &view.report {
            Some(report) => (show_report(view, report)),
            None if run.differences.is_some() => {
                p.empty { "Its report is of another version of the host." }
            },
            None => {},
        }
    }
}

fn show_report(view: &AuditRunReport, report: &Audit) -> Markup {
    let run = &view.state.run;
    let (outputs, dead) = (&report.outputs, &report.dead_letters);
    let left = report.total.saturating_sub(report.repaired);
    let shown = report
        .differences
        .get(..DIFFERENCES_SHOWN)
        .unwrap_or(&report.differences);
    html! {
        section aria-labelledby="differences" {
            h2 #differences { "Differences" }
            @if report.total == 0 { p.empty.good { "The books are correct." } }
            @else {
                (table("Differences", &["Kind", "Finding", "What to do"], html! {
                    @for difference in shown { (difference_row(difference)) }
                }))
                @if report.total > shown.len() as u64 {
                    p.caption { "The first " (shown.len()) " of " (count(report.total)) " are shown." }
                }
            }
            @if left > 0 && !run.is_repair {
                p.caption { "Publish lost outputs and missing notices again" }
                (command(&repair_command(view)))
            }
        }
        section aria-labelledby="checked" {
            h2 #checked { "Checked" }
            @for note in &report.notes { p { (text(note)) "." } }
            (messages(&report.workers))
            (details([
                ("Outputs since", full_time(report.outputs_since)),
                ("Outputs", html! {
                    (count(outputs.published)) " published, " (count(outputs.found)) " found, "
                    (count(outputs.removed)) " removed from their stream"
                }),
                ("Dead letters", html! {
                    (count(dead.dead_letters)) "; notices: " (count(dead.notices)) " found, "
                    (count(dead.unpublished)) " unpublished, " (count(dead.removed)) " removed from their stream"
                }),
            ]))
        }
    }
}

/// The command that repairs the differences of this window.
fn repair_command(view: &AuditRunReport) -> String {
    let run = &view.state.run;
    let mut line = format!(
        "oncely audit --since {} --repair",
        units::format_time(run.since)
    );
    if let Some(worker) = &run.worker {
        line.push_str(&format!(" --worker {}", super::failures::quoted(worker)));
    }
    line
}

fn difference_row(difference: &Difference) -> Markup {
    html! {
        tr {
            td { (badge(if difference.repaired { Tone::Good } else { Tone::Bad }, &difference.kind)) }
            td.wrap {
                (cell(&difference.found))
                @if let (Some(worker), Some(event_id)) = (&difference.worker, &difference.event_id) {
                    " " a href=(links::event(worker, event_id)) { "event " (cell(event_id)) }
                }
                @if let Some(id) = difference.dead_letter {
                    " " a href=(links::dead_letter(id)) { "dead letter " (id) }
                }
                @if let Some(number) = difference.output {
                    " " a href=(links::output(number)) { "output " (number) }
                }
            }
            td.wrap { @if difference.repaired { "repaired" } @else { (sentence(&difference.action)) } }
        }
    }
}

fn messages(workers: &[WorkerCounts]) -> Markup {
    if workers.is_empty() {
        return html! {};
    }
    let heads = [
        "Worker",
        "Stream",
        "#Messages",
        "#Done",
        "#Duplicates",
        "#Dead",
        "#No events",
        "#Pending",
    ];
    let rows = html! {
        @for counts in workers {
            tr {
                th scope="row" { a href=(links::worker(&counts.worker)) { (text(&counts.worker)) } }
                td { (text(&counts.stream)) }
                @for number in [
                    counts.messages, counts.done, counts.duplicates, counts.dead, counts.no_events,
                    counts.pending,
                ] { td.number { (count(number)) } }
            }
        }
    };
    table("Messages", &heads, rows)
}
