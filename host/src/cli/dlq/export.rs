//! `oncely dlq export`: whole letters, for an archive, another tool or a replay.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::select::Selection;
use crate::api::dead_letters::DeadLetter;
use crate::cli::client::{Client, HostArgs};
use crate::cli::replay::{ComponentBytes, ExportedAttempt};
use crate::cli::term;
use crate::dlq::replay::Replayable;

/// Writes dead letters as JSON, whole, one on each line: what `show --json` prints, and what `oncely replay` needs to run the
/// last attempt again.
#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    selection: Selection,
    /// Also those that took effect after all, were resolved or dropped.
    #[arg(long)]
    closed: bool,
    /// Leave the components of the workers out, which may be large.
    #[arg(long)]
    no_component: bool,
    /// The file to write. Default: standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Accepted for the sake of scripts: it is always JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// One line of the file.
#[derive(Debug, Serialize)]
struct ExportLine {
    #[serde(flatten)]
    dead_letter: DeadLetter,
    /// None when there is no record of an attempt.
    replay: Option<ExportedAttempt>,
}

impl Export {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let dead_letters = self.selection.find(&client, self.closed).await?;
        let mut writer = ExportWriter {
            client,
            with_components: !self.no_component,
            written_components: HashSet::new(),
        };
        let Some(path) = &self.out else {
            for summary in &dead_letters {
                term::raw(&writer.line(summary.id).await?)?;
            }
            return Ok(());
        };
        let mut progress = term::Progress::bar("export dead letters", dead_letters.len() as u64);
        let file = create_private(path).with_context(|| format!("make {}", path.display()))?;
        let mut file = std::io::BufWriter::new(file);
        for summary in &dead_letters {
            file.write_all(&writer.line(summary.id).await?)
                .with_context(|| format!("write {}", path.display()))?;
            progress.step();
        }
        file.flush()
            .with_context(|| format!("write {}", path.display()))?;
        progress.finish(&format!(
            "{} written to {}",
            dead_letters.len(),
            path.display()
        ));
        Ok(())
    }
}

/// Makes the file, for this user's eyes only: it holds what messages and rows hold.
fn create_private(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Writes the lines of one file. A component stands in the first line that needs it.
struct ExportWriter {
    client: Client,
    with_components: bool,
    written_components: HashSet<String>,
}

impl ExportWriter {
    async fn line(&mut self, id: i64) -> Result<Vec<u8>> {
        let dead_letter: DeadLetter = self.client.get(&format!("/dead-letters/{id}")).await?;
        let attempt: Option<Replayable> = self
            .client
            .get(&format!("/dead-letters/{id}/replay"))
            .await?;
        let replay = match attempt {
            Some(attempt) => Some(ExportedAttempt {
                component: self.component(&attempt.digest).await?,
                attempt,
            }),
            None => None,
        };
        let mut line = serde_json::to_vec(&ExportLine {
            dead_letter,
            replay,
        })
        .context("write JSON")?;
        line.push(b'\n');
        Ok(line)
    }

    async fn component(&mut self, digest: &str) -> Result<Option<ComponentBytes>> {
        if !self.with_components || !self.written_components.insert(digest.to_owned()) {
            return Ok(None);
        }
        Ok(Some(ComponentBytes(
            self.client
                .download(&format!("/components/{digest}"))
                .await?,
        )))
    }
}
