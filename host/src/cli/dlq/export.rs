//! `oncely dlq export`: whole letters, for an archive or another tool.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::select::Selection;
use crate::api::letters::Letter;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term;

/// Writes dead letters as JSON, whole, one on each line: what `show --json` prints.
#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    selection: Selection,
    /// Also those that took effect after all, were resolved or dropped.
    #[arg(long)]
    closed: bool,
    /// The file to write. Default: standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Accepted for the sake of scripts: it is always JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Export {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let letters = self.selection.find(&client, self.closed).await?;
        let Some(path) = &self.out else {
            for summary in &letters {
                term::raw(&line(&client, summary.id).await?)?;
            }
            return Ok(());
        };
        let mut progress = term::Progress::bar("export dead letters", letters.len() as u64);
        let file = std::fs::File::create(path).with_context(|| format!("make {}", path.display()))?;
        let mut file = std::io::BufWriter::new(file);
        for summary in &letters {
            file.write_all(&line(&client, summary.id).await?).with_context(|| format!("write {}", path.display()))?;
            progress.step();
        }
        file.flush().with_context(|| format!("write {}", path.display()))?;
        progress.finish(&format!("{} written to {}", letters.len(), path.display()));
        Ok(())
    }
}

async fn line(client: &Client, id: i64) -> Result<Vec<u8>> {
    let letter: Letter = client.get(&format!("/letters/{id}")).await?;
    let mut line = serde_json::to_vec(&letter).context("write JSON")?;
    line.push(b'\n');
    Ok(line)
}
