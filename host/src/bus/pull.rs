//! Message delivery: a durable pull consumer, one open request at a time, explicit
//! acknowledgements.
//!
//! The requests are made here, not by the client library's message streams. Those buffer far more
//! than a host can handle within `ack_wait`, or miss events after a heartbeat.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::pull::{BatchConfig, Config};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, Info, IntoConsumerConfig as _};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::{ConsumerError, ConsumerErrorKind, RetentionPolicy};
use async_nats::jetstream::{AckKind, ErrorCode};
use async_nats::{StatusCode, Subject};
use futures::StreamExt;
use jiff::Timestamp;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::Bus;
use super::connection::{Connection, Listener, Message as ConnectionMessage};
use super::decode::{decode_headers, decode_subject, is_delete_marker};
use super::pull_requests::{MessagePosition, next_subject};
use super::streams::timestamp;
use super::wire::IncomingMessage;
use crate::model::hint::WithHint;
use crate::model::message::{Headers, InvalidEventId, Message, Origin, derived_event_id, event_id};
use crate::model::retry::Backoff;
use crate::model::subject;
use crate::model::verdict::{Reason, Settled};

/// How long one pull request stays open on the server. A frozen host is sent messages until then,
/// and each of them is redelivered to another host only after `ack_wait`.
const REQUEST_OPEN: Duration = Duration::from_secs(4);

/// How often the server confirms an open request without messages.
const HEARTBEAT: Duration = Duration::from_millis(1500);

/// A request counts as lost after this long without messages or heartbeats.
const SILENCE_MAX: Duration = Duration::from_secs(11);

/// How many bytes one pull request may bring; raised if the server accepts larger messages.
const REQUEST_BYTES: usize = 16 << 20;

/// How long an acknowledgement may wait for space in the client's buffer, which is full only in an
/// outage.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// The subjects to consume, and the durable consumer that holds the position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The name of the stream to consume.
    pub stream: String,
    /// The durable consumer's name.
    pub durable: String,
    /// Wildcards allowed; empty for all of the stream.
    pub subjects: Vec<String>,
    /// The server redelivers a message after this long without an acknowledgement or progress.
    pub ack_wait: Duration,
    /// How many messages may be unacknowledged at once, over all hosts.
    pub max_ack_pending: i64,
    /// Metadata stored with the consumer, such as the worker's name.
    pub metadata: HashMap<String, String>,
}

/// How long draining waits for each message in transit.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The receiving end of a subscription.
pub struct PullConsumer {
    bus: Bus,
    subscription: Subscription,
    deliveries: Connection,
    stream_created: Timestamp,
    /// The same for receipts, in microseconds since the Unix epoch.
    current_stream_created: Arc<AtomicI64>,
    /// Requests are numbered; request 7 is answered at `{inbox}.7`.
    inbox: String,
    answers: Listener,
    requests: u64,
    request: Option<Request>,
    /// A received message that `next` has not yet returned.
    buffered: Option<DeliveredMessage>,
    /// Whether the consumer has to be checked before the next request.
    is_suspect: bool,
    /// Whether no further requests are made.
    is_draining: bool,
    backoff: Backoff,
    /// Whether the server has answered a request since the consumer was last suspect.
    is_responsive: Arc<AtomicBool>,
    connections: watch::Receiver<u64>,
    failure: ConsumerFailure,
}

/// An open pull request.
struct Request {
    reply_subject: String,
    /// How many messages it can still bring.
    remaining: usize,
    last_activity: Instant,
}

/// A delivered message with its receipt.
pub struct DeliveredMessage {
    /// The message for the worker.
    pub message: Message,
    /// Why no worker can handle the message as it is; its event id is then derived from its
    /// position.
    pub unusable: Option<(Reason, String)>,
    /// Number of deliveries, this one included.
    pub delivered: u64,
    /// Settles the message. An unsettled message is redelivered after the subscription's
    /// `ack_wait`.
    pub receipt: Receipt,
}

/// The right to settle one delivered message.
pub struct Receipt {
    reply: Progress,
    /// The creation times of the message's stream and of the current stream of that name, in
    /// microseconds since the Unix epoch.
    stream_created: i64,
    current_stream_created: Arc<AtomicI64>,
}

/// Reports to the server that a message is still in progress. Cheap to clone.
#[derive(Clone)]
pub struct Progress {
    client: async_nats::Client,
    reply: Subject,
    /// Whether the message was settled or nacked. A later progress report would undo that: the
    /// server would restart `ack_wait` before redelivery, and later messages of the key would
    /// overtake this one.
    is_settled: Arc<Mutex<bool>>,
}

/// The backlog of a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Messages never delivered.
    pub pending: u64,
    /// Messages delivered and not acknowledged.
    pub ack_pending: u64,
    /// Open pull requests, of all hosts.
    pub waiting: u64,
    /// The highest delivered sequence.
    pub delivered: u64,
}

/// The state of a consumer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ConsumerState {
    /// The consumer exists and is not paused.
    #[default]
    Active,
    /// Paused by an operator, for the remaining time if it is known.
    Paused(Option<Duration>),
    /// The consumer or its stream is missing, for this reason.
    Missing(String),
}

/// The reason for a missing consumer, while it is missing.
type ConsumerFailure = Arc<std::sync::Mutex<Option<String>>>;

impl Bus {
    /// Creates or updates the durable consumer. It is never deleted, because it holds the position
    /// on the stream.
    pub async fn subscribe(&self, subscription: &Subscription) -> Result<PullConsumer> {
        let deliveries = self.deliveries().await?;
        let mut connections = deliveries.connections();
        connections.mark_unchanged();
        let stream_created = self.ensure_consumer(subscription).await?;
        let inbox = self.client.new_inbox();
        let answers = deliveries.listen(&format!("{inbox}.*"));
        Ok(PullConsumer {
            bus: self.clone(),
            subscription: subscription.clone(),
            deliveries,
            stream_created,
            current_stream_created: Arc::new(AtomicI64::new(stream_created.as_microsecond())),
            inbox,
            answers,
            requests: 0,
            request: None,
            buffered: None,
            is_suspect: false,
            is_draining: false,
            backoff: Backoff::default(),
            is_responsive: Arc::default(),
            failure: Arc::default(),
            connections,
        })
    }

    /// A probe of a durable consumer, whether or not it is consumed here.
    pub fn probe(&self, stream: &str, subjects: &[String], durable: &str) -> Probe {
        Probe {
            bus: self.clone(),
            stream: stream.to_owned(),
            subjects: subjects.to_vec(),
            durable: durable.to_owned(),
            is_responsive: Arc::default(),
            failure: Arc::default(),
        }
    }

    /// Creates or updates the durable consumer, without consuming from it here.
    pub async fn prepare_consumer(&self, subscription: &Subscription) -> Result<()> {
        self.ensure_consumer(subscription).await.map(drop)
    }

    /// Creates or updates the consumer. Returns the creation time of its stream.
    async fn ensure_consumer(&self, subscription: &Subscription) -> Result<Timestamp> {
        let stream = self
            .context
            .get_stream(&subscription.stream)
            .await
            .with_context(|| format!("open the stream {}", subscription.stream))?;
        let created = timestamp(stream.cached_info().created)?;
        // The start position of an existing consumer cannot be changed.
        let own = self
            .own_consumer(&subscription.stream, &subscription.durable)
            .await?;
        let began = own
            .as_ref()
            .map_or(DeliverPolicy::All, |info| info.config.deliver_policy);

        // Under other subjects the consumer skipped messages that match now. Until it is recorded
        // up to where, any message may have been skipped.
        let mut subscription = subscription.clone();
        let mut skipped = own.as_ref().map_or(0, skipped_up_to);
        if own
            .as_ref()
            .is_some_and(|own| filters(own) != subscription.subjects)
        {
            subscription.set_skipped_up_to(u64::MAX);
            self.create_consumer(&subscription, began).await?;
            skipped = u64::MAX;
        }
        if skipped == u64::MAX {
            let stream = self.stream(&subscription.stream).await?;
            skipped = stream.map_or(0, |stream| stream.last_sequence);
        }
        subscription.set_skipped_up_to(skipped);
        // An update is written to disk by the server, also if it changes nothing.
        let wanted = self.consumer_config(&subscription, began);
        if own.is_none_or(|own| !has_config(&own, wanted)) {
            self.create_consumer(&subscription, began).await?;
        }
        Ok(created)
    }

    /// Moves a subscription to another position: messages from this sequence on are delivered
    /// again.
    pub async fn rewind(&self, subscription: &Subscription, from: u64) -> Result<()> {
        self.retire_consumer(&subscription.stream, &subscription.durable)
            .await?;
        let from = match from {
            0 | 1 => DeliverPolicy::All,
            start_sequence => DeliverPolicy::ByStartSequence { start_sequence },
        };
        self.create_consumer(subscription, from).await
    }

    /// The server's information on a consumer; `None` if the consumer or its stream is missing.
    pub(super) async fn consumer_info(&self, stream: &str, durable: &str) -> Result<Option<Info>> {
        let context = || format!("query the consumer {durable} on {stream}");
        let stream_handle = self
            .context
            .get_stream_no_info(stream)
            .await
            .with_context(context)?;
        match stream_handle.consumer_info(durable).await {
            Ok(info) => Ok(Some(info)),
            Err(error) => match error.kind() {
                ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound => Ok(None),
                _ => Err(error).with_context(context),
            },
        }
    }

    async fn create_consumer(
        &self,
        subscription: &Subscription,
        from: DeliverPolicy,
    ) -> Result<()> {
        let config = self.consumer_config(subscription, from);
        let stream = self.context.get_stream_no_info(&subscription.stream).await;
        let stream = stream.with_context(|| format!("open the stream {}", subscription.stream))?;
        create_within_limits(&stream, config)
            .await
            .with_context(|| {
                format!(
                    "create the consumer {} on {}",
                    subscription.durable, subscription.stream
                )
            })?;
        Ok(())
    }

    fn consumer_config(&self, subscription: &Subscription, from: DeliverPolicy) -> Config {
        let mut config = Config {
            deliver_policy: from,
            ..config(subscription)
        };
        self.set_owner(&mut config.metadata);
        config
    }

    /// Checks whether the server would create or update the consumer of a subscription. Changes
    /// nothing. A missing stream is no error.
    ///
    /// # Errors
    /// The reason why the worker could never run.
    pub async fn validate_subscription(&self, subscription: &Subscription) -> Result<()> {
        let Subscription {
            stream: name,
            durable,
            ..
        } = subscription;
        if self.stream(name).await?.is_none() {
            return Ok(());
        }
        let stream = self
            .context
            .get_stream(name)
            .await
            .with_context(|| format!("open the stream {name}"))?;

        // Refuse a stream that removes idle consumers.
        let stream_config = &stream.cached_info().config;
        if stream_config
            .consumer_limits
            .as_ref()
            .is_some_and(|limits| !limits.inactive_threshold.is_zero())
        {
            return Err(anyhow::anyhow!(
                "the stream {name} removes idle consumers: a stopped worker would lose its position"
            ))
            .hint(format!(
                "remove `inactive_threshold` from the consumer limits of {name}: \
                 nats stream edit {name}"
            ));
        }

        // An existing consumer with the same filters needs no trial.
        let own = self
            .own_consumer(name, durable)
            .await?
            .map(|info| filters(&info));
        if own.as_ref() == Some(&subscription.subjects) {
            return Ok(());
        }
        if stream_config.retention == RetentionPolicy::WorkQueue {
            self.check_queue_overlap(subscription).await?;
            // The trial would compete with the worker's own consumer.
            if own.is_some() {
                return Ok(());
            }
        }
        // A trial consumer that expires, with every setting that the server may refuse.
        let trial = Config {
            durable_name: None,
            metadata: HashMap::new(),
            inactive_threshold: TRIAL_INACTIVE_THRESHOLD,
            memory_storage: true,
            ..config(subscription)
        };
        match create_within_limits(&stream, trial).await {
            Ok(trial) => {
                let _ = stream.delete_consumer(&trial).await;
                Ok(())
            }
            // An existing consumer does not count against the limit again.
            Err(error) if own.is_some() && exceeds_consumer_limit(&error) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("validate the consumer {durable} on {name}"))
            }
        }
    }

    /// Checks a work queue, where each message goes to one consumer, for another consumer with
    /// overlapping subjects.
    async fn check_queue_overlap(&self, subscription: &Subscription) -> Result<()> {
        let Subscription {
            stream: name,
            durable,
            subjects,
            ..
        } = subscription;
        let stream = self
            .context
            .get_stream_no_info(name)
            .await
            .with_context(|| format!("open the stream {name}"))?;
        let mut consumers = stream.consumers();
        while let Some(info) = consumers.next().await {
            let info = info.with_context(|| format!("list the consumers of {name}"))?;
            let theirs = filters(&info);
            let overlaps_any =
                |one: &String| subjects.iter().any(|other| subject::overlaps(one, other));
            let is_overlapping =
                theirs.is_empty() || subjects.is_empty() || theirs.iter().any(overlaps_any);
            if info.name != *durable && is_overlapping {
                let takes = if theirs.is_empty() {
                    "everything".to_owned()
                } else {
                    theirs.join(", ")
                };
                return Err(anyhow::anyhow!(
                    "the stream {name} is a work queue, where each message goes to one consumer, \
                     and its consumer {} takes {takes}",
                    info.name
                ))
                .hint("use subjects that no other consumer takes, or another stream");
            }
        }
        Ok(())
    }
}

/// The metadata key of the sequence up to which a consumer may have skipped messages that match its
/// subjects.
const SKIPPED_UP_TO: &str = "oncely.skipped-up-to";

impl Subscription {
    fn set_skipped_up_to(&mut self, sequence: u64) {
        self.metadata
            .insert(SKIPPED_UP_TO.to_owned(), sequence.to_string());
    }
}

/// The sequence up to which a consumer may have skipped messages that match its subjects; 0 for
/// none.
fn skipped_up_to(info: &Info) -> u64 {
    let sequence = info.config.metadata.get(SKIPPED_UP_TO);
    sequence
        .and_then(|sequence| sequence.parse().ok())
        .unwrap_or_default()
}

/// How long a trial consumer remains if this process dies meanwhile.
const TRIAL_INACTIVE_THRESHOLD: Duration = Duration::from_secs(10);

/// Creates or updates a consumer. If the stream, account or server allows fewer unacknowledged
/// messages, the limit is lowered. Returns the consumer's name.
async fn create_within_limits<I>(
    stream: &async_nats::jetstream::stream::Stream<I>,
    mut config: Config,
) -> Result<String, ConsumerError> {
    loop {
        match stream.create_consumer(config.clone()).await {
            Ok(made) => return Ok(made.cached_info().name.clone()),
            // The error contains the limit only in its text.
            Err(error) if exceeds_ack_pending_limit(&error) && config.max_ack_pending > 1 => {
                config.max_ack_pending /= 2
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether a consumer has this configuration, apart from what the server fills in.
fn has_config(info: &Info, wanted: Config) -> bool {
    let found = &info.config;
    let mut wanted = wanted.into_consumer_config();
    wanted.name.clone_from(&found.name);
    wanted.max_waiting = found.max_waiting;
    wanted.num_replicas = found.num_replicas;
    wanted.pause_until = found.pause_until;
    let of_server = |entry: &(&String, &String)| entry.0.starts_with(SERVER_METADATA);
    let of_server = found.metadata.iter().filter(of_server);
    wanted
        .metadata
        .extend(of_server.map(|(name, value)| (name.clone(), value.clone())));
    wanted == *found
}

/// The beginning of the names of the server's own metadata.
const SERVER_METADATA: &str = "_nats.";

fn exceeds_ack_pending_limit(error: &ConsumerError) -> bool {
    has_code(error, ErrorCode::CONSUMER_MAX_PENDING_ACK_EXCESS)
}

fn exceeds_consumer_limit(error: &ConsumerError) -> bool {
    has_code(error, ErrorCode::MAXIMUM_CONSUMERS_LIMIT)
}

fn has_code(error: &ConsumerError, code: ErrorCode) -> bool {
    matches!(error.kind(), ConsumerErrorKind::JetStream(answer) if answer.error_code() == code)
}

/// The subject filters of a consumer; empty for all of its stream.
fn filters(info: &Info) -> Vec<String> {
    let mut subjects = info.config.filter_subjects.clone();
    if !info.config.filter_subject.is_empty() {
        subjects.push(info.config.filter_subject.clone());
    }
    subjects
}

pub(super) fn config(subscription: &Subscription) -> Config {
    // Servers report one subject and several in different fields. Matching that makes an unchanged
    // update a no-op.
    let (filter_subject, filter_subjects) = match subscription.subjects.as_slice() {
        [subject] => (subject.clone(), Vec::new()),
        subjects => (String::new(), subjects.to_vec()),
    };
    Config {
        durable_name: Some(subscription.durable.clone()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: subscription.ack_wait,
        // Attempts are counted in the database: a broker that gives up would lose the message.
        max_deliver: -1,
        filter_subject,
        filter_subjects,
        max_ack_pending: subscription.max_ack_pending,
        metadata: subscription.metadata.clone(),
        ..Config::default()
    }
}

impl PullConsumer {
    /// The next message. Keeps one request of at most `capacity` messages open. Failures of the
    /// broker are retried: after a reconnect, a silence, or the loss of the consumer or stream, a
    /// new request follows. Cancel safe: dropping the future loses no message.
    ///
    /// # Errors
    /// The connection was closed.
    pub async fn next(&mut self, capacity: usize) -> Result<DeliveredMessage> {
        loop {
            if self.is_suspect {
                self.restore_consumer().await;
            }
            if self.buffered.is_none() {
                self.next_event(capacity).await?;
            }
            if let Some(pulled) = self.buffered.take() {
                return Ok(pulled);
            }
        }
    }

    /// Stops requesting and returns the messages already in transit, one per call; `None` after the
    /// last. Without a drain, those messages would be redelivered only after `ack_wait`, after
    /// later ones of their key.
    pub async fn drain(&mut self) -> Option<DeliveredMessage> {
        if !self.is_draining {
            self.is_draining = true;
            self.request = None;
            // Ends `answers` once the messages in transit are received.
            self.answers.drain();
        }
        loop {
            if let Some(buffered) = self.buffered.take() {
                return Some(buffered);
            }
            match tokio::time::timeout(DRAIN_TIMEOUT, self.answers.next()).await {
                Ok(Some(answer)) => self.handle_incoming(answer),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Waits for one event: an answer to the request, a new connection, or too long a silence.
    async fn next_event(&mut self, capacity: usize) -> Result<()> {
        let silence_deadline = match &self.request {
            Some(request) => request.last_activity + SILENCE_MAX,
            None => self.open_request(capacity)? + SILENCE_MAX,
        };
        tokio::select! {
            // Received messages come first: they prove that the request is alive.
            biased;
            answer = self.answers.next() => {
                let answer = answer.context("receive messages: the connection to NATS is closed")?;
                self.handle_incoming(answer);
            }
            // The server drops requests with their connection.
            Ok(()) = self.connections.changed() => self.mark_suspect("reconnected to NATS"),
            () = tokio::time::sleep_until(silence_deadline) => {
                self.mark_suspect("no answer to a pull request")
            }
        }
        Ok(())
    }

    /// Opens a request and returns the current time.
    fn open_request(&mut self, capacity: usize) -> Result<Instant> {
        let now = Instant::now();
        let remaining = capacity.max(1);
        let reply_subject = format!("{}.{}", self.inbox, self.requests);
        let batch = BatchConfig {
            batch: remaining,
            expires: Some(REQUEST_OPEN),
            idle_heartbeat: HEARTBEAT,
            max_bytes: REQUEST_BYTES.max(self.bus.max_payload() * 2),
            ..BatchConfig::default()
        };
        let body = serde_json::to_vec(&batch).context("serialize a pull request")?;
        self.deliveries.publish(ConnectionMessage {
            connection_number: *self.connections.borrow(),
            subject: next_subject(
                &self.bus,
                &self.subscription.stream,
                &self.subscription.durable,
            ),
            reply: reply_subject.clone(),
            headers: Vec::new(),
            body: body.into(),
        });
        self.requests += 1;
        self.request = Some(Request {
            reply_subject,
            remaining,
            last_activity: now,
        });
        Ok(now)
    }

    fn handle_incoming(&mut self, answer: IncomingMessage) {
        // A publisher may have stored a status header: anything with a stream position is a
        // message.
        match self.bus.position(answer.reply.as_deref()) {
            Ok(Some(position)) if is_delete_marker(&answer.headers, &answer.body) => {
                self.terminate_marker(position)
            }
            Ok(Some(position)) => self.buffer(answer, position),
            Ok(None) => self.handle_request_status(&answer),
            // The message stays unacknowledged and is redelivered.
            Err(error) => tracing::warn!(
                stream = self.subscription.stream,
                error = format!("{error:#}"),
                "malformed delivery skipped"
            ),
        }
    }

    fn handle_request_status(&mut self, answer: &IncomingMessage) {
        let Ok(block) = decode_headers(&answer.headers) else {
            return;
        };
        if let (Some(status), Some(request)) = (block.status, &mut self.request)
            && request.reply_subject.as_bytes() == answer.subject.as_ref()
        {
            request.last_activity = Instant::now();
            match status {
                StatusCode::IDLE_HEARTBEAT => self.mark_responsive(),
                StatusCode::TIMEOUT | StatusCode::NOT_FOUND => self.request = None,
                // The next message exceeds the remaining bytes of this request.
                StatusCode::REQUEST_TERMINATED if is_request_full(&block.description) => {
                    self.request = None
                }
                status => self.mark_suspect(&format!("{status} {}", block.description)),
            }
        }
    }

    /// Counts one message of the request.
    fn count_message(&mut self) {
        self.mark_responsive();
        if let Some(request) = &mut self.request {
            request.last_activity = Instant::now();
            request.remaining = request.remaining.saturating_sub(1);
        }
        self.request.take_if(|request| request.remaining == 0);
    }

    fn buffer(&mut self, message: IncomingMessage, position: MessagePosition) {
        self.count_message();
        self.buffered = Some(self.decode_delivery(message, position));
    }

    /// Terminates a delete marker. It is no event, as the server wrote it.
    fn terminate_marker(&mut self, position: MessagePosition) {
        self.count_message();
        let progress = Progress::new(&self.bus.client, Subject::from(position.reply));
        tokio::spawn(async move {
            // If this is lost, the marker is redelivered.
            let _ = progress.settle(AckKind::Term).await;
        });
    }

    fn decode_delivery(
        &self,
        message: IncomingMessage,
        position: MessagePosition,
    ) -> DeliveredMessage {
        let origin = Origin {
            stream: position.stream,
            sequence: position.sequence,
            stored_at: position.stored_at,
        };
        let (message, unusable) = identify(message, origin);
        DeliveredMessage {
            message,
            unusable,
            delivered: position.delivered,
            receipt: Receipt {
                reply: Progress::new(&self.bus.client, Subject::from(position.reply)),
                stream_created: self.stream_created.as_microsecond(),
                current_stream_created: Arc::clone(&self.current_stream_created),
            },
        }
    }

    fn mark_responsive(&mut self) {
        self.is_responsive.store(true, Ordering::Relaxed);
        self.backoff.reset();
    }

    fn mark_suspect(&mut self, why: &str) {
        tracing::debug!(
            consumer = self.subscription.durable,
            stream = self.subscription.stream,
            reason = why,
            "consumer suspect"
        );
        self.is_responsive.store(false, Ordering::Relaxed);
        self.request = None;
        self.is_suspect = true;
    }

    /// Creates the consumer if needed, with retries, and reads the creation time of its stream
    /// again.
    async fn restore_consumer(&mut self) {
        loop {
            if self.backoff.failures() > 0 {
                self.back_off().await;
            }
            // Counted before the attempt, so that repeated suspicion cannot cause a tight loop.
            let first = self.backoff.failures() == 0;
            let _ = self.backoff.next(0.0);
            self.connections.mark_unchanged();
            match self.bus.ensure_consumer(&self.subscription).await {
                Ok(created) => {
                    self.stream_created = created;
                    self.current_stream_created
                        .store(created.as_microsecond(), Ordering::Relaxed);
                    self.is_suspect = false;
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return;
                }
                Err(error) => {
                    let why = format!("{error:#}");
                    if first {
                        tracing::warn!(
                            consumer = self.subscription.durable,
                            error = why,
                            "consumer unavailable, retrying"
                        );
                    }
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                }
            }
        }
    }

    /// Waits for the backoff, or until there is a new connection.
    async fn back_off(&mut self) {
        let mut backoff = self.backoff.clone();
        tokio::select! {
            Ok(()) = self.connections.changed() => {}
            () = tokio::time::sleep(backoff.next(rand::random())) => {}
        }
    }

    /// A probe of the consumer for use elsewhere.
    pub fn probe(&self) -> Probe {
        Probe {
            bus: self.bus.clone(),
            stream: self.subscription.stream.clone(),
            subjects: self.subscription.subjects.clone(),
            durable: self.subscription.durable.clone(),
            is_responsive: Arc::clone(&self.is_responsive),
            failure: Arc::clone(&self.failure),
        }
    }
}

/// The message at a place, with its event id. If no worker can handle it, the reason is returned,
/// and the event id is derived from the place.
pub(super) fn identify(
    message: IncomingMessage,
    origin: Origin,
) -> (Message, Option<(Reason, String)>) {
    let decoded = decode_message(&message);
    let derived_event_id = || derived_event_id(&origin.stream, origin.stored_at, origin.sequence);
    let (event_id, unusable) = match decoded.why {
        Some(why) => (derived_event_id(), Some((Reason::Unreadable, why))),
        None => match event_id(
            &decoded.headers,
            Some(&message.body),
            &origin.stream,
            origin.stored_at,
            origin.sequence,
        ) {
            Ok(id) => (id, None),
            Err(InvalidEventId { fallback_id, why }) => {
                (fallback_id, Some((Reason::InvalidId, why)))
            }
        },
    };
    let message = Message {
        event_id,
        subject: decoded.subject,
        headers: decoded.headers,
        body: message.body,
        origin: Some(origin),
        redriven: None,
    };
    (message, unusable)
}

/// A message in the form that handlers receive.
struct DecodedMessage {
    subject: String,
    headers: Headers,
    /// The reason why no handler can receive it. Its unreadable bytes are then in separate headers.
    why: Option<String>,
}

fn decode_message(message: &IncomingMessage) -> DecodedMessage {
    let (subject, subject_error) = match decode_subject(&message.subject) {
        Ok(subject) => (subject, None),
        Err((shown, why)) => (shown, Some(why)),
    };
    let (mut headers, headers_error) = match decode_headers(&message.headers) {
        Ok(block) => (headers(Some(&block.headers)), None),
        Err(why) => (Headers::new(), Some(why)),
    };
    let mut keep = |name: &str, bytes: &[u8]| {
        headers.push((name.to_owned(), bytes.escape_ascii().to_string()))
    };
    if headers_error.is_some() {
        keep("Oncely-Unreadable-Headers", &message.headers);
    }
    if subject_error.is_some() {
        keep("Oncely-Unreadable-Subject", &message.subject);
    }
    let why: Vec<String> = subject_error.into_iter().chain(headers_error).collect();
    DecodedMessage {
        subject,
        headers,
        why: Some(why.join("; ")).filter(|why| !why.is_empty()),
    }
}

/// Whether a request ended because it brought as much as it could.
fn is_request_full(description: &str) -> bool {
    description.contains("MaxBytes") || description.starts_with("Batch Completed")
}

/// A read-only handle to a consumer. Cheap to clone.
#[derive(Clone)]
pub struct Probe {
    bus: Bus,
    stream: String,
    subjects: Vec<String>,
    durable: String,
    is_responsive: Arc<AtomicBool>,
    failure: ConsumerFailure,
}

/// Messages on the stream that wait for a consumer or are being handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnhandledMessages {
    /// The number of these messages.
    pub messages: u64,
    /// The time at which the oldest of them was stored; `None` if there are none.
    pub oldest: Option<Timestamp>,
}

/// The position up to which a consumer has acknowledged everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerAckFloor {
    /// All messages up to this sequence are acknowledged.
    pub sequence: u64,
    /// The consumer's current subjects; empty for all of the stream.
    pub subjects: Vec<String>,
    /// Messages up to this sequence may have been skipped while the consumer had other subjects; 0
    /// for none.
    pub skipped_up_to: u64,
}

impl Probe {
    /// Whether the server has an active subscriber for the consumer: it answered our request, or
    /// holds an open one.
    pub async fn is_seen_by_server(&self) -> Result<bool> {
        Ok(self.is_responsive.load(Ordering::Relaxed) || self.backlog().await?.waiting > 0)
    }

    /// The state of the consumer.
    pub async fn consumer_state(&self) -> Result<ConsumerState> {
        if let Some(info) = self.bus.consumer_info(&self.stream, &self.durable).await? {
            return Ok(if info.paused {
                ConsumerState::Paused(info.pause_remaining)
            } else {
                ConsumerState::Active
            });
        }
        if self.bus.stream(&self.stream).await?.is_none() {
            return Ok(ConsumerState::Missing(format!(
                "the stream {} does not exist",
                self.stream
            )));
        }
        let failure = self
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        Ok(ConsumerState::Missing(failure.unwrap_or_else(|| {
            format!("its consumer {} is gone", self.durable)
        })))
    }

    /// The unacknowledged messages. The oldest of them is the first message for this consumer above
    /// the ack floor.
    pub async fn unhandled(&self) -> Result<UnhandledMessages> {
        let info = self.info().await?;
        let messages = info.num_pending + info.num_ack_pending as u64;
        let oldest = match messages {
            0 => None,
            _ => {
                self.bus
                    .first_stored_at(
                        &self.stream,
                        &self.subjects,
                        info.ack_floor.stream_sequence + 1,
                    )
                    .await?
            }
        };
        Ok(UnhandledMessages { messages, oldest })
    }

    /// The ack floor of the consumer; `None` if the consumer does not exist.
    pub async fn ack_floor(&self) -> Result<Option<ConsumerAckFloor>> {
        let Some(info) = self.bus.consumer_info(&self.stream, &self.durable).await? else {
            return Ok(None);
        };
        Ok(Some(ConsumerAckFloor {
            sequence: info.ack_floor.stream_sequence,
            subjects: filters(&info),
            skipped_up_to: skipped_up_to(&info),
        }))
    }

    async fn info(&self) -> Result<Info> {
        self.bus
            .consumer_info(&self.stream, &self.durable)
            .await?
            .context("query the consumer: it does not exist")
    }

    /// The current counters of the consumer.
    ///
    /// # Errors
    /// The server does not answer, or the consumer does not exist.
    pub async fn backlog(&self) -> Result<Backlog> {
        let info = self.info().await?;
        Ok(Backlog {
            pending: info.num_pending,
            ack_pending: info.num_ack_pending as u64,
            waiting: info.num_waiting as u64,
            delivered: info.delivered.stream_sequence,
        })
    }
}

impl Receipt {
    /// Acknowledges the message, which requires proof that the database holds its final outcome.
    /// Sent at once without waiting for the server: if it is lost, the message is redelivered and
    /// found in the inbox.
    pub async fn ack(self, _proof: &Settled) -> Result<()> {
        // Acknowledgements address a stream by name and sequence. This one would settle a message
        // of the recreated stream.
        if self.stream_created != self.current_stream_created.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.reply
            .settle(AckKind::Ack)
            .await
            .context("acknowledge a message")
    }

    /// Requests redelivery after a delay. Without a delay the server would redeliver at once.
    pub async fn nack(self, after: Duration) -> Result<()> {
        let after = after.max(Duration::from_millis(1));
        self.reply
            .settle(AckKind::Nak(Some(after)))
            .await
            .context("nack a message")
    }

    /// A handle that extends the time to acknowledge this message.
    pub fn progress(&self) -> Progress {
        self.reply.clone()
    }
}

impl Progress {
    fn new(client: &async_nats::Client, reply: Subject) -> Self {
        Progress {
            client: client.clone(),
            reply,
            is_settled: Arc::default(),
        }
    }

    /// Restarts `ack_wait`, unless the message was settled or nacked.
    pub async fn send(&self) -> Result<()> {
        let is_settled = self.is_settled.lock().await;
        if *is_settled {
            Ok(())
        } else {
            self.send_ack(AckKind::Progress)
                .await
                .context("report progress")
        }
    }

    /// Settles this delivery; later progress reports are not sent.
    async fn settle(&self, kind: AckKind) -> Result<()> {
        let mut is_settled = self.is_settled.lock().await;
        *is_settled = true;
        self.send_ack(kind).await
    }

    async fn send_ack(&self, kind: AckKind) -> Result<()> {
        let sent = self.client.publish(self.reply.clone(), kind.into());
        Ok(tokio::time::timeout(SEND_TIMEOUT, sent)
            .await
            .context("queue an acknowledgement while NATS is unreachable")??)
    }
}

/// Headers by name, without those that only concern the transport.
pub(super) fn headers(map: Option<&async_nats::HeaderMap>) -> Headers {
    let Some(map) = map else {
        return Headers::new();
    };
    let mut headers: Headers = map
        .iter()
        .filter(|(name, _)| !is_transport_header(name.as_ref()))
        .flat_map(|(name, values)| {
            values
                .iter()
                .map(move |value| (name.to_string(), value.to_string()))
        })
        .collect();
    // The client library keeps no order between names, so they are sorted.
    headers.sort_by(|(one, _), (other, _)| one.cmp(other));
    headers
}

fn is_transport_header(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["nats-batch-", "nats-schedule", "nats-expected-"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}
