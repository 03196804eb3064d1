//! `oncely dlq export`: complete dead letters, for an archive, another tool or a replay.

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

/// Export complete dead letters as JSON, one per line.
///
/// Each line has the output of `show --json` and the data with which `oncely replay` runs the last
/// attempt again.
#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    selection: Selection,
    /// Include closed dead letters: those that took effect later, were resolved or were dropped.
    #[arg(long)]
    closed: bool,
    /// Leave out the components of the workers, which may be large.
    #[arg(long)]
    no_component: bool,
    /// Write to this file. Default: standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Accept --json for scripts; the output is always JSON.
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
    /// None when there is no recording of an attempt.
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
        let file = create_private(path).with_context(|| format!("create {}", path.display()))?;
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

/// Creates the file, readable for this user only: it contains data of messages and rows.
fn create_private(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Writes the lines of one file. The first line that needs a component contains it.
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
