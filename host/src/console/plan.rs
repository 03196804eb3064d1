//! The plan of a redrive of many dead letters: its classes, its hazards, dry runs of a sample, and
//! the job that it starts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use maud::{Markup, html};
use serde::Serialize;

use super::bulk::hidden;
use super::dead_letter::attribution_fields;
use super::dry_run;
use super::failures::{PAGES_READ_MAX, filter_of_form, options, reason, selection};
use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{Tone, badge, cell, command, count, counted, sentence, table, text};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters::{self, DeadLettersRequest};
use crate::api::jobs::{self, JobRequest, JobsQuery};
use crate::dlq::dry_run::{Prediction, Preview};
use crate::store::{
    DeadLetterFilter, DeadLetterGroup, DeadLetterState, JobState, RedriveJob, count_dead_letters,
    dead_letters_within,
};

/// How many classes a plan shows, and how many dry runs it makes in all of them.
const CLASSES_MAX: u32 = 12;
const SAMPLE_MAX: usize = 12;

/// How many newest dead letters of a worker are searched for one that is older than groups.
const UNGROUPED_READ: u32 = 50;

/// How many jobs are searched for running ones.
const JOBS_READ: u32 = 20;

/// The rate that a form proposes, as the command does.
const RATE: u32 = 100;

/// A redrive that is about to begin.
#[derive(Debug, Serialize)]
struct Plan {
    filter: DeadLetterFilter,
    /// How many dead letters match.
    total: u64,
    /// The largest failure groups among them.
    classes: Vec<Class>,
    /// Dead letters of groups that are not shown.
    in_other_classes: u64,
    hazards: Vec<String>,
    /// The dry runs of a sample: the newest dead letters of each class.
    sample: Vec<Preview>,
}

/// The dead letters of a failure group, and the dry runs of some of them.
#[derive(Debug, Serialize)]
struct Class {
    #[serde(flatten)]
    group: DeadLetterGroup,
    /// The dead letters of the sample, and their predictions.
    sampled: Vec<i64>,
    predictions: BTreeMap<Prediction, u64>,
}

/// The page of the plan. It executes handlers, so it needs the role `operate`.
pub async fn show(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let filter = pinned(filter_of_form(&visitor.query)?);
    if visitor.query.is_set("selected") && filter.ids.is_empty() {
        let none = "no dead letter is selected".to_owned();
        return visitor.go(&console, "/failures", Err(none));
    }
    let plan = plan(&console, filter).await?;
    let title = title(plan.total);
    visitor.answer(Section::Failures, &title, &plan, |plan| {
        page(&visitor, &title, plan)
    })
}

/// Starts the job, unless more dead letters match than the plan had.
pub async fn start(
    State(console): State<Arc<Console>>,
    mut visitor: Visitor,
    fields: Fields,
) -> Answer {
    let filter = DeadLetterFilter {
        below: fields.number("below"),
        ..pinned(filter_of_form(&fields)?)
    };
    let planned: u64 = fields.number("count").unwrap_or_default();
    let back = format!("/failures{}", selection(&fields).query());
    let (matching, _) = count_dead_letters(&console.host.services.store, &filter).await?;
    if matching > planned {
        let more = format!(
            "{} match now, {planned} did in the plan; nothing was changed",
            counted(matching, "dead letter")
        );
        return visitor.go(&console, &back, Err(more));
    }
    if matching == 0 {
        let none = "no dead letter matches any more; nothing was changed".to_owned();
        return visitor.go(&console, &back, Err(none));
    }
    let request = JobRequest {
        filter: Some(filter),
        rate: fields.number("rate").unwrap_or_default(),
        by: visitor.attribution(&fields),
        ..JobRequest::default()
    };
    let caller = visitor.caller.clone();
    let Json(job) = jobs::create(host(&console), caller, Json(request)).await?;
    let started = format!(
        "job {} redrives {}",
        job.id,
        counted(job.total, "dead letter")
    );
    visitor.go(&console, &links::job(job.id), Ok(started))
}

/// The filter of a plan: open dead letters only, of all pages.
fn pinned(filter: DeadLetterFilter) -> DeadLetterFilter {
    DeadLetterFilter {
        closed: false,
        below: None,
        ..filter
    }
}

fn title(total: u64) -> String {
    format!("Redrive {}", counted(total, "dead letter"))
}

async fn plan(console: &Console, filter: DeadLetterFilter) -> Result<Plan, Problem> {
    // Later dead letters do not belong to the plan.
    let store = &console.host.services.store;
    let (total, newest) = count_dead_letters(store, &filter).await?;
    let filter = DeadLetterFilter {
        below: newest.map(|newest| newest.saturating_add(1)),
        ..filter
    };

    // The classes, and a sample of each.
    let of_groups = DeadLetterFilter {
        limit: CLASSES_MAX,
        ..filter.clone()
    };
    let Json(groups) = dead_letters::groups(host(console), Json(of_groups)).await?;
    let each = (SAMPLE_MAX / groups.len().max(1)).max(1);
    let mut classes = Vec::new();
    for group in groups {
        classes.push(Class {
            sampled: sample(console, &filter, &group, each).await?,
            predictions: BTreeMap::new(),
            group,
        });
    }
    let shown: u64 = classes.iter().map(|class| class.group.dead_letters).sum();

    // Their dry runs.
    let ids: Vec<i64> = classes
        .iter()
        .flat_map(|class| class.sampled.clone())
        .collect();
    let request = DeadLettersRequest { ids };
    let Json(sample) = dead_letters::dry_run(host(console), Json(request)).await?;
    for class in &mut classes {
        let of_class = sample
            .iter()
            .filter(|preview| class.sampled.contains(&preview.dead_letter));
        for preview in of_class {
            *class.predictions.entry(preview.prediction).or_default() += 1;
        }
    }
    Ok(Plan {
        hazards: hazards(console, &classes, &sample).await?,
        filter,
        total,
        classes,
        in_other_classes: total.saturating_sub(shown),
        sample,
    })
}

/// The newest open dead letters of a class.
async fn sample(
    console: &Console,
    filter: &DeadLetterFilter,
    class: &DeadLetterGroup,
    number: usize,
) -> Result<Vec<i64>, Problem> {
    let group = class.group.as_ref().map(|group| group.id.clone());
    let of_class = DeadLetterFilter {
        worker: Some(class.worker.clone()),
        group: group.clone().or(filter.group.clone()),
        // Others than open ones may be among them.
        limit: UNGROUPED_READ.max(SAMPLE_MAX as u32),
        ..filter.clone()
    };
    let store = &console.host.services.store;
    let (found, _) = dead_letters_within(store, &of_class, PAGES_READ_MAX).await?;
    let fitting = found
        .iter()
        .filter(|one| one.group == group && one.state == DeadLetterState::Open);
    Ok(fitting.take(number).map(|one| one.id).collect())
}

/// The conditions under which a redrive has another result than expected.
async fn hazards(
    console: &Console,
    classes: &[Class],
    sample: &[Preview],
) -> Result<Vec<String>, Problem> {
    let store = &console.host.services.store;
    let mut hazards = Vec::new();

    // The workers
    let active = store.active_deployments().await?;
    let pauses = store.pauses().await?;
    let workers: BTreeSet<&str> = classes
        .iter()
        .map(|class| class.group.worker.as_str())
        .collect();
    for worker in workers {
        if !active.iter().any(|deployment| deployment.worker == worker) {
            hazards.push(format!(
                "Worker {worker} is not deployed: its messages wait until it is."
            ));
        }
        if pauses.iter().any(|(paused, _)| paused == worker) {
            hazards.push(format!(
                "Worker {worker} is paused: its messages wait until `oncely resume {worker}`."
            ));
        }
    }

    // The dry runs
    let of = |prediction: Prediction| {
        let fitting = sample
            .iter()
            .filter(|preview| preview.prediction == prediction);
        fitting.count() as u64
    };
    let of_sample = |number: u64| format!("{number} of {} in the sample", sample.len());
    let late = of(Prediction::OrderHazard);
    if late > 0 {
        hazards.push(format!(
            "{} would take effect after a later message of their ordering key.",
            of_sample(late)
        ));
    }
    let failing = of(Prediction::SameFailure) + of(Prediction::DifferentFailure);
    if failing > 0 {
        hazards.push(format!(
            "{} would fail again, and become dead letters again.",
            of_sample(failing)
        ));
    }
    let impossible = of(Prediction::NotPossible);
    if impossible > 0 {
        hazards.push(format!("{} have no dry run.", of_sample(impossible)));
    }

    // Other jobs
    let query = axum::extract::Query(JobsQuery { limit: JOBS_READ });
    let Json(jobs) = jobs::list(host(console), query).await?;
    let is_unfinished = |job: &&RedriveJob| !job.state.is_final();
    for job in jobs.iter().filter(is_unfinished) {
        let state = match job.state {
            JobState::Paused => "paused",
            _ => "running",
        };
        hazards.push(format!(
            "Job {} is {state}. Dead letters of both jobs are redriven once.",
            job.id
        ));
    }
    Ok(hazards)
}

fn page(visitor: &Visitor, title: &str, plan: &Plan) -> Markup {
    let chosen = selection(&visitor.query);
    let failures = format!("/failures{}", chosen.query());
    html! {
        p.crumbs { a href=(failures) { "Failures" } }
        h1 { (title) "?" }
        @if plan.total == 0 {
            p.empty { "No dead letter matches any more." }
        } @else {
            p {
                "Each message is sent to its worker again, in the order of its stream. It takes "
                "effect once, or it becomes a dead letter again. The job runs on the hosts, and can "
                "be paused and cancelled."
            }
            (hazard_list(&plan.hazards))
            (class_table(plan))
            (start_form(visitor, title, plan, &chosen, &failures))
            (sample_list(&plan.sample))
            p.caption { "The same in a terminal" }
            (command(&(String::from("oncely dlq redrive") + &terminal(&chosen))))
        }
    }
}

/// The options of the command. Without a filter it wants `--all`.
fn terminal(chosen: &Fields) -> String {
    match options(chosen) {
        none if none.is_empty() => " --all".to_owned(),
        options => options,
    }
}

fn hazard_list(hazards: &[String]) -> Markup {
    html! {
        section.panel aria-labelledby="hazards" {
            h2 #hazards { "Hazards" }
            @if hazards.is_empty() { p { (badge(Tone::Good, "none found")) } }
            @else { ul { @for hazard in hazards { li { (sentence(hazard)) } } } }
        }
    }
}

fn class_table(plan: &Plan) -> Markup {
    let rows = html! {
        @for class in &plan.classes {
            tr {
                td.number { (count(class.group.dead_letters)) }
                td.failure {
                    @match &class.group.group {
                        Some(group) => {
                            (reason(&group.reason, group.code.as_deref()))
                            a.shape href=(links::group(&group.id)) {
                                @if group.shape.is_empty() { "all of them" }
                                @else { (cell(&group.shape)) }
                            }
                        },
                        None => span.shape { "older than groups" },
                    }
                    @if let Some(note) = class.group.note.as_ref().and_then(|note| note.note.as_deref()) {
                        span.shape { "Note: " (cell(note)) }
                    }
                }
                td { a href=(links::worker(&class.group.worker)) { (text(&class.group.worker)) } }
                td {
                    @if class.predictions.is_empty() { span.muted { "not sampled" } }
                    @for (prediction, number) in &class.predictions {
                        (badge(dry_run::tone(*prediction), &format!("{number} × {}", prediction.label()))) " "
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="classes" {
            h2 #classes { "Classes" }
            (table("Classes", &["#Number", "Failure", "Worker", "Dry runs of a sample"], rows))
            @if plan.in_other_classes > 0 {
                p.caption { (counted(plan.in_other_classes, "dead letter")) " of smaller groups" }
            }
        }
    }
}

fn start_form(
    visitor: &Visitor,
    title: &str,
    plan: &Plan,
    chosen: &Fields,
    failures: &str,
) -> Markup {
    html! {
        section aria-labelledby="start" {
            h2 #start { "Start" }
            form.panel.stack action="/failures/redrive" method="post" {
                (visitor.form_token())
                (hidden(chosen))
                input type="hidden" name="count" value=(plan.total);
                input type="hidden" name="below" value=[plan.filter.below];
                (attribution_fields(visitor, false))
                div.short {
                    label for="rate" { "At most per second; 0 for no limit" }
                    input #rate name="rate" type="number" min="0" max="100000" value=(RATE) required;
                }
                div.submit {
                    button type="submit" { (title) }
                    a href=(failures) { "Cancel" }
                }
            }
        }
    }
}

fn sample_list(sample: &[Preview]) -> Markup {
    html! {
        section aria-labelledby="sample" {
            h2 #sample { "Sample" }
            @if sample.is_empty() { p.empty { "No dead letter of the sample is open." } }
            @for preview in sample {
                div.panel {
                    p.lead {
                        a href=(links::dead_letter(preview.dead_letter)) { "Dead letter " (preview.dead_letter) }
                        " " (badge(dry_run::tone(preview.prediction), preview.prediction.label()))
                    }
                    p { (text(&preview.detail)) }
                    @if dry_run::has_effects(preview) {
                        details {
                            summary { "Rows, state and outputs of dead letter " (preview.dead_letter) }
                            (dry_run::effects(preview))
                        }
                    }
                }
            }
        }
    }
}
