//! Jobs that redrive many dead letters: their list, their progress, and the verification.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use maud::{Markup, html};
use serde::Serialize;

use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{Tone, badge, command, count, counted, details, full_time, table, text, time};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters::{self, DeadLettersRequest};
use crate::api::jobs::{self, JobChange, JobItemsQuery, JobsQuery};
use crate::dlq::verify::Verification;
use crate::store::{JobAction, JobItem, JobState, RedriveJob};

/// How many jobs the list has.
const JOBS_SHOWN: u32 = 50;

/// How many dead letters of a job a page lists, and how many refused ones.
const ITEMS_SHOWN: u32 = 50;
const REFUSED_SHOWN: u32 = 50;

/// How many dead letters one page verifies.
const VERIFIED: u32 = 100;

/// A job with some of its dead letters.
#[derive(Debug, Serialize)]
struct View {
    job: RedriveJob,
    /// The first ones that were refused.
    refused: Vec<JobItem>,
    /// One page of its dead letters.
    items: Vec<JobItem>,
    /// The position of the next page; none on the last one.
    next: Option<u64>,
}

/// The verification of one page of a job's dead letters.
#[derive(Debug, Serialize)]
struct Verified {
    job: RedriveJob,
    from: u64,
    next: Option<u64>,
    #[serde(flatten)]
    verification: Verification,
}

pub async fn list(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let query = Query(JobsQuery { limit: JOBS_SHOWN });
    let Json(found) = jobs::list(host(&console), query).await?;
    visitor.answer(Section::Failures, "Redrive jobs", &found, |found| {
        let heads = ["Job", "State", "#Redriven", "#Refused", "#Total", "Started", "By", "Note"];
        html! {
            p.crumbs { a href="/failures" { "Failures" } }
            h1 { "Redrive jobs" }
            @if found.is_empty() {
                p.empty { "No job was started in the last 30 days. A redrive of several dead letters is one." }
            } @else {
                (table("Redrive jobs", &heads, html! { @for job in found { (row(job)) } }))
                @if found.len() >= JOBS_SHOWN as usize { p.caption { "The newest " (JOBS_SHOWN) " are shown." } }
            }
            p.caption { "The same in a terminal" }
            (command("oncely dlq jobs"))
        }
    })
}

fn row(job: &RedriveJob) -> Markup {
    html! {
        tr {
            th scope="row" { a href=(links::job(job.id)) { (job.id) } }
            td { (state(job.state)) }
            td.number { (count(job.redriven)) }
            td.number { (count(job.refused)) }
            td.number { (count(job.total)) }
            td { (time(job.created_at)) }
            td { (text(job.stated_name.as_deref().unwrap_or(&job.actor))) }
            td.wrap { (text(job.note.as_deref().unwrap_or_default())) }
        }
    }
}

fn state(state: JobState) -> Markup {
    let tone = match state {
        JobState::Running => Tone::Busy,
        JobState::Paused => Tone::Warn,
        JobState::Cancelled => Tone::Calm,
        JobState::Done => Tone::Good,
    };
    badge(tone, state.as_str())
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let from = visitor.query.number("from").unwrap_or_default();
    let Json(job) = jobs::show(host(&console), Path(id)).await?;
    let (items, next) = items(&console, id, from, ITEMS_SHOWN).await?;
    let store = &console.host.services.store;
    let view = View {
        refused: store.refused_redrive_job_items(id, REFUSED_SHOWN).await?,
        job,
        items,
        next,
    };
    let title = format!("Job {id}");
    visitor.answer(Section::Failures, &title, &view, |view| {
        page(&visitor, &title, view)
    })
}

/// A page of a job's dead letters, and the position of the next one.
async fn items(
    console: &Console,
    id: i64,
    from: u64,
    number: u32,
) -> Result<(Vec<JobItem>, Option<u64>), Problem> {
    let query = Query(JobItemsQuery {
        from,
        limit: number + 1,
    });
    let Json(mut items) = jobs::items(host(console), Path(id), query).await?;
    let next = items.get(number as usize).map(|item| item.position);
    items.truncate(number as usize);
    Ok((items, next))
}

fn page(visitor: &Visitor, title: &str, view: &View) -> Markup {
    let job = &view.job;
    html! {
        p.crumbs { a href="/failures" { "Failures" } " / " a href="/jobs" { "Redrive jobs" } }
        div.heading {
            h1 { (title) " " (state(job.state)) }
            (controls(visitor, job))
        }
        (progress(job))
        @if let Some(error) = &job.error {
            section.panel.problem aria-label="Last failure" {
                p.lead { "The host that runs it failed, and tries again: " (text(error)) }
            }
        }
        (facts(job))
        (refused(view))
        (item_table(view))
        p.caption { "The same in a terminal" }
        (command(&format!("oncely dlq jobs show {}", job.id)))
    }
}

/// The buttons that a job in this state has.
fn controls(visitor: &Visitor, job: &RedriveJob) -> Markup {
    let id = job.id;
    let button = |action: &'static str, label: &'static str, class: &'static str| {
        html! {
            button class=(class) type="submit" name="action" value=(action) { (label) }
        }
    };
    html! {
        div.actions {
            @if !job.state.is_final() {
                a.button.quiet href=(links::job(id)) { "Refresh" }
                form.actions action={ (links::job(id)) "/change" } method="post" {
                    (visitor.form_token())
                    @if job.state == JobState::Running { (button("pause", "Pause", "quiet")) }
                    @else { (button("resume", "Resume", "")) }
                    (button("cancel", "Cancel the job", "danger"))
                }
            }
            a.button.quiet href={ (links::job(id)) "/verify" } { "Verify" }
        }
    }
}

fn progress(job: &RedriveJob) -> Markup {
    let processed = job.redriven + job.refused;
    let label = format!(
        "{} of {} processed: {} redriven, {} refused",
        count(processed),
        counted(job.total, "dead letter"),
        count(job.redriven),
        count(job.refused)
    );
    html! {
        section.panel aria-label="Progress" {
            p.lead #progress { (label) }
            progress aria-labelledby="progress" max=(job.total.max(1)) value=(processed.min(job.total.max(1))) {}
        }
    }
}

fn facts(job: &RedriveJob) -> Markup {
    let rate = match job.rate {
        0 => "no limit".to_owned(),
        rate => format!("{rate} per second"),
    };
    let mut pairs = vec![
        ("Started", full_time(job.created_at)),
        ("By", text(job.stated_name.as_deref().unwrap_or(&job.actor))),
        ("Rate", text(&rate)),
    ];
    if let Some(at) = job.ended_at {
        pairs.push(("Ended", full_time(at)));
    }
    if let Some(note) = &job.note {
        pairs.push(("Note", text(note)));
    }
    details(pairs)
}

fn refused(view: &View) -> Markup {
    if view.refused.is_empty() {
        return html! {};
    }
    let rows = html! {
        @for item in &view.refused {
            tr {
                th scope="row" { a href=(links::dead_letter(item.id)) { (item.id) } }
                td.wrap { (text(refusal(item).unwrap_or_default())) }
            }
        }
    };
    html! {
        section aria-labelledby="refused" {
            h2 #refused { "Refused" }
            (table("Refused dead letters", &["Dead letter", "Refused because"], rows))
            @if view.job.refused > view.refused.len() as u64 {
                p.caption { "The first " (view.refused.len()) " of " (count(view.job.refused)) }
            }
        }
    }
}

fn refusal(item: &JobItem) -> Option<&str> {
    item.result.as_ref()?.refused.as_deref()
}

fn item_table(view: &View) -> Markup {
    let rows = html! {
        @for item in &view.items {
            tr {
                td.number { (count(item.position + 1)) }
                th scope="row" { a href=(links::dead_letter(item.id)) { (item.id) } }
                td {
                    @match (&item.result, refusal(item)) {
                        (None, _) => (badge(Tone::Calm, "waits")),
                        (Some(_), Some(_)) => (badge(Tone::Bad, "refused")),
                        (Some(_), None) => (badge(Tone::Good, "redriven")),
                    }
                }
            }
        }
    };
    let here = links::job(view.job.id);
    let is_first = view.items.first().is_none_or(|item| item.position == 0);
    html! {
        section aria-labelledby="items" {
            h2 #items { "Dead letters" }
            @if view.items.is_empty() { p.empty { "It has no dead letters from there on." } }
            @else { (table("Dead letters of the job", &["#Place", "Dead letter", "Result"], rows)) }
            nav.pages aria-label="Pages" {
                @if !is_first { a href=(here) { "First" } }
                @if let Some(next) = view.next { a rel="next" href={ (here) "?from=" (next) } { "Next" } }
            }
        }
    }
}

/// Pauses, resumes or cancels it.
pub async fn change(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let action = match fields.get("action") {
        Some("pause") => JobAction::Pause,
        Some("resume") => JobAction::Resume,
        Some("cancel") => JobAction::Cancel,
        _ => {
            let none = "the form names no action; nothing was changed".to_owned();
            return visitor.go(&console, &links::job(id), Err(none));
        }
    };
    let request = Json(JobChange { action });
    let (caller, path) = (visitor.caller.clone(), Path(id));
    let result = match jobs::change(host(&console), caller, path, request).await {
        Ok(Json(job)) => Ok(format!("job {id} is {}", job.state.as_str())),
        Err(error) => Err(Problem::from(error).line()),
    };
    visitor.go(&console, &links::job(id), result)
}

/// Checks the inbox and the streams for one page of its dead letters.
pub async fn verify(
    State(console): State<Arc<Console>>,
    Path(id): Path<i64>,
    visitor: Visitor,
) -> Answer {
    let from = visitor.query.number("from").unwrap_or_default();
    let Json(job) = jobs::show(host(&console), Path(id)).await?;
    let (items, next) = items(&console, id, from, VERIFIED).await?;
    let request = DeadLettersRequest {
        ids: items.iter().map(|item| item.id).collect(),
    };
    let Json(verification) = dead_letters::verify(host(&console), Json(request)).await?;
    let view = Verified {
        job,
        from,
        next,
        verification,
    };
    let title = format!("Verification of job {id}");
    visitor.answer(Section::Failures, &title, &view, |view| {
        show_verified(&title, view)
    })
}

fn show_verified(title: &str, view: &Verified) -> Markup {
    let checks = &view.verification.dead_letters;
    let problems: Vec<_> = checks
        .iter()
        .filter(|check| check.problem.is_some())
        .collect();
    let in_inbox = |state: Option<&str>| {
        let fitting = checks
            .iter()
            .filter(|check| check.inbox.as_deref() == state);
        fitting.count() as u64
    };
    let here = links::job(view.job.id);
    let last = view.from + checks.len() as u64;
    html! {
        p.crumbs { a href="/jobs" { "Redrive jobs" } " / " a href=(here) { "Job " (view.job.id) } }
        h1 { (title) }
        section.panel aria-label="Result" {
            p.lead {
                @if problems.is_empty() {
                    (badge(Tone::Good, "correct")) " No event took effect twice, and no output is on its stream twice."
                } @else {
                    (badge(Tone::Bad, "problem")) " " (counted(problems.len() as u64, "event")) " with a problem"
                }
            }
            (details([
                ("Checked", html! {
                    @if checks.is_empty() { "none" }
                    @else { (count(view.from + 1)) " to " (count(last)) " of " (count(view.job.total)) }
                }),
                ("Took effect", html! { (count(in_inbox(Some("done")))) }),
                ("Dead", html! { (count(in_inbox(Some("dead")))) }),
                ("In progress", html! { (count(in_inbox(None))) }),
            ]))
        }
        @if !problems.is_empty() {
            (table("Problems", &["Dead letter", "Event", "Problem"], html! {
                @for check in &problems {
                    tr {
                        th scope="row" { a href=(links::dead_letter(check.dead_letter)) { (check.dead_letter) } }
                        td.wrap {
                            a href=(links::event(&check.worker, &check.event_id)) { (text(&check.event_id)) }
                        }
                        td.wrap { (text(check.problem.as_deref().unwrap_or_default())) }
                    }
                }
            }))
        }
        @for stream in &view.verification.truncated {
            p { "Only the first million messages of " (text(stream)) " were read." }
        }
        nav.pages aria-label="Pages" {
            @if let Some(next) = view.next {
                a rel="next" href={ (here) "/verify?from=" (next) } { "Verify the next ones" }
            }
        }
        p.caption { "The same for all dead letters of a worker in a terminal" }
        (command("oncely dlq verify --worker NAME"))
    }
}
