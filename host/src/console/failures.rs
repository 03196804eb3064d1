//! Dead letters: groups first, then the list. The filter is the query of the address.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use maud::{Markup, html};
use serde::Serialize;

use super::fields::Fields;
use super::group_note;
use super::links;
use super::page::Section;
use super::parts::{Tone, badge, cell, command, count, counted, sentence, table, text, time};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::dead_letters;
use crate::model::failure_code::FailureCode;
use crate::model::units;
use crate::model::verdict::Reason;
use crate::store::{
    DeadLetterFilter, DeadLetterGroup, DeadLetterState, DeadLetterSummary, dead_letters_within,
};

/// How many dead letters a page lists.
const PAGE_SIZE: u32 = 50;

/// How many times 500 dead letters are read for a subject with wildcards, which may match few.
pub const PAGES_READ_MAX: u32 = 20;

/// How many groups a page lists, and with `groups=all`.
const GROUPS_SHOWN: u32 = 12;
const GROUPS_MAX: u32 = 500;

/// The failures that match a filter.
#[derive(Debug, Serialize)]
struct Failures {
    filter: DeadLetterFilter,
    groups: Vec<DeadLetterGroup>,
    /// The next page begins below this id; none on the last page.
    next_below: Option<i64>,
    dead_letters: Vec<DeadLetterSummary>,
}

pub async fn failures(State(console): State<Arc<Console>>, visitor: Visitor) -> Answer {
    let (filter, error) = match filter(&visitor.query) {
        Ok(filter) => (filter, None),
        Err(error) => (DeadLetterFilter::default(), Some(error)),
    };

    // One group more than shown: there may be more.
    let is_all = visitor.query.get("groups") == Some("all");
    let groups_shown = if is_all { GROUPS_MAX } else { GROUPS_SHOWN };
    let of_groups = DeadLetterFilter {
        limit: groups_shown + 1,
        below: None,
        ..filter.clone()
    };
    let page = DeadLetterFilter {
        limit: PAGE_SIZE,
        ..filter.clone()
    };
    let Json(mut groups) = dead_letters::groups(host(&console), Json(of_groups)).await?;
    let store = &console.host.services.store;
    let (listed, next_below) = dead_letters_within(store, &page, PAGES_READ_MAX).await?;
    let has_more_groups = groups.len() > groups_shown as usize;
    groups.truncate(groups_shown as usize);

    let view = Failures {
        filter,
        groups,
        next_below,
        dead_letters: listed,
    };
    let query = visitor.query.clone();
    if let Some(error) = error {
        let body = show(&visitor, &view, &query, false);
        return Ok(visitor.refusal(Section::Failures, "Failures", &error, body));
    }
    visitor.answer(Section::Failures, "Failures", &view, |view| {
        show(&visitor, view, &query, has_more_groups)
    })
}

/// The filter of a query.
///
/// # Errors
/// A time cannot be read.
pub fn filter(query: &Fields) -> Result<DeadLetterFilter, String> {
    let now = Timestamp::now();
    let time = |name: &str| {
        let given = query.get(name);
        given.map(|text| units::parse_time(text, now)).transpose()
    };
    Ok(DeadLetterFilter {
        ids: query.all("id").filter_map(|id| id.parse().ok()).collect(),
        worker: query.text("worker"),
        reason: query.text("reason"),
        code: query.text("code"),
        group: query.text("group"),
        subject: query.text("subject"),
        since: time("since")?,
        until: time("until")?,
        closed: query.is_set("closed"),
        below: query.number("below"),
        limit: PAGE_SIZE,
    })
}

/// The options of `oncely dlq` that select the same dead letters.
pub fn options(query: &Fields) -> String {
    let ids: Vec<&str> = query.all("id").collect();
    if !ids.is_empty() {
        return format!(" {}", ids.join(" "));
    }
    let mut options = String::new();
    for name in [
        "worker", "reason", "code", "group", "subject", "since", "until",
    ] {
        if let Some(value) = query.get(name) {
            options.push_str(&format!(" --{name} {}", quoted(value)));
        }
    }
    options
}

/// A word of a shell.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The fields of a query that select dead letters.
pub fn selection(query: &Fields) -> Fields {
    let names = [
        "worker", "reason", "code", "group", "subject", "since", "until",
    ];
    let given = names
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), query.text(name)?)));
    let ids = query.all("id").filter(|id| id.parse::<i64>().is_ok());
    given
        .chain(ids.map(|id| ("id".to_owned(), id.to_owned())))
        .collect()
}

fn show(visitor: &Visitor, view: &Failures, query: &Fields, has_more_groups: bool) -> Markup {
    let selected = selection(query);
    html! {
        div.heading {
            h1 { "Failures" }
            p.actions { a.button.quiet href="/jobs" { "Redrive jobs" } }
        }
        (filters(query))
        @if view.groups.is_empty() {
            p.empty.good {
                @if selected == Fields::default() { "No dead letters are open." }
                @else { "No dead letters match. " a href="/failures" { "Show all" } }
            }
        } @else {
            @if query.get("group").is_none() {
                section aria-labelledby="groups" {
                    h2 #groups { "Groups" }
                    (groups(&view.groups))
                    @if has_more_groups {
                        p { a href={ "/failures" (query.with("groups", Some("all")).query()) } {
                            "Show more groups"
                        } }
                    }
                }
            } @else {
                @for group in &view.groups { (group_head(visitor, group)) }
            }
            section aria-labelledby="dead-letters" {
                div.heading {
                    h2 #dead-letters { "Dead letters" }
                    (bulk_links(query, &selected))
                }
                @if query.is_set("closed") { (list(&view.dead_letters)) }
                @else { (selectable(&view.dead_letters)) }
                (pages(view, query))
            }
            p.caption { "The same in a terminal" }
            (command(&(String::from("oncely dlq list --groups") + &options(query))))
        }
    }
}

fn filters(query: &Fields) -> Markup {
    let field = |name: &'static str, label: &'static str, hint: &'static str| {
        html! {
            div {
                label for=(name) { (label) }
                input id=(name) name=(name) value=[query.get(name)] placeholder=(hint)
                    autocomplete="off" spellcheck="false";
            }
        }
    };
    html! {
        form.filters action="/failures" method="get" aria-label="Filter" {
            (field("worker", "Worker", ""))
            div {
                label for="reason" { "Reason" }
                select #reason name="reason" {
                    option value="" { "any" }
                    @for reason in Reason::ALL {
                        option selected[query.get("reason") == Some(reason.as_str())] {
                            (reason.as_str())
                        }
                    }
                }
            }
            (field("code", "Code", ""))
            (field("subject", "Subject", "orders.>"))
            (field("since", "Since", "2h, 12:00"))
            (field("until", "Until", "1h, 13:30"))
            @if let Some(group) = query.get("group") {
                div {
                    label for="group" { "Group" }
                    input #group name="group" value=(group) spellcheck="false";
                }
            }
            div.check {
                input #closed type="checkbox" name="closed" value="1" checked[query.is_set("closed")];
                label for="closed" { "With closed ones" }
            }
            div.submit {
                button type="submit" { "Filter" }
                @if selection(query) != Fields::default() { a href="/failures" { "Clear" } }
            }
        }
    }
}

fn groups(groups: &[DeadLetterGroup]) -> Markup {
    let heads = ["#Number", "Failure", "Worker", "Owner", "First", "Last"];
    let rows = html! {
        @for found in groups {
            @let link = match &found.group {
                Some(group) => links::group(&group.id),
                None => links::failures_of(&found.worker),
            };
            tr {
                td.number { (count(found.dead_letters)) }
                td.failure {
                    @match &found.group {
                        Some(group) => {
                            (reason(&group.reason, group.code.as_deref()))
                            a.shape href=(link) {
                                @if group.shape.is_empty() { "all of them" }
                                @else { (cell(&group.shape)) }
                            }
                            @if let Some(place) = &group.place {
                                span.muted { " at " (cell(place)) }
                            }
                        },
                        None => a.shape href=(link) { "older than groups" },
                    }
                    @if let Some(note) = found.note.as_ref().and_then(|note| note.note.as_deref()) {
                        span.shape { "Note: " (cell(note)) }
                    }
                }
                td { a href=(links::worker(&found.worker)) { (text(&found.worker)) } }
                td {
                    @if let Some(owner) = found.note.as_ref().and_then(|note| note.owner.as_deref()) {
                        (cell(owner))
                    }
                }
                td { (time(found.first_died_at)) }
                td { (time(found.last_died_at)) }
            }
        }
    };
    table("Groups of dead letters", &heads, rows)
}

/// The failure that the listed dead letters share.
fn group_head(visitor: &Visitor, found: &DeadLetterGroup) -> Markup {
    html! {
        section.panel aria-label="Group" {
            @if let Some(group) = &found.group {
                p.lead { (reason(&group.reason, group.code.as_deref())) (text(&group.shape)) }
                @if let Some(place) = &group.place { p { "at " code { (text(place)) } } }
                (explained(&group.reason, group.code.as_deref()))
            }
            p.caption {
                (counted(found.dead_letters, "dead letter")) " of "
                a href=(links::worker(&found.worker)) { (text(&found.worker)) }
                " · first " (time(found.first_died_at)) " · last " (time(found.last_died_at))
            }
            @if let Some(group) = &found.group {
                (group_note::show(visitor, &group.id, found.note.as_ref()))
            }
        }
    }
}

/// The meaning of a reason or of a code of the host.
pub fn explained(reason: &str, code: Option<&str>) -> Markup {
    let of_reason = Reason::ALL.iter().find(|each| each.as_str() == reason);
    let of_code = FailureCode::ALL
        .iter()
        .find(|each| Some(each.as_str()) == code);
    let explanations = [
        of_reason.map(|reason| reason.explanation()),
        of_code.map(|code| code.explanation()),
    ];
    html! {
        @for explanation in explanations.into_iter().flatten() {
            p.caption {
                code { (explanation.code) } ": " (sentence(explanation.meaning)) " "
                (sentence(explanation.action))
            }
        }
    }
}

/// A reason with its code.
pub fn reason(reason: &str, code: Option<&str>) -> Markup {
    html! {
        (badge(Tone::Bad, reason)) " "
        @if let Some(code) = code { code.tag { (cell(code)) } " " }
    }
}

/// The state of a dead letter.
pub fn state(state: DeadLetterState) -> Markup {
    let tone = match state {
        DeadLetterState::Open => Tone::Bad,
        DeadLetterState::Redriven => Tone::Busy,
        DeadLetterState::Done => Tone::Good,
        DeadLetterState::Resolved | DeadLetterState::Dropped => Tone::Calm,
    };
    badge(tone, state.as_str())
}

fn bulk_links(query: &Fields, selected: &Fields) -> Markup {
    if query.is_set("closed") {
        return html! {};
    }
    let query = selected.query();
    html! {
        p.actions {
            a.button href={ "/failures/redrive" (query) } { "Redrive all…" }
            a.button.quiet href={ "/failures/resolve" (query) } { "Resolve all…" }
            a.button.quiet href={ "/failures/drop" (query) } { "Drop all…" }
        }
    }
}

/// The columns of a table of dead letters.
const HEADS: [&str; 7] = [
    "Id",
    "State",
    "Failure",
    "Worker",
    "Event",
    "#Attempts",
    "Died",
];

/// A table of dead letters.
pub fn list(dead_letters: &[DeadLetterSummary]) -> Markup {
    table("Dead letters", &HEADS, rows(dead_letters, false))
}

/// A table of dead letters, some of which can be selected for a redrive.
fn selectable(dead_letters: &[DeadLetterSummary]) -> Markup {
    let mut heads = vec!["Select"];
    heads.extend(HEADS);
    html! {
        form action="/failures/redrive" method="get" {
            // Without it, an empty selection would look like one without a filter.
            input type="hidden" name="selected" value="1";
            (table("Dead letters", &heads, rows(dead_letters, true)))
            div.submit { button.quiet type="submit" { "Redrive the selected ones…" } }
        }
    }
}

fn rows(dead_letters: &[DeadLetterSummary], is_selectable: bool) -> Markup {
    html! {
        @for one in dead_letters {
            tr {
                @if is_selectable {
                    td.select {
                        @if one.state == DeadLetterState::Open {
                            input type="checkbox" name="id" value=(one.id)
                                aria-label=(format!("Select dead letter {}", one.id));
                        }
                    }
                }
                th scope="row" { a href=(links::dead_letter(one.id)) { (one.id) } }
                td { (state(one.state)) }
                td.failure {
                    (reason(&one.reason, one.code.as_deref()))
                    span.shape { (cell(&one.detail)) }
                }
                td { a href=(links::worker(&one.worker)) { (text(&one.worker)) } }
                td {
                    a href=(links::event(&one.worker, &one.event_id)) { (cell(&one.event_id)) }
                    br; span.muted { (cell(&one.subject)) }
                }
                td.number { (one.attempts) }
                td { (time(one.died_at)) }
            }
        }
    }
}

fn pages(view: &Failures, query: &Fields) -> Markup {
    html! {
        nav.pages aria-label="Pages" {
            @if query.get("below").is_some() {
                a href={ "/failures" (query.with("below", None).query()) } { "Newest" }
            }
            @if let Some(below) = view.next_below {
                a rel="next" href={ "/failures" (query.with("below", Some(&below.to_string())).query()) } {
                    "Older"
                }
            }
        }
    }
}

/// The filter of a form.
///
/// # Errors
/// A time cannot be read.
pub fn filter_of_form(fields: &Fields) -> Result<DeadLetterFilter, Problem> {
    filter(fields).map_err(|error| {
        let status = axum::http::StatusCode::BAD_REQUEST;
        Problem::refused(status, &error, "open /failures and select again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_becomes_the_options_of_the_command() {
        let query = Fields::parse(b"worker=a&subject=orders.%3E&code=it%27s&below=7");
        assert_eq!(
            options(&query),
            " --worker a --code 'it'\\''s' --subject 'orders.>'"
        );
        let chosen = Fields::parse(b"id=3&worker=a&id=x&id=4");
        assert_eq!(filter(&chosen).unwrap().ids, [3, 4]);
        assert_eq!(selection(&chosen).query(), "?worker=a&id=3&id=4");
        assert_eq!(options(&selection(&chosen)), " 3 4");
        assert!(filter(&Fields::parse(b"since=noon")).is_err());
        assert_eq!(filter(&query).unwrap().below, Some(7));
    }
}
