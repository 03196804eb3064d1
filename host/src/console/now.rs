//! The first page: conditions that need a person, the four ages that matter, and the workers.

use std::sync::Arc;

use axum::extract::State;
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Serialize;

use super::Console;
use super::chart;
use super::links;
use super::page::Section;
use super::parts::{Tone, age, badge, cell, command, count, counted, table, text, time};
use super::visitor::{Answer, Visitor};
use crate::api::{self, Status};
use crate::model::alarm::{self, Alarm};
use crate::model::breaker;
use crate::runtime::{RunState, WorkerState};
use crate::store::{DeadLetterDepth, HistoryPoint, OutboxLag};

/// How many conditions the page shows.
const NEEDS_SHOWN: usize = 50;

/// The state of the installation, as this host sees it.
#[derive(Debug, Serialize)]
struct Now {
    status: Status,
    /// The workers with open dead letters; none when the database is unavailable.
    dead_letters: Option<Vec<DeadLetterDepth>>,
    /// The workers with unpublished outputs; none when the database is unavailable.
    outbox: Option<Vec<OutboxLag>>,
    /// The last 24 hours of all workers, by half an hour.
    history: Vec<HistoryPoint>,
    /// The live hosts; none when the database is unavailable.
    hosts: Option<usize>,
    needs: Vec<Need>,
}

/// A condition that needs a person.
#[derive(Debug, Serialize)]
struct Need {
    title: String,
    detail: String,
    /// The command that shows more or helps.
    command: String,
    /// The page that does the same.
    link: Option<String>,
    /// Since when, if that is known.
    since: Option<Timestamp>,
}

pub async fn now(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let store = &console.host.services.store;
    let status = api::current_status(&console.host).await;
    let dead_letters = store.dead_letter_depths().await.ok();
    let outbox = store.outbox_lag().await.ok();
    let needs = needs(
        &status,
        dead_letters.as_deref().unwrap_or_default(),
        outbox.as_deref().unwrap_or_default(),
    );
    let now = Now {
        hosts: console.host.reports().await.ok().map(|hosts| hosts.len()),
        history: store
            .history(None, 24 * 12, chart::SPARK_STEP)
            .await
            .unwrap_or_default(),
        status,
        dead_letters,
        outbox,
        needs,
    };
    visitor.answer(Section::Now, "Now", &now, show)
}

/// Everything that needs a person, most urgent first. A condition is named once: alarms about open
/// dead letters or parked outputs stand for these.
fn needs(status: &Status, dead_letters: &[DeadLetterDepth], outbox: &[OutboxLag]) -> Vec<Need> {
    let mut needs = Vec::new();
    if let Some(why) = &status.not_ready {
        let restored = why.contains("oncely recover");
        needs.push(Need {
            title: "This host is not ready".to_owned(),
            detail: why.clone(),
            command: match restored {
                true => "oncely recover --dry-run".to_owned(),
                false => "oncely status".to_owned(),
            },
            link: Some("/hosts".to_owned()),
            since: None,
        });
    }
    let broken = status
        .workers
        .iter()
        .filter(|state| state.state == RunState::Broken);
    needs.extend(broken.map(|state| Need {
        title: format!("Worker {} cannot run", state.worker),
        detail: state.error.clone().unwrap_or_default(),
        command: format!("oncely workers {}", state.worker),
        link: Some(links::worker(&state.worker)),
        since: None,
    }));
    let alarms = status.alarms.as_deref().unwrap_or_default();
    needs.extend(alarms.iter().map(need_of_alarm));

    // Conditions below the thresholds of the alarms.
    let has_alarm = |worker: &str, kinds: &[alarm::Kind]| {
        let fits = |alarm: &Alarm| alarm.worker == worker && kinds.contains(&alarm.kind);
        alarms.iter().any(fits)
    };
    let about_dead_letters = [
        alarm::Kind::DeadLetters,
        alarm::Kind::DeadLetterAge,
        alarm::Kind::NewFailure,
    ];
    for depth in dead_letters {
        if !has_alarm(&depth.worker, &about_dead_letters) {
            needs.push(Need {
                title: format!("{} of {}", counted(depth.open, "dead letter"), depth.worker),
                detail: format!("the oldest died {} ago", age(depth.oldest_ms)),
                command: format!("oncely dlq list --groups --worker {}", depth.worker),
                link: Some(links::failures_of(&depth.worker)),
                since: None,
            });
        }
    }
    let open = status
        .breakers
        .iter()
        .filter(|breaker| breaker.state != breaker::State::Closed);
    needs.extend(open.map(|breaker| Need {
        title: format!("Outputs do not reach the stream {}", breaker.stream),
        detail: breaker.error.clone(),
        command: "oncely outbox list --unpublished".to_owned(),
        link: Some("/outputs?unpublished=1".to_owned()),
        since: None,
    }));
    needs.extend(status.refused_subjects.iter().map(|refused| Need {
        title: format!("The subject {} is refused", refused.subject),
        detail: refused.error.clone(),
        command: "oncely outbox list --unpublished".to_owned(),
        link: Some("/outputs?unpublished=1".to_owned()),
        since: None,
    }));
    for lag in outbox {
        if lag.parked > 0 && !has_alarm(&lag.worker, &[alarm::Kind::Parked]) {
            needs.push(Need {
                title: format!("{} of {} parked", counted(lag.parked, "output"), lag.worker),
                detail: format!("they block {}", counted(lag.blocked, "other output")),
                command: format!("oncely outbox list --worker {}", lag.worker),
                link: Some("/outputs".to_owned()),
                since: None,
            });
        }
    }
    needs
}

fn need_of_alarm(alarm: &Alarm) -> Need {
    let value = alarm.kind.format_value(alarm.value);
    let threshold = alarm.kind.format_value(alarm.threshold);
    let explanation = alarm.kind.explanation();
    let detail = match &alarm.group {
        Some(group) => {
            let code = group.code.as_deref().map(|code| format!(" ({code})"));
            let code = code.unwrap_or_default();
            let open = counted(alarm.open_dead_letters, "dead letter");
            format!("{}{code}: {} · {open} open", group.reason, group.shape)
        }
        None => format!(
            "{} It was {value}; the threshold is {threshold}.",
            explanation.meaning
        ),
    };
    let of_worker = match alarm.worker.as_str() {
        alarm::HOST => String::new(),
        worker => format!(" of {worker}"),
    };
    Need {
        title: format!("Alarm {}{of_worker}", alarm.kind.as_str()),
        detail,
        command: alarm.command(),
        link: link_of_alarm(alarm),
        since: Some(alarm.raised_at),
    }
}

/// The page that helps with an alarm.
fn link_of_alarm(alarm: &Alarm) -> Option<String> {
    use alarm::Kind;
    Some(match (alarm.kind, &alarm.group) {
        (Kind::NewFailure, Some(group)) => links::group(&group.id),
        (Kind::DeadLetters | Kind::DeadLetterAge | Kind::NewFailure, _) => {
            links::failures_of(&alarm.worker)
        }
        (Kind::UnhandledAge | Kind::CannotRun | Kind::Paused, _) => links::worker(&alarm.worker),
        (Kind::Parked, _) => "/outputs".to_owned(),
        (Kind::UnpublishedAge | Kind::IdTaken, _) => "/outputs?unpublished=1".to_owned(),
        (Kind::Restored | Kind::Database, _) => "/hosts".to_owned(),
    })
}

fn show(now: &Now) -> Markup {
    html! {
        h1 { "Now" }
        (tiles(now))
        section aria-labelledby="needs" {
            h2 #needs { "Needs a person" }
            @if now.needs.is_empty() {
                p.empty.good { "Nothing needs a person." }
            } @else {
                ul.needs {
                    @for need in now.needs.iter().take(NEEDS_SHOWN) { (show_need(need)) }
                }
                @if now.needs.len() > NEEDS_SHOWN {
                    p.caption { "The first " (NEEDS_SHOWN) " of " (now.needs.len()) ". The others in a terminal" }
                    (command("oncely status"))
                }
            }
        }
        section aria-labelledby="workers" {
            h2 #workers { "Workers" }
            (show_workers(now))
        }
    }
}

fn show_need(need: &Need) -> Markup {
    html! {
        li.panel {
            div {
                h3 {
                    @match &need.link {
                        Some(link) => a href=(link) { (text(&need.title)) },
                        None => (text(&need.title)),
                    }
                    @if let Some(since) = need.since { " " span.muted { (time(since)) } }
                }
                p { (cell(&need.detail)) }
            }
            (command(&need.command))
        }
    }
}

/// The four numbers: an age says more than a count.
fn tiles(now: &Now) -> Markup {
    let workers = &now.status.workers;
    let unhandled = workers
        .iter()
        .filter_map(|state| state.oldest_pending_ms)
        .max();
    let pending: u64 = workers.iter().filter_map(|state| state.pending).sum();
    let (unpublished, outputs) = match &now.outbox {
        Some(lags) => {
            let waiting = lags.iter().map(|lag| lag.unpublished).sum();
            let oldest = lags.iter().filter_map(|lag| lag.oldest_ms).max();
            (oldest.map(age), counted(waiting, "output"))
        }
        None => unknown(),
    };
    let (open, oldest) = match &now.dead_letters {
        Some(depths) => {
            let open: u64 = depths.iter().map(|depth| depth.open).sum();
            let oldest = depths.iter().map(|depth| depth.oldest_ms).max();
            let oldest = oldest.map(|ms| format!("the oldest died {} ago", age(ms)));
            let open = (open > 0).then(|| count(open));
            (open, oldest.unwrap_or_else(|| "none is open".to_owned()))
        }
        None => unknown(),
    };
    let ready = match now.status.ready {
        true => "this host is ready",
        false => "this host is not ready",
    };
    let hosts = now
        .hosts
        .map_or_else(|| unknown().0, |hosts| Some(hosts.to_string()));
    html! {
        div.tiles {
            (tile("/workers", "Oldest unhandled message", unhandled.map(age),
                &counted(pending, "message")))
            (tile("/outputs?unpublished=1", "Oldest unpublished output", unpublished, &outputs))
            (tile("/failures", "Open dead letters", open, &oldest))
            (tile("/hosts", "Hosts", hosts, ready))
        }
    }
}

/// Stands for a number that the database has.
fn unknown() -> (Option<String>, String) {
    (
        Some("?".to_owned()),
        "the database does not answer".to_owned(),
    )
}

fn tile(link: &str, label: &str, value: Option<String>, detail: &str) -> Markup {
    let class = if value.is_some() {
        "value"
    } else {
        "value none"
    };
    html! {
        a.tile href=(link) {
            span.label { (label) }
            span class=(class) { (value.as_deref().unwrap_or("none")) }
            span.detail { (detail) }
        }
    }
}

fn show_workers(now: &Now) -> Markup {
    if now.status.workers.is_empty() {
        return html! {
            p.empty { "No workers are deployed. Deploy one with" (command("oncely deploy")) }
        };
    }
    let heads = [
        "Worker",
        "State",
        "#Waiting",
        "#Oldest",
        "#Handled",
        "#Retries",
        "#Dead letters",
        "#Unpublished",
        "Last 24 hours",
    ];
    let rows = html! {
        @for state in &now.status.workers { (worker_row(now, state)) }
    };
    html! {
        (table("Workers", &heads, rows))
        p.caption { "Handled messages and retries are those of this host since its start." }
    }
}

fn worker_row(now: &Now, state: &WorkerState) -> Markup {
    let open = now
        .dead_letters
        .iter()
        .flatten()
        .find(|depth| depth.worker == state.worker);
    let lag = now
        .outbox
        .iter()
        .flatten()
        .find(|lag| lag.worker == state.worker);
    let dash = || "–".to_owned();
    let of_worker = now
        .history
        .iter()
        .filter(|point| point.worker == state.worker);
    let history: Vec<HistoryPoint> = of_worker.cloned().collect();
    html! {
        tr {
            th scope="row" {
                a href=(links::worker(&state.worker)) { (state.worker) }
                @if let Some(version) = state.version { " " span.muted { "v" (version) } }
            }
            td { (run_state(state.state)) }
            td.number { (state.pending.map_or_else(dash, count)) }
            td.number { (state.oldest_pending_ms.map_or_else(dash, age)) }
            td.number { (count(state.done)) }
            td.number { (count(state.retries)) }
            td.number {
                @match open {
                    Some(depth) => a href=(links::failures_of(&state.worker)) { (count(depth.open)) },
                    None => "0",
                }
            }
            td.number {
                (count(lag.map_or(0, |lag| lag.unpublished)))
                @if let Some(parked) = lag.map(|lag| lag.parked).filter(|parked| *parked > 0) {
                    " (" (count(parked)) " parked)"
                }
            }
            td { (chart::spark(&history, Timestamp::now())) }
        }
    }
}

/// The state of a worker.
pub fn run_state(state: RunState) -> Markup {
    let tone = match state {
        RunState::Running => Tone::Good,
        RunState::Starting => Tone::Busy,
        RunState::Paused | RunState::Held => Tone::Warn,
        RunState::Broken => Tone::Bad,
    };
    badge(tone, &state.to_string())
}
