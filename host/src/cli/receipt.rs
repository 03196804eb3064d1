//! `oncely receipt`: the proof of an event's outcome, and its verification without a host.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::client::{Client, HostArgs};
use super::exit::Exit;
use super::term;
use crate::api::ReceiptRequest;
use crate::model::hint::WithHint as _;
use crate::model::receipt::{Verified, verify};
use crate::model::units;
use crate::receipts::Issued;

/// Write the receipt of an event: a file that proves its outcome without the host.
///
/// The receipt leads to a checkpoint, whose hash is published on the stream ONCELY_CHECKPOINTS. It
/// requires the setting `receipts`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Receipt {
    #[command(subcommand)]
    command: Option<Command>,
    /// Write the receipt of the event with this id.
    #[arg(required = true)]
    event: Option<String>,
    /// Use the outcome at this worker. Default: the only one that has the event.
    #[arg(long, value_name = "WORKER")]
    worker: Option<String>,
    /// Write to this file. Default: standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    host: HostArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    Verify(Verify),
}

/// Verify a receipt without a host.
///
/// Without --checkpoint, it shows the hash to compare with a published copy, and ends with the exit
/// code 9: a receipt alone proves nothing.
#[derive(Debug, Args)]
struct Verify {
    /// Verify this file, or standard input with -.
    file: PathBuf,
    /// Require that the receipt ends with the checkpoint of this hash, as it was published.
    #[arg(long, value_name = "HASH")]
    checkpoint: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Receipt {
    pub async fn run(self) -> Result<()> {
        if let Some(Command::Verify(verify)) = self.command {
            return verify.run();
        }
        let event = self.event.unwrap_or_default();
        let request = ReceiptRequest {
            event: event.clone(),
            worker: self.worker,
        };
        let client = Client::find(&self.host)?;
        let issued: Issued = client.get_with("/receipts", &request).await?;
        let Some(receipt) = &issued.receipt else {
            return Err(pending(&issued, &event));
        };
        let mut text = serde_json::to_string_pretty(receipt).context("write the receipt")?;
        text.push('\n');
        match &self.out {
            Some(file) => std::fs::write(file, text)
                .with_context(|| format!("write the receipt to {}", file.display()))?,
            None => term::data(text)?,
        }
        if let Some(last) = receipt.checkpoints.last() {
            term::note(format!(
                "the receipt ends with checkpoint {}, hash {}",
                last.number, last.hash
            ));
        }
        Ok(())
    }
}

/// The event is in no checkpoint yet.
fn pending(issued: &Issued, event: &str) -> anyhow::Error {
    let settled_at = units::format_time(issued.settled_at);
    let due_at = issued.due_at.map(|at| at.max(Timestamp::now()));
    let due_at = due_at.map(units::format_time).unwrap_or_default();
    let message = format!(
        "{event} was settled at {settled_at} and is in no checkpoint yet; the next one is due at \
         {due_at}"
    );
    let worker = &issued.worker;
    let error = anyhow!(Exit::Unconfirmed.with_message(message));
    error.hint(format!("oncely receipt --worker {worker} {event}"))
}

impl Verify {
    fn run(self) -> Result<()> {
        let text = match self.file.to_str() {
            Some("-") => {
                let mut text = Vec::new();
                std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut text)
                    .context("read the receipt")?;
                text
            }
            _ => std::fs::read(&self.file)
                .with_context(|| format!("read the receipt {}", self.file.display()))?,
        };
        let verified = verify(&text, self.checkpoint.as_deref()).map_err(|error| {
            Exit::Findings.with_message(format!("the receipt is not valid: {error:#}"))
        })?;
        if self.json {
            term::json(&as_json(&verified))?;
        } else {
            show(&verified)?;
        }
        if verified.is_anchored {
            return Ok(());
        }
        let Verified { last, .. } = &verified;
        let message = format!(
            "the receipt is consistent, but it proves nothing until the hash of checkpoint {} is \
             compared with its published copy",
            last.number
        );
        Err(anyhow!(Exit::Unconfirmed.with_message(message))).hint(format!(
            "oncely receipt verify {} --checkpoint HASH, with the hash from the stream \
             ONCELY_CHECKPOINTS or from a copy of it",
            self.file.display()
        ))
    }
}

fn show(verified: &Verified) -> Result<()> {
    let Verified {
        event,
        checkpoint,
        last,
        outputs,
        is_anchored,
    } = verified;
    let message = match (&event.stream, event.sequence) {
        (Some(stream), Some(sequence)) => format!("{stream} {sequence}"),
        _ => "from no stream".to_owned(),
    };
    term::data(term::details([
        ("event", event.event.clone()),
        ("worker", event.worker.clone()),
        ("outcome", event.outcome.clone()),
        ("settled at", event.at.to_string()),
        ("message", message),
        ("payload", event.payload.clone()),
        ("installation", checkpoint.installation.clone()),
        (
            "checkpoint",
            format!("{}, closed at {}", checkpoint.number, checkpoint.closed_at),
        ),
        ("ends with", format!("{}, hash {}", last.number, last.hash)),
        (
            "compared",
            match is_anchored {
                true => "yes, with the given hash".to_owned(),
                false => "no".to_owned(),
            },
        ),
    ]))?;
    let Some(listed) = &event.outputs else {
        return term::data("\nthe outputs are not part of the receipt");
    };
    if listed.is_empty() {
        return Ok(());
    }
    let mut table = term::Table::new(&["output", "subject", "sha256", "stream", "sequence"]);
    for one in listed {
        let place = outputs.iter().find(|output| output.number == one.number);
        table.row([
            one.number.to_string(),
            one.subject.clone(),
            one.sha256.clone(),
            place.map(|place| place.stream.clone()).unwrap_or_default(),
            place
                .map(|place| place.sequence.to_string())
                .unwrap_or_default(),
        ]);
    }
    term::data(format!("\n{}", table.to_string().trim_end()))
}

fn as_json(verified: &Verified) -> serde_json::Value {
    serde_json::json!({
        "event": verified.event,
        "outputs": verified.outputs,
        "checkpoint": verified.checkpoint,
        "last": verified.last,
        "compared": verified.is_anchored,
    })
}
