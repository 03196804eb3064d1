//! What every host hears, not one of them: all messages of a stream from now on, in order, without a place that the server
//! would have to remember. Whoever was away goes on where it was; when that is gone, it is told of the gap.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use bytes::Bytes;
use jiff::Timestamp;

use super::Bus;
use super::pull_requests::PullRequests;
use super::streams::timestamp;

/// How long one request for messages stays open, and how many it brings.
const REQUEST_OPEN: Duration = Duration::from_secs(10);
const REQUEST_MAX: usize = 1_000;

/// After how long the server forgets about a listener that is gone.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(60);

/// All messages of a stream from some moment on.
pub struct Feed {
    bus: Bus,
    stream: String,
    /// When the stream was made, and the last sequence that was received, or that stood there at the start.
    created: Timestamp,
    last: u64,
    /// To the consumer that is there for this listener; none when it is to be made.
    requests: Option<PullRequests>,
}

/// What a feed tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    Message(Bytes),
    /// Messages may have gone by unheard.
    Gap,
}

impl Bus {
    /// Listens to a stream, from now on.
    pub async fn feed(&self, stream: &str) -> Result<Feed> {
        let info = self
            .stream(stream)
            .await?
            .with_context(|| format!("there is no stream {stream}"))?;
        Ok(Feed {
            bus: self.clone(),
            stream: stream.to_owned(),
            created: info.created,
            last: info.last_sequence,
            requests: None,
        })
    }
}

impl Feed {
    /// What comes next. After an error it can be asked again, and goes on where it was.
    pub async fn next(&mut self) -> Result<FeedEvent> {
        let event = self.next_event().await;
        if event.is_err() {
            self.requests = None;
        }
        event
    }

    async fn next_event(&mut self) -> Result<FeedEvent> {
        loop {
            let Some(requests) = &mut self.requests else {
                if self.resume().await? {
                    return Ok(FeedEvent::Gap);
                }
                continue;
            };
            if !requests.is_open() {
                requests
                    .open(REQUEST_MAX, REQUEST_OPEN, false)
                    .context("ask for what is told to all hosts")?;
            }
            let message = match requests.next(&self.bus).await {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                // The requests end with their connection, and the consumer may be gone.
                Err(error) => {
                    tracing::debug!("listen anew to what is told to all hosts: {error:#}");
                    self.requests = None;
                    continue;
                }
            };
            let sequence = message.position.sequence;
            let is_next = sequence == self.last + 1;
            self.last = sequence;
            // Of what is forgotten nobody has to know what came after it.
            return Ok(if is_next {
                FeedEvent::Message(message.body)
            } else {
                FeedEvent::Gap
            });
        }
    }

    /// Makes a consumer that goes on where this one was; true when that is not possible any more, or the stream is another.
    async fn resume(&mut self) -> Result<bool> {
        let name = &self.stream;
        let stream = self
            .bus
            .context
            .get_stream(name)
            .await
            .with_context(|| format!("open the stream {name}"))?;
        let info = stream.cached_info();
        let created = timestamp(info.created)?;
        let is_recreated = created != self.created || info.state.last_sequence < self.last;
        let is_gone = info.state.first_sequence > self.last + 1;
        if is_recreated || is_gone {
            (self.created, self.last) = (created, info.state.last_sequence);
        }
        let config = Config {
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: self.last + 1,
            },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE_THRESHOLD,
            memory_storage: true,
            ..Config::default()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .context("listen to what is told to all hosts")?;
        self.requests = Some(
            self.bus
                .pull_requests(name, &consumer.cached_info().name)
                .await?,
        );
        Ok(is_recreated || is_gone)
    }
}
