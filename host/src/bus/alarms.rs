//! The consumer of the alarm stream: one alarm at a time, in order, acknowledged after its
//! notification.

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

/// How long the server waits for an acknowledgement before it delivers an alarm again. Longer than
/// one notification may take.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// The durable consumer of alarms, shared by all hosts.
pub struct AlarmConsumer {
    bus: Bus,
    durable: String,
}

/// An alarm to notify about.
pub struct AlarmMessage {
    /// Stable over all delivery attempts of this alarm.
    pub id: String,
    /// The JSON of the alarm, as published.
    pub body: Bytes,
    /// When the stream stored the alarm.
    pub stored_at: Timestamp,
    /// Number of deliveries, this one included.
    pub delivered: u32,
    message: jetstream::Message,
}

impl Bus {
    /// Creates or opens the alarm consumer named `durable`. At most one alarm is in flight, so the
    /// end of an alarm is never notified before its start.
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
            .context("create the alarm consumer")?;
        Ok(AlarmConsumer {
            bus: self.clone(),
            durable: durable.to_owned(),
        })
    }
}

impl AlarmConsumer {
    /// The next alarm; `None` if none arrives while one request is open.
    pub async fn next(&self) -> Result<Option<AlarmMessage>> {
        let mut requests = self.bus.pull_requests(ALARM_STREAM, &self.durable).await?;
        requests
            .open(1, REQUEST_OPEN, false)
            .context("request the next alarm")?;
        let fetched = requests.next(&self.bus).await.context("fetch an alarm")?;
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
    /// Acknowledges the alarm: its notification was sent, or never will be.
    pub async fn ack(self) -> Result<()> {
        self.message
            .double_ack()
            .await
            .map_err(Error::from_boxed)
            .context("acknowledge an alarm")
    }

    /// Requests redelivery of the alarm after a delay.
    pub async fn nack(self, after: Duration) -> Result<()> {
        let kind = AckKind::Nak(Some(after.max(Duration::from_millis(1))));
        self.message
            .ack_with(kind)
            .await
            .map_err(Error::from_boxed)
            .context("nack an alarm")
    }
}
