//! `oncely recover`: recovery after a restore of the database or of NATS.

use anyhow::Result;
use clap::Args;

use super::client::{Client, HostArgs};
use super::dlq::ActorArgs;
use super::term::{self, Table};
use crate::api::RecoverRequest;
use crate::model::units;
use crate::runtime::Recovery;

/// Bring the database and NATS back into agreement after a restore.
///
/// Messages that the database does not have are redelivered to their workers. Outputs that are on
/// their streams already are not published again.
#[derive(Debug, Args)]
pub struct Recover {
    /// Show the recovery without executing it.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    actor: ActorArgs,
    #[command(flatten)]
    host: HostArgs,
}

impl Recover {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let request = RecoverRequest {
            dry_run: self.dry_run,
            by: self.actor.with_note(Some("recovery".to_owned())),
        };
        let recovery: Recovery = client.post("/recover", &request).await?;
        if self.json {
            return term::json(&recovery);
        }
        show(&recovery)
    }
}

fn show(recovery: &Recovery) -> Result<()> {
    if recovery.reasons.is_empty() {
        return term::data("the database and NATS agree: nothing to recover");
    }
    term::data("the database and NATS disagree:")?;
    recovery
        .reasons
        .iter()
        .try_for_each(|reason| term::data(format!("  {reason}")))?;
    let agreed = recovery
        .agreed_at
        .map_or("none recorded".to_owned(), units::format_time);
    term::data(format!("last agreement: {agreed}\n"))?;
    let mut table = Table::new(&[
        "worker",
        "stream",
        "acknowledged",
        "redeliver from",
        "redeliver to",
    ]);
    for rewind in &recovery.consumers {
        table.row([
            rewind.worker.clone(),
            rewind.stream.clone(),
            rewind.acknowledged.to_string(),
            rewind.from.map_or("-".to_owned(), |from| from.to_string()),
            rewind.last.to_string(),
        ]);
    }
    term::data(table.to_string().trim_end())?;
    let mut table = Table::new(&["stream", "outputs already published"]);
    recovery
        .streams
        .iter()
        .for_each(|stream| table.row([stream.stream.clone(), stream.outputs.to_string()]));
    term::data(format!("\n{table}").trim_end())?;
    term::data(format!(
        "\ndead letters redriven again: {}",
        recovery.dead_letters
    ))?;
    for (name, note) in notes(recovery) {
        term::warning(format!("{name}: {note}"));
    }
    match recovery.done {
        true => term::data("done: workers and relay resumed"),
        false => term::data("nothing was changed; run without --dry-run to execute this"),
    }
}

/// The warnings of the recovery, each with its stream.
fn notes(recovery: &Recovery) -> impl Iterator<Item = (&String, &String)> {
    let consumers = recovery
        .consumers
        .iter()
        .map(|rewind| (&rewind.stream, &rewind.note));
    let streams = recovery
        .streams
        .iter()
        .map(|stream| (&stream.stream, &stream.note));
    consumers
        .chain(streams)
        .filter_map(|(name, note)| Some((name, note.as_ref()?)))
}
