//! Facts about the NATS server, its streams and its consumers, for `oncely doctor`. Nothing here
//! changes anything.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::AckPolicy;
use async_nats::jetstream::stream::{DiscardPolicy, Info, PersistenceMode, StorageType};
use futures::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;

use super::pull::{self, Subscription};
use super::streams::{StreamInfo, stream_info};
use super::{Bus, REQUEST_TIMEOUT};
use crate::model::clock_reading::ClockReading;
use crate::model::units;

/// The server that a bus is connected to, and its account.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerFacts {
    /// The version, such as `2.11.4`.
    pub version: String,
    /// The storage for files that the account uses, in bytes.
    pub storage: u64,
    /// The limit of that storage; `None` for no limit.
    pub storage_max: Option<u64>,
    /// The number of consumers in the account, and its limit.
    pub consumers: u64,
    /// `None` for no limit.
    pub consumers_max: Option<u64>,
}

/// A stream with the settings and the state that decide whether it keeps messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamFacts {
    /// Name, subjects and positions.
    pub stream: StreamInfo,
    /// The number of servers that hold it.
    pub replicas: usize,
    /// Whether its server belongs to a cluster.
    pub is_clustered: bool,
    /// Whether it has a leader, or needs none.
    pub has_leader: bool,
    /// The servers whose replica is offline or behind.
    pub outdated_replicas: Vec<String>,
    /// Whether it is kept in memory only.
    pub is_in_memory: bool,
    /// Whether a message is acknowledged before it is written.
    pub is_async: bool,
    /// Whether a full stream removes its oldest messages, instead of refusing new ones.
    pub discards_old: bool,
    /// The stored bytes.
    pub bytes: u64,
    /// The limits on bytes and messages; `None` for none.
    pub bytes_max: Option<u64>,
    /// See `bytes_max`.
    pub messages_max: Option<u64>,
}

/// A setting of a consumer that differs from the one that a host would create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedSetting {
    /// The name as the NATS server has it, such as `max_ack_pending`.
    pub name: &'static str,
    /// The value that hosts set.
    pub expected: String,
    /// The value that it has.
    pub found: String,
}

/// The durable consumer of a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsumerFacts {
    /// Whether it exists.
    pub exists: bool,
    /// Whether an operator paused it.
    pub is_paused: bool,
    /// The settings that someone changed.
    pub changed: Vec<ChangedSetting>,
}

/// The part of a response about a stream that has the time.
#[derive(Deserialize)]
struct TimedResponse {
    ts: Option<Timestamp>,
}

impl Bus {
    /// The server and the account of this connection.
    pub async fn server_facts(&self) -> Result<ServerFacts> {
        let account = self
            .context
            .query_account()
            .await
            .context("query the JetStream account")?;
        let limit = |limit: Option<i64>| limit.and_then(|limit| u64::try_from(limit).ok());
        Ok(ServerFacts {
            version: self.client.server_info().version,
            storage: account.storage,
            storage_max: limit(account.limits.max_storage),
            consumers: account.consumers as u64,
            consumers_max: limit(account.limits.max_consumers),
        })
    }

    /// All streams of the account.
    pub async fn stream_facts(&self) -> Result<Vec<StreamFacts>> {
        let mut found = Vec::new();
        let mut streams = self.context.streams();
        while let Some(stream) = streams.next().await {
            found.push(facts_of_stream(&stream.context("list the streams")?)?);
        }
        Ok(found)
    }

    /// The server's clock, by the time in its response about a stream; `None` if the server is too
    /// old to send it.
    pub async fn clock(&self, stream: &str) -> Result<Option<ClockReading>> {
        let query = serde_json::json!({});
        let before = Timestamp::now();
        let request = self
            .context
            .request(format!("STREAM.INFO.{stream}"), &query);
        let response: TimedResponse = tokio::time::timeout(REQUEST_TIMEOUT, request)
            .await
            .context("read the server's clock in time")?
            .context("read the server's clock")?;
        let after = Timestamp::now();
        Ok(response
            .ts
            .map(|server| ClockReading::new(before, server, after)))
    }

    /// The consumer of a subscription, compared with the one that a host would create.
    pub async fn consumer_facts(&self, subscription: &Subscription) -> Result<ConsumerFacts> {
        let found = self
            .own_consumer(&subscription.stream, &subscription.durable)
            .await?;
        let Some(found) = found else {
            return Ok(ConsumerFacts::default());
        };
        Ok(ConsumerFacts {
            exists: true,
            is_paused: found.paused,
            changed: changed_settings(&pull::config(subscription), &found),
        })
    }
}

fn facts_of_stream(info: &Info) -> Result<StreamFacts> {
    let config = &info.config;
    let cluster = info.cluster.as_ref();
    let limit = |limit: i64| u64::try_from(limit).ok().filter(|limit| *limit > 0);
    let is_outdated =
        |peer: &&async_nats::jetstream::stream::PeerInfo| peer.offline || !peer.current;
    let outdated = cluster.map(|cluster| {
        let peers = cluster.replicas.iter().filter(is_outdated);
        peers.map(|peer| peer.name.clone()).collect()
    });
    Ok(StreamFacts {
        stream: stream_info(info)?,
        replicas: config.num_replicas,
        is_clustered: cluster.is_some_and(|cluster| cluster.name.is_some()),
        has_leader: cluster.is_none_or(|cluster| cluster.leader.is_some()),
        outdated_replicas: outdated.unwrap_or_default(),
        is_in_memory: config.storage == StorageType::Memory,
        is_async: config.persist_mode == Some(PersistenceMode::Async),
        discards_old: config.discard == DiscardPolicy::Old,
        bytes: info.state.bytes,
        bytes_max: limit(config.max_bytes),
        messages_max: limit(config.max_messages),
    })
}

/// The settings in which a consumer differs from the wanted configuration. A lower
/// `max_ack_pending` is none: the limits of a stream or account may require it.
fn changed_settings(
    wanted: &async_nats::jetstream::consumer::pull::Config,
    found: &async_nats::jetstream::consumer::Info,
) -> Vec<ChangedSetting> {
    let found = &found.config;
    let duration = |time: Duration| units::format_duration(time);
    let subjects = |one: &str, several: &[String]| {
        let mut all = several.to_vec();
        all.extend((!one.is_empty()).then(|| one.to_owned()));
        all.sort();
        all.join(", ")
    };
    let ack_policy = |policy: AckPolicy| format!("{policy:?}").to_lowercase();
    let pairs = [
        (
            "ack_policy",
            ack_policy(wanted.ack_policy),
            ack_policy(found.ack_policy),
        ),
        (
            "ack_wait",
            duration(wanted.ack_wait),
            duration(found.ack_wait),
        ),
        (
            "max_deliver",
            unlimited(wanted.max_deliver),
            unlimited(found.max_deliver),
        ),
        (
            "filter_subjects",
            subjects(&wanted.filter_subject, &wanted.filter_subjects),
            subjects(&found.filter_subject, &found.filter_subjects),
        ),
        (
            "backoff",
            wanted.backoff.len().to_string(),
            found.backoff.len().to_string(),
        ),
        (
            "headers_only",
            wanted.headers_only.to_string(),
            found.headers_only.to_string(),
        ),
        (
            "inactive_threshold",
            duration(wanted.inactive_threshold),
            duration(found.inactive_threshold),
        ),
    ];
    let changed = pairs
        .into_iter()
        .filter(|(_, expected, found)| expected != found);
    changed
        .map(|(name, expected, found)| ChangedSetting {
            name,
            expected,
            found,
        })
        .collect()
}

fn unlimited(count: i64) -> String {
    if count <= 0 {
        "unlimited".to_owned()
    } else {
        count.to_string()
    }
}
