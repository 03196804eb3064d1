//! `oncely dlq show`.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};

use crate::api::letters::Letter;
use crate::cli::client::{Client, HostArgs};
use crate::cli::{json_text, term};
use crate::model::units;

/// Shows one dead letter: its story, headers and body, and what became of it.
#[derive(Debug, Args)]
pub struct Show {
    id: i64,
    /// How to show the body. Default: what fits.
    #[arg(long = "as", value_name = "FORM", conflicts_with_all = ["raw", "json"])]
    form: Option<Form>,
    /// Print the body alone, byte for byte: the corrected one, if there is one.
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    /// Print JSON, bodies in Base64.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Text,
    Json,
    Hex,
}

impl Show {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let letter: Letter = client.get(&format!("/letters/{}", self.id)).await?;
        if self.json {
            return term::json(&letter);
        }
        if self.raw {
            return term::raw(&decoded(letter.edits.last().map_or(&letter.body, |edit| &edit.body)));
        }
        term::data(facts(&letter))?;
        show_story(&letter)?;
        term::data("\nheaders")?;
        for (name, value) in &letter.headers {
            term::data(format!("  {}: {}", term::visible(name), term::visible(value)))?;
        }
        show_body("body", &decoded(&letter.body), self.form)?;
        for edit in &letter.edits {
            let by = format!("{} by {}: {}", units::show_time(edit.at), edit.actor, edit.note);
            show_body(&format!("corrected {}", term::visible(&by)), &decoded(&edit.body), self.form)?;
        }
        Ok(())
    }
}

fn decoded(body: &str) -> Vec<u8> {
    STANDARD.decode(body).unwrap_or_default()
}

/// What there is to know in short.
fn facts(letter: &Letter) -> String {
    let summary = &letter.summary;
    let place = match (&summary.stream, summary.stream_sequence) {
        (Some(stream), Some(sequence)) => format!("{stream} {sequence}"),
        _ => "not from a stream".to_owned(),
    };
    let state = match summary.moved_at {
        Some(at) => format!("{} since {}", summary.state.as_str(), units::show_time(at)),
        None => summary.state.as_str().to_owned(),
    };
    let mut facts = vec![
        ("dead letter", summary.id.to_string()),
        ("state", state),
        ("worker", format!("{} version {}", summary.worker, summary.version)),
        ("reason", summary.reason.clone()),
        ("code", summary.code.clone().unwrap_or_default()),
        ("detail", summary.detail.clone()),
        ("group", summary.group.clone().unwrap_or_default()),
        ("event id", summary.event_id.clone()),
        ("subject", summary.subject.clone()),
        ("from", place),
        ("trace id", letter.trace_id.clone().unwrap_or_default()),
        ("died at", units::show_time(summary.died_at)),
        ("attempts", summary.attempts.to_string()),
    ];
    if let Some(first) = letter.first_died_at {
        facts.push(("first died at", units::show_time(first)));
    }
    if let Some(settled) = &letter.settled {
        facts.push(("inbox", format!("{} since {}", settled.state, units::show_time(settled.at))));
    }
    for output in &letter.outputs {
        let place = match (&output.stream, output.stream_sequence) {
            (Some(stream), Some(sequence)) => format!("{stream} {sequence}"),
            _ => "not published yet".to_owned(),
        };
        facts.push(("output", format!("{} to {}: {place}", output.id, output.subject)));
    }
    term::details(facts)
}

/// Attempts, and what people did in between.
fn show_story(letter: &Letter) -> Result<()> {
    let attempts = letter.story.iter().map(|attempt| {
        let head = format!(
            "attempt {} at {}, version {}: {}",
            attempt.attempt,
            units::show_time(attempt.at),
            attempt.version,
            term::visible(&attempt.error)
        );
        let logs = attempt.logs.lines().map(|line| format!("\n  | {}", term::visible(line)));
        (attempt.at, std::iter::once(head).chain(logs).collect::<String>())
    });
    let acts = letter.audit.iter().map(|act| {
        let note = act.note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
        let line = format!("{} at {} by {}{note}", act.action, units::show_time(act.at), act.actor);
        (act.at, term::visible(&line))
    });
    let mut story: Vec<_> = attempts.chain(acts).collect();
    story.sort_by_key(|(at, _)| *at);
    story.into_iter().try_for_each(|(_, text)| term::data(format!("\n{text}")))
}

fn show_body(title: &str, body: &[u8], form: Option<Form>) -> Result<()> {
    term::data(format!("\n{title} ({} bytes)", body.len()))?;
    term::data(match form {
        Some(Form::Text) => term::visible_text(&String::from_utf8_lossy(body)),
        Some(Form::Hex) => body.chunks(16).map(hex::encode_upper).collect::<Vec<_>>().join("\n"),
        Some(Form::Json) => {
            let text = json_text::indented(body).context("read the body as JSON: it is none")?;
            term::visible_text(&text)
        }
        None => term::readable(body),
    })
}
