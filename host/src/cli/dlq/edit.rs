//! `oncely dlq edit`: stores a corrected body beside the original.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;

use super::select::{ActorArgs, check_none_refused};
use crate::api::dead_letters::EditRequest;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term;
use crate::store::DeadLetterActionResult;

/// Store a corrected body for a dead letter, which a redrive sends to the worker.
#[derive(Debug, Args)]
pub struct Edit {
    /// Correct the dead letter with this id.
    id: i64,
    /// Read the corrected body from this file; `-` reads it from standard input.
    #[arg(long, value_name = "FILE")]
    body: PathBuf,
    /// Record this note as the reason.
    #[arg(long)]
    note: String,
    #[command(flatten)]
    actor: ActorArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Edit {
    pub async fn run(self) -> Result<()> {
        let body = if self.body.as_os_str() == "-" {
            let mut body = Vec::new();
            std::io::stdin()
                .read_to_end(&mut body)
                .context("read the body from standard input")?;
            body
        } else {
            std::fs::read(&self.body).with_context(|| format!("read {}", self.body.display()))?
        };
        let client = Client::find(&self.host)?;
        let request = EditRequest {
            body: STANDARD.encode(&body),
            by: self.actor.with_note(Some(self.note)),
            seen: None,
        };
        let results: Vec<DeadLetterActionResult> = client
            .post(&format!("/dead-letters/{}/edit", self.id), &request)
            .await?;
        if self.json {
            term::json(&results)?;
        }
        check_none_refused(&results, "corrected")?;
        if !self.json {
            term::data(format!(
                "dead letter {} has a corrected body of {} bytes",
                self.id,
                body.len()
            ))?;
            term::note(format!("redrive it with: oncely dlq redrive {}", self.id));
        }
        Ok(())
    }
}
