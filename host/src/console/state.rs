//! Keyed state of a worker.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use maud::html;

use super::dead_letter::decoded;
use super::links;
use super::page::Section;
use super::parts::{body, cell, command, details, full_time, readable, table, text, time};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::{self, StateFilter, StateKey};
use crate::model::units;

/// The most keys of a page.
const SHOWN_MAX: u32 = 100;

pub async fn list(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
) -> Answer {
    let prefix = visitor.query.raw("prefix").unwrap_or_default().to_owned();
    let filter = StateFilter {
        prefix: prefix.clone(),
        limit: SHOWN_MAX,
    };
    let Json(entries) =
        api::state_list(host(&console), Path(worker.clone()), Query(filter)).await?;
    let title = format!("State of {worker}");
    visitor.answer(Section::Workers, &title, &entries, |entries| html! {
        p.crumbs { a href=(links::worker(&worker)) { "Worker " (text(&worker)) } }
        h1 { (text(&title)) }
        form.filters action={ (links::worker(&worker)) "/state" } method="get" aria-label="Filter" {
            div {
                label for="prefix" { "Keys that begin with" }
                input #prefix name="prefix" value=(prefix) autocomplete="off" spellcheck="false";
            }
            div.submit { button type="submit" { "Filter" } }
        }
        @if entries.is_empty() {
            p.empty { "No key begins with this text." }
        } @else {
            (table("State", &["Key", "#Version", "#Size", "Changed", "Value"], html! {
                @for entry in entries {
                    tr {
                        th scope="row" {
                            a href={ (links::worker(&worker)) "/state/entry?key=" (links::encoded(&entry.key)) } {
                                (cell(&entry.key))
                            }
                        }
                        td.number { (entry.version) }
                        td.number { (units::format_size(entry.size)) }
                        td { (time(entry.updated_at)) }
                        td.wrap { code { (cell(&readable(&decoded(&entry.value)).0)) } }
                    }
                }
            }))
            @if entries.len() >= SHOWN_MAX as usize {
                p.caption { "The first " (SHOWN_MAX) " keys are shown. A longer prefix shows others." }
            }
        }
        p.caption { "The same in a terminal" }
        (command(&format!("oncely state list {worker}")))
    })
}

pub async fn show(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
) -> Answer {
    let Some(key) = visitor.query.raw("key").map(str::to_owned) else {
        let why = "the address names no key".to_owned();
        return Err(Problem::not_found(
            why,
            &format!("oncely state list {worker}"),
        ));
    };
    let key = Query(StateKey { key });
    let Json(entry) = api::state_get(host(&console), Path(worker.clone()), key).await?;
    let title = format!("State of {worker}: {}", entry.key);
    visitor.answer(Section::Workers, &title, &entry, |entry| {
        html! {
            p.crumbs {
                a href=(links::worker(&worker)) { "Worker " (text(&worker)) } " / "
                a href={ (links::worker(&worker)) "/state" } { "State" }
            }
            h1.long { (text(&entry.key)) }
            (details([
                ("Version", html! { (entry.version) }),
                ("Changed", full_time(entry.updated_at)),
            ]))
            (body("Value", &decoded(&entry.value), None))
        }
    })
}
