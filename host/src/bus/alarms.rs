//! Taking alarms from their stream one at a time, in order, for whoever has to be told of them. No worker's messages come
//! this way: these are acknowledged once somebody heard of them.

use std::time::Duration;

use anyhow::{Context, Error, Result};
use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::{self, AckKind};
use bytes::Bytes;
use jiff::Timestamp;

use super::Bus;
use crate::model::alarm::ALARM_STREAM;
use crate::model::output_ids::OUTPUT_ID_HEADER;

/// How long one request for the next alarm stays open.
const REQUEST_OPEN: Duration = Duration::from_secs(5);

/// After how long without a word a host that took an alarm counts as gone; longer than telling of one may take.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// The place up to which alarms were told, shared by all hosts.
pub struct AlarmConsumer {
    bus: Bus,
    durable: String,
}

/// An alarm to tell of.
pub struct AlarmMessage {
    /// The same for each attempt to tell of it.
    pub id: String,
    pub body: Bytes,
    pub stored_at: Timestamp,
    /// How often it was fetched, this time included.
    pub delivered: u32,
    message: jetstream::Message,
}

impl Bus {
    /// Where alarms were told up to, under the name `durable`. Of two that are under way at the same time the second waits
    /// until the first was told: that an alarm is over is never told before that it was raised.
    pub async fn alarm_consumer(&self, durable: &str) -> Result<AlarmConsumer> {
        let stream = self
            .context
            .get_stream(ALARM_STREAM)
            .await
            .with_context(|| format!("open the stream {ALARM_STREAM}"))?;
        let config = Config {
            durable_name: Some(durable.to_owned()),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_deliver: -1,
            max_ack_pending: 1,
            ..Config::default()
        };
        stream
            .create_consumer(config)
            .await
            .context("make the consumer of alarms")?;
        Ok(AlarmConsumer {
            bus: self.clone(),
            durable: durable.to_owned(),
        })
    }
}

impl AlarmConsumer {
    /// The next alarm; none when there is none for a while.
    pub async fn next(&self) -> Result<Option<AlarmMessage>> {
        let mut requests = self.bus.pull_requests(ALARM_STREAM, &self.durable).await?;
        requests
            .open(1, REQUEST_OPEN, false)
            .context("ask for the next alarm")?;
        let fetched = requests.next(&self.bus).await.context("take an alarm")?;
        let Some(fetched) = fetched else {
            return Ok(None);
        };
        let id = fetched.headers.get(OUTPUT_ID_HEADER);
        let id = id.map_or_else(
            || format!("{ALARM_STREAM}:{}", fetched.position.sequence),
            ToString::to_string,
        );
        let delivered = u32::try_from(fetched.position.delivered).unwrap_or(u32::MAX);
        let message = self.bus.ackable_message(&fetched.position.reply);
        Ok(Some(AlarmMessage {
            id,
            body: fetched.body,
            stored_at: fetched.position.stored_at,
            delivered,
            message,
        }))
    }
}

impl AlarmMessage {
    /// Somebody heard of it, or never will.
    pub async fn ack(self) -> Result<()> {
        self.message
            .double_ack()
            .await
            .map_err(Error::from_boxed)
            .context("acknowledge an alarm")
    }

    /// It is to be told again after a while.
    pub async fn nack(self, after: Duration) -> Result<()> {
        let kind = AckKind::Nak(Some(after.max(Duration::from_millis(1))));
        self.message
            .ack_with(kind)
            .await
            .map_err(Error::from_boxed)
            .context("ask for an alarm again")
    }
}
