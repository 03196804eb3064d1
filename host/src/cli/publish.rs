//! `oncely publish`: put one message on a stream.

use std::io::Read;

use anyhow::{Context, Result, anyhow};
use base64::Engine as _;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::client::{Client, HostArgs, HostFile};
use super::term;
use crate::api;
use crate::model::hint::WithHint;

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
    /// Go through the ingress, with retries: an address such as http://127.0.0.1:7480, or nothing for that of the host.
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "", conflicts_with = "id")]
    http: Option<String>,
    /// The idempotency key: with it the same message is published once, however often this runs. Default: a new one.
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
        let place: api::PublishAck = client.post("/publish", &message).await?;
        if self.json {
            return term::json(&place);
        }
        let suffix = if place.duplicate {
            " (it was there already)"
        } else {
            ""
        };
        term::data(format!(
            "{} {} id {id}{suffix}",
            place.stream, place.sequence
        ))?;
        if place.workers.is_empty() {
            let subject = &self.subject;
            term::warning(format!(
                "no worker takes messages of `{subject}` from the stream {}",
                place.stream
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

    /// Publishes as programs do: under a key, and again until there is an answer.
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
        let answer = request.send().await.map_err(with_retry_hint)?;
        let accepted: Accepted = answer.json().context("read what the ingress answered")?;
        if self.json {
            return term::json(&accepted);
        }
        let suffix = if answer.replayed {
            " (it was accepted before)"
        } else {
            ""
        };
        let tries = if answer.tries > 1 {
            format!(" after {} tries", answer.tries)
        } else {
            String::new()
        };
        let key = answer.key.unwrap_or_default();
        term::data(format!(
            "{} accepted, id {}, key {key}{tries}{suffix}",
            accepted.subject, accepted.id
        ))
    }
}

/// What the ingress answers to a message.
#[derive(Debug, Serialize, Deserialize)]
struct Accepted {
    id: String,
    subject: String,
}

fn local_ingress_url() -> Result<String> {
    let url = HostFile::nearest().and_then(|file| file.http);
    url.ok_or_else(|| anyhow!("no host that takes requests is known here"))
        .hint("name its address: --http http://127.0.0.1:7480")
}

/// Says under which key to go on, when nobody knows what became of it.
fn with_retry_hint(error: oncely_client::Error) -> anyhow::Error {
    let key = error.key().map(str::to_owned);
    let is_unclear = error.is_unclear();
    let error = anyhow::Error::new(error);
    match key {
        Some(key) if is_unclear => error.hint(format!("ask again under the same key: --key {key}")),
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
