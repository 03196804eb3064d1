//! Plans for dead letters: redrive, close, correct.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use similar::TextDiff;

use super::{ITEMS_MAX, planned};
use crate::api::dead_letters::{CloseAction, DeadLetter, DeadLettersRequest, PlannedRedrive};
use crate::cli::client::Client;
use crate::cli::mcp::Session;
use crate::cli::mcp::answer::Answer;
use crate::cli::mcp::plans::Change;
use crate::cli::mcp::selection::{Filters, distinct, reason};
use crate::cli::mcp::untrusted::{body, show_bodies};
use crate::dlq::dry_run::{Prediction, Preview};
use crate::store::{DeadLetterState, DeadLetterSummary, SeenDeadLetter};

/// How many dead letters one request for a dry run covers.
const DRY_RUN_CHUNK: usize = 20;

/// How many dry runs are shown in full.
const DRY_RUNS_SHOWN: usize = 10;

/// The largest corrected body, in bytes.
const EDITED_MAX: usize = 256 << 10;

/// How long the comparison of two bodies may take.
const DIFF_TIME: Duration = Duration::from_secs(1);

/// Dead letters by their numbers, or by filters.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeadLetters {
    /// The numbers of dead letters.
    #[serde(default)]
    ids: Vec<i64>,
    /// Filters instead of numbers: all open dead letters that match.
    filters: Option<Filters>,
    /// Why this is done. The activity log keeps it.
    reason: String,
}

impl DeadLetters {
    async fn find(&self, client: &Client) -> Result<Vec<i64>> {
        let Some(filters) = &self.filters else {
            return distinct(&self.ids, ITEMS_MAX);
        };
        ensure!(self.ids.is_empty(), "give either ids or filters");
        let is_all = *filters == Filters::default();
        ensure!(
            !is_all,
            "filters without a value would mean all dead letters"
        );
        let open = Filters {
            closed: false,
            ..filters.clone()
        };
        let filter = open.filter(ITEMS_MAX as u32 + 1)?;
        let found: Vec<DeadLetterSummary> = client.post("/dead-letters/find", &filter).await?;
        let found = found
            .iter()
            .filter(|one| one.state == DeadLetterState::Open);
        let ids: Vec<i64> = found.map(|one| one.id).collect();
        ensure!(!ids.is_empty(), "no open dead letter matches");
        ensure!(
            ids.len() <= ITEMS_MAX,
            "more than {ITEMS_MAX} dead letters match; narrow the filters, or use a job: \
             oncely dlq redrive --all"
        );
        distinct(&ids, ITEMS_MAX)
    }
}

/// The dead letters as they are now, in the order of `ids`.
pub async fn read_dead_letters(client: &Client, ids: &[i64]) -> Result<Vec<DeadLetter>> {
    let mut found = Vec::new();
    for id in ids {
        found.push(client.get(&format!("/dead-letters/{id}")).await?);
    }
    Ok(found)
}

/// A dead letter as it was read.
pub fn seen(dead_letter: &DeadLetter) -> SeenDeadLetter {
    SeenDeadLetter {
        id: dead_letter.summary.id,
        state: dead_letter.summary.state,
        generation: dead_letter.summary.generation,
        edits: u32::try_from(dead_letter.edits.len()).unwrap_or(u32::MAX),
    }
}

pub async fn redrive(session: Arc<Session>, arguments: DeadLetters) -> Result<Answer> {
    // Read first, then try: a change in between shows as another result of the dry run.
    let reason = reason(&arguments.reason)?;
    let client = session.client()?;
    let ids = arguments.find(&client).await?;
    let mut dead_letters = read_dead_letters(&client, &ids).await?;
    dead_letters.sort_by(|a, b| a.summary.stream_order().cmp(&b.summary.stream_order()));
    let mut previews: Vec<Preview> = Vec::new();
    for chunk in dead_letters.chunks(DRY_RUN_CHUNK) {
        let ids = chunk.iter().map(|one| one.summary.id).collect();
        let request = DeadLettersRequest { ids };
        let chunk: Vec<Preview> = client.post("/dead-letters/dry-run", &request).await?;
        previews.extend(chunk);
    }

    // The plan has those that would succeed.
    let mut predictions: BTreeMap<&str, usize> = BTreeMap::new();
    for preview in &previews {
        *predictions.entry(preview.prediction.label()).or_default() += 1;
    }
    let succeeding = previews.iter();
    let succeeding = succeeding.filter(|one| one.prediction == Prediction::WouldSucceed);
    let planned_redrives: Vec<PlannedRedrive> = succeeding
        .map(|preview| PlannedRedrive {
            id: preview.dead_letter,
            preconditions: preview.preconditions.clone(),
        })
        .collect();
    let is_planned = |id: i64| planned_redrives.iter().any(|one| one.id == id);
    let seen: Vec<SeenDeadLetter> = dead_letters
        .iter()
        .filter(|one| is_planned(one.summary.id))
        .map(seen)
        .collect();
    let count = planned_redrives.len();
    let answer = match count {
        0 => Answer::default().with("plan", Value::Null).with(
            "next",
            "none of them would succeed, so there is no plan; read why in the dry runs",
        ),
        _ => {
            let change = Change::Redrive {
                dead_letters: planned_redrives,
                seen,
            };
            let does = format!("redrive {count} of {} dead letters", previews.len());
            planned(&session, &client, does, reason, change)
        }
    };
    Ok(answer
        .with("predictions", predictions)
        .and_untrusted(json!({ "dry_runs": shown_previews(&previews) })))
}

/// The first dry runs in full, and of the others the prediction.
fn shown_previews(previews: &[Preview]) -> Vec<Value> {
    let shown = previews.iter().enumerate().map(|(position, preview)| {
        if position >= DRY_RUNS_SHOWN {
            return json!({
                "dead_letter": preview.dead_letter,
                "prediction": preview.prediction,
                "detail": preview.detail,
            });
        }
        let mut shown = json!(preview);
        show_bodies(&mut shown, &["outputs", "*", "body"], 0);
        show_bodies(&mut shown, &["state", "*", "before", "value"], 0);
        show_bodies(&mut shown, &["state", "*", "after", "value"], 0);
        shown
    });
    shown.collect()
}

/// How to close dead letters.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Closing {
    /// No action is needed any more.
    Resolve,
    /// They are never handled.
    Drop,
}

/// Dead letters to close.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Close {
    action: Closing,
    /// The numbers of dead letters.
    #[serde(default)]
    ids: Vec<i64>,
    /// Filters instead of numbers: all open dead letters that match.
    filters: Option<Filters>,
    /// Why this is done. The activity log keeps it.
    reason: String,
}

pub async fn close(session: Arc<Session>, arguments: Close) -> Result<Answer> {
    let Close {
        action,
        ids,
        filters,
        reason: why,
    } = arguments;
    let reason = reason(&why)?;
    let client = session.client()?;
    let selection = DeadLetters {
        ids,
        filters,
        reason: why,
    };
    let ids = selection.find(&client).await?;
    let dead_letters = read_dead_letters(&client, &ids).await?;
    let (action, verb) = match action {
        Closing::Resolve => (CloseAction::Resolve, "resolve"),
        Closing::Drop => (CloseAction::Drop, "drop"),
    };
    let does = format!("{verb} {} dead letters", ids.len());
    let change = Change::Close {
        action,
        seen: dead_letters.iter().map(seen).collect(),
    };
    let summaries: Vec<&DeadLetterSummary> = dead_letters.iter().map(|one| &one.summary).collect();
    Ok(planned(&session, &client, does, reason, change)
        .and_untrusted(json!({ "dead_letters": summaries })))
}

/// A corrected body.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Edit {
    /// The number of the dead letter.
    id: i64,
    /// The whole corrected body as text.
    body: Option<String>,
    /// The whole corrected body in Base64, instead of text.
    body_base64: Option<String>,
    /// The fault of the body. The activity log keeps it.
    reason: String,
}

pub async fn edit(session: Arc<Session>, arguments: Edit) -> Result<Answer> {
    let reason = reason(&arguments.reason)?;
    let new = match (arguments.body, arguments.body_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(text)) => STANDARD.decode(text).context("read body_base64")?,
        _ => return Err(anyhow!("give either body or body_base64")),
    };
    ensure!(
        new.len() <= EDITED_MAX,
        "the body is too large here; use: oncely dlq edit ID --body FILE --note REASON"
    );
    let client = session.client()?;
    let id = arguments.id;
    let dead_letter: DeadLetter = client.get(&format!("/dead-letters/{id}")).await?;
    let last = dead_letter.edits.last();
    let current = last.map_or(&dead_letter.body, |edit| &edit.body);
    let current = STANDARD.decode(current).context("read the body")?;
    ensure!(new != current, "the body is unchanged");
    let does = format!("store a corrected body for dead letter {id}");
    let difference = difference(&current, &new);
    let change = Change::Edit {
        seen: seen(&dead_letter),
        body: new,
    };
    Ok(planned(&session, &client, does, reason, change).and_untrusted(difference))
}

/// Two bodies: a difference by line for texts, else both.
fn difference(current: &[u8], new: &[u8]) -> Value {
    let texts = std::str::from_utf8(current).ok();
    let texts = texts.zip(std::str::from_utf8(new).ok());
    let Some((current_text, new_text)) = texts else {
        return json!({ "before": body(current, 0), "after": body(new, 0) });
    };
    let diff = TextDiff::configure()
        .timeout(DIFF_TIME)
        .diff_lines(current_text, new_text);
    let unified = diff.unified_diff().context_radius(3).to_string();
    json!({ "difference": unified, "bytes_before": current.len(), "bytes_after": new.len() })
}
