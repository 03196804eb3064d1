//! A broadcast feed: each host receives all messages of a stream from now on, in order. Positions
//! are kept in the host. After an interruption a feed resumes at its position; if that is no longer
//! stored, it reports a gap.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use bytes::Bytes;
use jiff::Timestamp;

use super::Bus;
use super::pull_requests::PullRequests;
use super::streams::timestamp;

/// How long one request for messages stays open, and how many messages it may bring.
const REQUEST_OPEN: Duration = Duration::from_secs(10);
const REQUEST_MAX: usize = 1_000;

/// After this long without requests the server removes the consumer of a host that is gone.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(60);

/// All messages of a stream from a point in time on.
pub struct Feed {
    bus: Bus,
    stream: String,
    /// The stream's creation time, and the last received sequence. Initially the stream's last
    /// sequence.
    created: Timestamp,
    last: u64,
    /// Requests to the consumer of this feed; `None` if the consumer has to be created.
    requests: Option<PullRequests>,
}

/// An event of a feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedEvent {
    /// The body of a new message.
    Message(Bytes),
    /// Messages may have been missed.
    Gap,
}

impl Bus {
    /// Subscribes to a stream from now on.
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
    /// The next event. After an error it can be called again and resumes at its position.
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
                    .context("request messages of the broadcast stream")?;
            }
            let message = match requests.next(&self.bus).await {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                // Requests end with their connection, and the consumer may be gone.
                Err(error) => {
                    tracing::debug!(
                        stream = self.stream,
                        error = format!("{error:#}"),
                        "feed interrupted, resuming"
                    );
                    self.requests = None;
                    continue;
                }
            };

            // Detect a gap by the sequence.
            let sequence = message.position.sequence;
            let is_next = sequence == self.last + 1;
            self.last = sequence;
            // The receiver drops everything after a gap, so the body of this message is irrelevant.
            return Ok(if is_next {
                FeedEvent::Message(message.body)
            } else {
                FeedEvent::Gap
            });
        }
    }

    /// Creates a consumer that continues after the last received sequence. Returns true if that
    /// sequence is no longer stored, or the stream was recreated.
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

        // Continue after the last received sequence.
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
            .context("subscribe to the broadcast stream")?;
        self.requests = Some(
            self.bus
                .pull_requests(name, &consumer.cached_info().name)
                .await?,
        );
        Ok(is_recreated || is_gone)
    }
}
