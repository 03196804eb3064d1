//! Pauses of workers: the page before a pause, and both actions.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use maud::html;

use super::fields::Fields;
use super::links;
use super::page::Section;
use super::parts::{command, text};
use super::problem::Problem;
use super::visitor::{Answer, Visitor};
use super::{Console, host};
use crate::api::operate::{self, PauseRequest};

pub async fn confirm(Path(worker): Path<String>, visitor: Visitor) -> Answer {
    let name = &worker;
    let title = format!("Pause {name}?");
    let body = html! {
        p.crumbs { a href=(links::worker(name)) { "Worker " (text(name)) } }
        h1 { (text(&title)) }
        p {
            "All hosts stop to take messages for it within seconds. What runs is finished. "
            "Messages wait on their stream, and requests get status 503."
        }
        form.panel.stack action={ (links::worker(name)) "/pause" } method="post" {
            (visitor.form_token())
            div {
                label for="note" { "Reason" }
                input #note name="note" required maxlength="1000" autocomplete="off";
            }
            div.submit {
                button type="submit" { "Pause" }
                a href=(links::worker(name)) { "Cancel" }
            }
        }
        p.caption { "The same in a terminal" }
        (command(&format!("oncely pause {name}")))
    };
    Ok(visitor.page(Section::Workers, &title, body))
}

pub async fn pause(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
    fields: Fields,
) -> Answer {
    let request = PauseRequest {
        note: fields.text("note"),
    };
    let (caller, name) = (visitor.caller.clone(), Path(worker.clone()));
    let result = match operate::pause(host(&console), caller, name, Json(request)).await {
        Ok(_) => Ok(format!("{worker} is paused on all hosts within seconds")),
        Err(error) => Err(Problem::from(error).line()),
    };
    visitor.go(&console, &links::worker(&worker), result)
}

pub async fn resume(
    State(console): State<Arc<Console>>,
    Path(worker): Path<String>,
    visitor: Visitor,
) -> Answer {
    let (caller, name) = (visitor.caller.clone(), Path(worker.clone()));
    let result = match operate::resume(host(&console), caller, name).await {
        Ok(Json(resumed)) if resumed.was_paused => {
            Ok(format!("{worker} continues on all hosts within seconds"))
        }
        Ok(_) => Err(format!("{worker} was not paused")),
        Err(error) => Err(Problem::from(error).line()),
    };
    visitor.go(&console, &links::worker(&worker), result)
}
