//! `oncely dlq show`: shows one dead letter.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};

use crate::api::dead_letters::DeadLetter;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term;
use crate::model::json_text;
use crate::model::units;
use crate::model::visible::{visible, visible_text};

/// Show one dead letter: its failure history, headers, body and outputs.
#[derive(Debug, Args)]
pub struct Show {
    /// Show the dead letter with this id.
    id: i64,
    /// Show the body in this format. Default: the one that fits its content.
    #[arg(long = "format", value_name = "FORMAT", conflicts_with_all = ["raw", "json"])]
    format: Option<Format>,
    /// Print only the body, byte for byte: the corrected one, if there is one.
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    /// Print JSON, with bodies in Base64.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
    Hex,
}

impl Show {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let dead_letter: DeadLetter = client.get(&format!("/dead-letters/{}", self.id)).await?;
        if self.json {
            return term::json(&dead_letter);
        }
        if self.raw {
            return term::raw(&decoded(
                dead_letter
                    .edits
                    .last()
                    .map_or(&dead_letter.body, |edit| &edit.body),
            ));
        }
        term::data(details(&dead_letter))?;
        show_history(&dead_letter)?;
        term::data("\nheaders")?;
        for (name, value) in &dead_letter.headers {
            term::data(format!("  {}: {}", visible(name), visible(value)))?;
        }
        show_body("body", &decoded(&dead_letter.body), self.format)?;
        for edit in &dead_letter.edits {
            let by = format!(
                "{} by {}: {}",
                units::format_time(edit.at),
                edit.actor,
                edit.note
            );
            show_body(
                &format!("corrected {}", visible(&by)),
                &decoded(&edit.body),
                self.format,
            )?;
        }
        Ok(())
    }
}

fn decoded(body: &str) -> Vec<u8> {
    STANDARD.decode(body).unwrap_or_default()
}

/// The summary of a dead letter.
fn details(dead_letter: &DeadLetter) -> String {
    let summary = &dead_letter.summary;
    let place = match (&summary.stream, summary.stream_sequence) {
        (Some(stream), Some(sequence)) => format!("{stream} {sequence}"),
        _ => "not from a stream".to_owned(),
    };
    let state = match summary.last_action_at {
        Some(at) => format!(
            "{} since {}",
            summary.state.as_str(),
            units::format_time(at)
        ),
        None => summary.state.as_str().to_owned(),
    };
    let mut details = vec![
        ("dead letter", summary.id.to_string()),
        ("state", state),
        (
            "worker",
            format!("{} version {}", summary.worker, summary.version),
        ),
        ("reason", summary.reason.clone()),
        ("code", summary.code.clone().unwrap_or_default()),
        ("detail", summary.detail.clone()),
        ("group", summary.group.clone().unwrap_or_default()),
        ("event id", summary.event_id.clone()),
        ("subject", summary.subject.clone()),
        ("from", place),
        ("trace id", dead_letter.trace_id.clone().unwrap_or_default()),
        ("died at", units::format_time(summary.died_at)),
        ("attempts", summary.attempts.to_string()),
    ];
    if let Some(first) = dead_letter.first_died_at {
        details.push(("first died at", units::format_time(first)));
    }
    if let Some(inbox) = &dead_letter.inbox {
        details.push((
            "inbox",
            format!("{} since {}", inbox.state, units::format_time(inbox.at)),
        ));
    }
    for output in &dead_letter.outputs {
        let place = match (&output.stream, output.stream_sequence) {
            (Some(stream), Some(sequence)) => format!("{stream} {sequence}"),
            _ => "not published yet".to_owned(),
        };
        details.push((
            "output",
            format!("{} to {}: {place}", output.id, output.subject),
        ));
    }
    term::details(details)
}

/// Prints the failed attempts and the actions of operators, in order.
fn show_history(dead_letter: &DeadLetter) -> Result<()> {
    let attempts = dead_letter.failure_history.iter().map(|attempt| {
        let head = format!(
            "attempt {} at {}, version {}: {}",
            attempt.attempt,
            units::format_time(attempt.at),
            attempt.version,
            visible(&attempt.error)
        );
        let logs = attempt
            .logs
            .lines()
            .map(|line| format!("\n  | {}", visible(line)));
        (
            attempt.at,
            std::iter::once(head).chain(logs).collect::<String>(),
        )
    });
    let audit = dead_letter.audit.iter().map(|entry| {
        let note = entry
            .note
            .as_ref()
            .map(|note| format!(": {note}"))
            .unwrap_or_default();
        let stated_name = entry
            .stated_name
            .as_ref()
            .map(|name| format!(" ({name})"))
            .unwrap_or_default();
        let line = format!(
            "{} at {} by {}{stated_name}{note}",
            entry.action,
            units::format_time(entry.at),
            entry.actor
        );
        (entry.at, visible(&line))
    });
    let mut history: Vec<_> = attempts.chain(audit).collect();
    history.sort_by_key(|(at, _)| *at);
    history
        .into_iter()
        .try_for_each(|(_, text)| term::data(format!("\n{text}")))
}

fn show_body(title: &str, body: &[u8], format: Option<Format>) -> Result<()> {
    term::data(format!("\n{title} ({} bytes)", body.len()))?;
    term::data(match format {
        Some(Format::Text) => visible_text(&String::from_utf8_lossy(body)),
        Some(Format::Hex) => body
            .chunks(16)
            .map(hex::encode_upper)
            .collect::<Vec<_>>()
            .join("\n"),
        Some(Format::Json) => {
            let text = json_text::indented(body).context("the body is not JSON")?;
            visible_text(&text)
        }
        None => term::readable(body),
    })
}
