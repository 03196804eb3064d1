//! `oncely state`: the keyed state of a worker.

use anyhow::{Context, Result};
use base64::Engine as _;
use clap::{Args, Subcommand};

use super::client::{Client, HostArgs};
use super::term::{self, Table};
use crate::api::{StateFilter, StateKey, StateValue};
use crate::model::units;

/// Show the keyed state of a worker.
#[derive(Debug, Args)]
pub struct State {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Get(Get),
    List(List),
}

/// Show the value of one key.
#[derive(Debug, Args)]
struct Get {
    /// Read the state of this worker.
    worker: String,
    /// Show the value of this key.
    key: String,
    /// Print JSON, with the value in Base64.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

/// List keys, with the beginnings of their values.
#[derive(Debug, Args)]
struct List {
    /// List the state of this worker.
    worker: String,
    /// List only keys with this prefix.
    #[arg(long, default_value = "")]
    prefix: String,
    /// List at most this many keys.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Print JSON, with the beginning of each value in Base64.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl State {
    pub async fn run(self) -> Result<()> {
        match self.command {
            Command::Get(get) => get.run().await,
            Command::List(list) => list.run().await,
        }
    }
}

impl Get {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let path = format!("/workers/{}/state/entry", self.worker);
        let entry: StateValue = client.get_with(&path, &StateKey { key: self.key }).await?;
        if self.json {
            return term::json(&entry);
        }
        term::data(term::details([
            ("key", entry.key.clone()),
            ("version", entry.version.to_string()),
            ("changed at", units::format_time(entry.updated_at)),
        ]))?;
        term::data(format!("\nvalue ({} bytes)", entry.size))?;
        term::data(term::readable(&bytes(&entry)?))
    }
}

impl List {
    async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let path = format!("/workers/{}/state", self.worker);
        let filter = StateFilter {
            prefix: self.prefix,
            limit: self.limit,
        };
        let entries: Vec<StateValue> = client.get_with(&path, &filter).await?;
        if self.json {
            return term::json(&entries);
        }
        if entries.is_empty() {
            term::note("no such state");
            return Ok(());
        }
        let mut table = Table::new(&["key", "version", "bytes", "changed at", "value"]);
        for entry in &entries {
            table.row([
                entry.key.clone(),
                entry.version.to_string(),
                entry.size.to_string(),
                units::format_time(entry.updated_at),
                beginning(&bytes(entry)?, entry.size),
            ]);
        }
        term::data(table.to_string().trim_end())
    }
}

fn bytes(entry: &StateValue) -> Result<Vec<u8>> {
    base64::engine::general_purpose::STANDARD
        .decode(&entry.value)
        .context("decode the host's response")
}

/// The beginning of a value on one line: text unchanged, anything else as hex.
fn beginning(value: &[u8], size: u64) -> String {
    const SHOWN_MAX: usize = 48;
    // A cut value may end within a character.
    let valid = match std::str::from_utf8(value) {
        Ok(text) => Some(text),
        Err(error) if error.error_len().is_none() && size > value.len() as u64 => value
            .get(..error.valid_up_to())
            .and_then(|valid| std::str::from_utf8(valid).ok()),
        Err(_) => None,
    };
    let text = match valid {
        Some(text) => text.chars().take(SHOWN_MAX).collect::<String>(),
        None => hex::encode_upper(value.get(..SHOWN_MAX / 2).unwrap_or(value)),
    };
    let is_all = valid.map_or(value.len() <= SHOWN_MAX / 2, |valid| {
        valid.chars().count() <= SHOWN_MAX
    });
    if is_all && value.len() as u64 == size {
        text
    } else {
        format!("{text}…")
    }
}

#[cfg(test)]
mod tests {
    use super::beginning;

    #[test]
    fn beginning_is_one_line_and_marks_truncation() {
        assert_eq!(beginning(b"42", 2), "42");
        assert_eq!(beginning("é".as_bytes().split_last().unwrap().1, 900), "…");
        assert_eq!(beginning(b"ab\xc3", 900), "ab…");
        assert_eq!(beginning(b"\xff\x00", 2), "FF00");
        assert_eq!(beginning(&[b'x'; 60], 60), format!("{}…", "x".repeat(48)));
    }
}
