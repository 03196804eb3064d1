//! `oncely publish`: publishes one message to a stream.

use std::io::Read;

use anyhow::{Context, Result, anyhow};
use base64::Engine as _;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::client::{Client, HostArgs, HostFile};
use super::term;
use crate::api;
use crate::model::hint::WithHint;

/// Publish one message, and wait until its stream has stored it.
#[derive(Debug, Args)]
pub struct Publish {
    /// Publish to this subject.
    subject: String,
    /// Publish this body; `-` reads it from standard input.
    #[arg(default_value = "-")]
    body: String,
    /// Add a header, as `Name: value`; repeat for several.
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// Set the event id: publishing again with the same id has no second effect. Default: a new
    /// one.
    #[arg(long)]
    id: Option<String>,
    /// Publish through the ingress, with retries. Default for URL: the ingress of the host.
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "", conflicts_with = "id")]
    http: Option<String>,
    /// Set the idempotency key: the same key publishes the message once. Default: a new one.
    #[arg(long, requires = "http")]
    key: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Publish {
    pub async fn run(self) -> Result<()> {
        if let Some(url) = &self.http {
            return self.publish_over_http(url).await;
        }
        let client = Client::find(&self.host)?;
        let body = self.body()?;
        let id = self
            .id
            .clone()
            .unwrap_or_else(|| uuid::Uuid::now_v7().to_string());
        let message = api::PublishRequest {
            subject: self.subject.clone(),
            headers: self
                .headers
                .iter()
                .map(|header| parse_header(header))
                .collect::<Result<_>>()?,
            id: id.clone(),
            body: base64::engine::general_purpose::STANDARD.encode(body),
        };
        let ack: api::PublishAck = client.post("/publish", &message).await?;
        if self.json {
            return term::json(&ack);
        }
        let suffix = if ack.duplicate {
            " (already stored)"
        } else {
            ""
        };
        term::data(format!("{} {} id {id}{suffix}", ack.stream, ack.sequence))?;
        if ack.workers.is_empty() {
            let subject = &self.subject;
            term::warning(format!(
                "no worker consumes `{subject}` from the stream {}",
                ack.stream
            ));
        }
        Ok(())
    }
}

impl Publish {
    fn body(&self) -> Result<Vec<u8>> {
        if self.body == "-" {
            read_body()
        } else {
            Ok(self.body.clone().into_bytes())
        }
    }

    /// Publishes through the ingress: under a key, with retries until there is a response.
    async fn publish_over_http(&self, url: &str) -> Result<()> {
        let url = if url.is_empty() {
            local_ingress_url()?
        } else {
            url.to_owned()
        };
        let client = oncely_client::Client::new(&url)?;
        let mut request = client.publish(&self.subject, self.body()?);
        for header in &self.headers {
            let (name, value) = parse_header(header)?;
            request = request.header(&format!("X-Message-{name}"), &value);
        }
        if let Some(key) = &self.key {
            request = request.key(key.as_str());
        }
        let response = request.send().await.map_err(with_retry_hint)?;
        let accepted: Accepted = response
            .json()
            .context("parse the response of the ingress")?;
        if self.json {
            return term::json(&accepted);
        }
        let suffix = if response.replayed {
            " (already accepted)"
        } else {
            ""
        };
        let tries = if response.tries > 1 {
            format!(" after {} tries", response.tries)
        } else {
            String::new()
        };
        let key = response.key.unwrap_or_default();
        term::data(format!(
            "{} accepted, id {}, key {key}{tries}{suffix}",
            accepted.subject, accepted.id
        ))
    }
}

/// The response of the ingress to a message.
#[derive(Debug, Serialize, Deserialize)]
struct Accepted {
    id: String,
    subject: String,
}

fn local_ingress_url() -> Result<String> {
    let url = HostFile::nearest().and_then(|file| file.http);
    url.ok_or_else(|| anyhow!("no host with an ingress is known here"))
        .hint("set its address with --http http://127.0.0.1:7480")
}

/// Adds a hint with the key for a retry, if the outcome is unknown.
fn with_retry_hint(error: oncely_client::Error) -> anyhow::Error {
    let key = error.key().map(str::to_owned);
    let is_unclear = error.is_unclear();
    let error = anyhow::Error::new(error);
    match key {
        Some(key) if is_unclear => error.hint(format!("retry with the same key: --key {key}")),
        _ => error,
    }
}

fn read_body() -> Result<Vec<u8>> {
    let mut body = Vec::new();
    std::io::stdin()
        .read_to_end(&mut body)
        .context("read the body from standard input")?;
    Ok(body)
}

fn parse_header(text: &str) -> Result<(String, String)> {
    let (name, value) = text
        .split_once(':')
        .ok_or_else(|| anyhow!("`{text}` is not a header"))
        .hint("write it as --header 'Name: value'")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}
