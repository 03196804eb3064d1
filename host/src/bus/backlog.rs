//! The messages of a stream as a worker would receive them, read without its consumer.

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use jiff::Timestamp;
use serde_json::json;
use std::time::Duration;

use super::Bus;
use super::decode::is_delete_marker;
use super::pull::identify;
use super::wire::IncomingMessage;
use crate::model::message::{Message, Origin};

/// How many messages one request brings. All of them may be in memory at once.
const REQUEST_MAX: usize = 100;

/// How long one request stays open.
const REQUEST_OPEN: Duration = Duration::from_secs(5);

/// A part of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRange {
    /// The name of the stream.
    pub stream: String,
    /// Wildcards allowed; empty for all of the stream.
    pub subjects: Vec<String>,
    /// The first and the last sequence.
    pub from: u64,
    /// Inclusive.
    pub to: u64,
}

impl Bus {
    /// Calls `each` for the first `most` messages of a range, in their order. Returns the sequence
    /// from which on there may be more; `None` at the end of the range.
    ///
    /// Delete markers are no messages, and are left out.
    pub async fn read_range(
        &self,
        range: &StreamRange,
        most: usize,
        each: impl FnMut(Message),
    ) -> Result<Option<u64>> {
        if range.from > range.to || most == 0 {
            return Ok(None);
        }
        let stream = self
            .stream(&range.stream)
            .await?
            .with_context(|| format!("the stream {} does not exist", range.stream))?;
        let read = async {
            // A work queue permits no second consumer of a subject.
            match stream.is_queue {
                true => self.read_one_by_one(range, most, each).await,
                false => self.read_by_consumer(range, most, each).await,
            }
        };
        read.await
            .with_context(|| format!("read the messages of {}", range.stream))
    }

    async fn read_by_consumer(
        &self,
        range: &StreamRange,
        most: usize,
        mut each: impl FnMut(Message),
    ) -> Result<Option<u64>> {
        let stream = self.context.get_stream_no_info(&range.stream).await?;
        let consumer = stream.create_consumer(reading(range, range.from)).await?;
        let info = consumer.cached_info();
        let (name, mut left) = (info.name.clone(), info.num_pending);
        let mut requests = self.pull_requests(&range.stream, &name).await?;
        let mut visited = 0;
        let read = async {
            while left > 0 {
                requests.open(REQUEST_MAX.min(most - visited), REQUEST_OPEN, true)?;
                let mut received_any = false;
                while let Some((position, incoming)) = requests.next_incoming(self).await? {
                    (received_any, left) = (true, position.pending);
                    if position.sequence > range.to {
                        return Ok(None);
                    }
                    visited += 1;
                    let next = position.sequence + 1;
                    if !is_delete_marker(&incoming.headers, &incoming.body) {
                        let origin = Origin {
                            stream: position.stream,
                            sequence: position.sequence,
                            stored_at: position.stored_at,
                        };
                        each(identify(incoming, origin).0);
                    }
                    if visited >= most {
                        return Ok(Some(next).filter(|_| left > 0 && next <= range.to));
                    }
                }
                if !received_any {
                    anyhow::bail!("the server stopped answering with {left} messages left");
                }
            }
            Ok(None)
        };
        let read = read.await;
        let _ = stream.delete_consumer(&name).await;
        read
    }

    async fn read_one_by_one(
        &self,
        range: &StreamRange,
        most: usize,
        mut each: impl FnMut(Message),
    ) -> Result<Option<u64>> {
        let mut from = range.from;
        for _ in 0..most {
            let Some((sequence, stored_at, incoming)) = self.next_message(range, from).await?
            else {
                return Ok(None);
            };
            if sequence > range.to {
                return Ok(None);
            }
            if !is_delete_marker(&incoming.headers, &incoming.body) {
                let origin = Origin {
                    stream: range.stream.clone(),
                    sequence,
                    stored_at,
                };
                each(identify(incoming, origin).0);
            }
            from = sequence + 1;
        }
        Ok(Some(from).filter(|from| *from <= range.to))
    }

    /// The first message from a sequence on with one of the range's subjects.
    async fn next_message(
        &self,
        range: &StreamRange,
        from: u64,
    ) -> Result<Option<(u64, Timestamp, IncomingMessage)>> {
        let every = [">".to_owned()];
        let subjects: &[String] = match range.subjects.is_empty() {
            true => &every,
            false => &range.subjects,
        };
        let mut first: Option<(u64, Timestamp, IncomingMessage)> = None;
        for subject in subjects {
            let query = json!({ "seq": from, "next_by_subj": subject });
            if let Some(raw) = self.get_raw_message(&range.stream, query).await?
                && first.as_ref().is_none_or(|(seq, ..)| raw.seq < *seq)
            {
                first = Some((raw.seq, raw.time, raw.incoming()?));
            }
        }
        Ok(first)
    }

    /// The maximum number of messages of a range that a consumer has not acknowledged, whose
    /// unhandled messages are `unhandled`.
    pub async fn count_range(&self, range: &StreamRange, unhandled: u64) -> Result<u64> {
        if range.from > range.to {
            return Ok(0);
        }
        let stream = self.stream(&range.stream).await?;
        if stream.is_none_or(|stream| stream.is_queue) {
            return Ok(unhandled);
        }
        let pending = async |from: u64| {
            let stream = self.context.get_stream_no_info(&range.stream).await?;
            let consumer = stream.create_consumer(reading(range, from)).await?;
            let (name, pending) = {
                let info = consumer.cached_info();
                (info.name.clone(), info.num_pending)
            };
            let _ = stream.delete_consumer(&name).await;
            anyhow::Ok(pending)
        };
        let context = || format!("count the messages of {}", range.stream);
        let all = pending(range.from).await.with_context(context)?;
        let after = pending(range.to.saturating_add(1))
            .await
            .with_context(context)?;
        Ok(all.saturating_sub(after).min(unhandled))
    }

    /// The sequence of the last message that was stored before `until`; 0 for none. Sequences and
    /// times of a stream increase together, so it is found by bisection.
    pub async fn last_sequence_before(&self, stream: &str, until: Timestamp) -> Result<u64> {
        let info = self
            .stream(stream)
            .await?
            .with_context(|| format!("the stream {stream} does not exist"))?;
        // The first sequence at or after which no message is older lies in `low..=high`.
        let (mut low, mut high) = (info.first_sequence, info.last_sequence + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            let query = json!({ "seq": middle, "next_by_subj": ">" });
            let found = self
                .get_raw_message(stream, query)
                .await
                .with_context(|| format!("find a message of {stream} by its time"))?;
            match found {
                Some(raw) if raw.seq < high && raw.time < until => low = raw.seq + 1,
                _ => high = middle,
            }
        }
        Ok(low.saturating_sub(1))
    }
}

/// The configuration of a consumer that reads a range from a sequence on. The server removes it if
/// this process dies meanwhile.
fn reading(range: &StreamRange, from: u64) -> pull::Config {
    pull::Config {
        deliver_policy: DeliverPolicy::ByStartSequence {
            start_sequence: from.max(1),
        },
        filter_subjects: range.subjects.clone(),
        ack_policy: AckPolicy::None,
        inactive_threshold: Duration::from_secs(60),
        memory_storage: true,
        ..pull::Config::default()
    }
}
