//! `oncely publish`: put one message on a stream.

use std::io::Read;

use anyhow::{Context, Result, anyhow};
use base64::Engine as _;
use clap::Args;

use super::client::{Client, HostArgs};
use super::term;
use crate::api;
use crate::hint::WithHint;

/// Publishes one message and waits until its stream has stored it.
#[derive(Debug, Args)]
pub struct Publish {
    /// The subject.
    subject: String,
    /// The body; `-` reads it from standard input.
    #[arg(default_value = "-")]
    body: String,
    /// A header, as `Name: value`; may be given several times.
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The event id: publishing again with the same id has no second effect. Default: a new one.
    #[arg(long)]
    id: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Publish {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let body = if self.body == "-" { read_body()? } else { self.body.clone().into_bytes() };
        let id = self.id.clone().unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
        let message = api::Publish {
            subject: self.subject.clone(),
            headers: self.headers.iter().map(|header| parse_header(header)).collect::<Result<_>>()?,
            id: id.clone(),
            body: base64::engine::general_purpose::STANDARD.encode(body),
        };
        let place: api::PublishedAt = client.post("/publish", &message).await?;
        if self.json {
            return term::json(&place);
        }
        let again = if place.duplicate { " (it was there already)" } else { "" };
        term::data(format!("{} {} id {id}{again}", place.stream, place.sequence))?;
        Ok(())
    }
}

fn read_body() -> Result<Vec<u8>> {
    let mut body = Vec::new();
    std::io::stdin().read_to_end(&mut body).context("read the body from standard input")?;
    Ok(body)
}

fn parse_header(text: &str) -> Result<(String, String)> {
    let (name, value) = text
        .split_once(':')
        .ok_or_else(|| anyhow!("`{text}` is not a header"))
        .hint("write it as --header 'Name: value'")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}
