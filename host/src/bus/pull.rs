//! Taking messages from a stream: a durable pull consumer, one open request at a time, acks by hand.
//!
//! The requests are our own rather than the client library's streams of messages: those buffer far more than a host can
//! handle within `ack_wait`, or sleep through what follows a heartbeat.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::jetstream::consumer::pull::{BatchConfig, Config};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, Info};
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

/// How long one pull request stays open on the server. A host that froze is sent messages until then, each of which comes
/// again to another one only after `ack_wait`.
const REQUEST_OPEN: Duration = Duration::from_secs(4);

/// How often the server says that an open request is still open while it has no message for it.
const HEARTBEAT: Duration = Duration::from_millis(1500);

/// After how long without a word about an open request it counts as lost.
const SILENCE_MAX: Duration = Duration::from_secs(11);

/// How many bytes one pull request may bring; more when the server takes larger messages.
const REQUEST_BYTES: usize = 16 << 20;

/// How long an acknowledgement may take to find capacity in the client's buffer, which is full only in an outage.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// What to take, and under which name the server remembers how far it got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    pub stream: String,
    /// The durable consumer's name.
    pub durable: String,
    /// Wildcards allowed; empty for all of the stream.
    pub subjects: Vec<String>,
    /// After how long without a sign of life a message is delivered again.
    pub ack_wait: Duration,
    /// How many messages may be out at the same time, over all hosts.
    pub max_ack_pending: i64,
    pub metadata: HashMap<String, String>,
}

/// How long it may take until what is on its way is received.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The taking end of a subscription.
pub struct PullConsumer {
    bus: Bus,
    subscription: Subscription,
    deliveries: Connection,
    stream_created: Timestamp,
    /// The same for receipts, in microseconds since the epoch.
    current_stream_created: Arc<AtomicI64>,
    /// The requests are numbered; request 7 is answered at `{inbox}.7`.
    inbox: String,
    answers: Listener,
    requests: u64,
    request: Option<Request>,
    /// A message that was taken and is yet to be returned.
    buffered: Option<DeliveredMessage>,
    /// Whether the consumer has to be looked after before the next request.
    is_suspect: bool,
    /// Whether nothing more is asked for.
    is_draining: bool,
    backoff: Backoff,
    /// Whether the server said anything about a request since there was last a doubt.
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

/// A message, and what to do with it.
pub struct DeliveredMessage {
    pub message: Message,
    /// Why it cannot be given to a worker as it is; its event id is then a stand-in.
    pub unusable: Option<(Reason, String)>,
    /// How often it was delivered, this time included.
    pub delivered: u64,
    pub receipt: Receipt,
}

/// The right to settle one delivered message.
pub struct Receipt {
    reply: Progress,
    /// When the stream was made that the message stood on, and when the one was made that is there now, in microseconds
    /// since the epoch.
    stream_created: i64,
    current_stream_created: Arc<AtomicI64>,
}

/// Tells the server that a message is being worked on. Cheap to clone.
#[derive(Clone)]
pub struct Progress {
    client: async_nats::Client,
    reply: Subject,
    /// Whether the message was settled or given back. A sign of life after that would undo it: the server would wait anew
    /// before it delivers the message again, and later ones of its key would overtake it.
    is_settled: Arc<Mutex<bool>>,
}

/// What a consumer still has before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Messages never delivered.
    pub pending: u64,
    /// Messages delivered and not acknowledged.
    pub ack_pending: u64,
    /// Open pull requests, of all hosts.
    pub waiting: u64,
    /// The highest sequence that was delivered so far.
    pub delivered: u64,
}

/// How a consumer stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ConsumerState {
    #[default]
    Active,
    /// An operator paused it, for so long.
    Paused(Option<Duration>),
    /// It is not there, or its stream is not, for this reason.
    Missing(String),
}

/// Why a consumer is not there, as long as it is not.
type ConsumerFailure = Arc<std::sync::Mutex<Option<String>>>;

impl Bus {
    /// Makes or updates the durable consumer. It is never deleted: it holds the place on the stream.
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

    /// A way to look at a durable consumer, whether or not anybody takes messages here.
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

    /// Makes or updates the consumer; returns when its stream was made.
    async fn ensure_consumer(&self, subscription: &Subscription) -> Result<Timestamp> {
        let stream = self
            .context
            .get_stream(&subscription.stream)
            .await
            .with_context(|| format!("open the stream {}", subscription.stream))?;
        let created = timestamp(stream.cached_info().created)?;
        // From where a consumer began cannot be changed.
        let own = self
            .own_consumer(&subscription.stream, &subscription.durable)
            .await?;
        let began = own.map_or(DeliverPolicy::All, |info| info.config.deliver_policy);
        self.create_consumer(subscription, began).await?;
        Ok(created)
    }

    /// Gives a subscription another place on its stream: what stands from this sequence on comes again.
    pub async fn rewind(&self, subscription: &Subscription, from: u64) -> Result<()> {
        self.retire_consumer(&subscription.stream, &subscription.durable)
            .await?;
        let from = match from {
            0 | 1 => DeliverPolicy::All,
            start_sequence => DeliverPolicy::ByStartSequence { start_sequence },
        };
        self.create_consumer(subscription, from).await
    }

    /// What the server says of a consumer; none when it, or its stream, is not there.
    pub(super) async fn consumer_info(&self, stream: &str, durable: &str) -> Result<Option<Info>> {
        let context = || format!("look at the consumer {durable} on {stream}");
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
        let mut config = Config {
            deliver_policy: from,
            ..config(subscription)
        };
        self.set_owner(&mut config.metadata);
        let stream = self.context.get_stream_no_info(&subscription.stream).await;
        let stream = stream.with_context(|| format!("open the stream {}", subscription.stream))?;
        create_within_limits(&stream, config)
            .await
            .with_context(|| {
                format!(
                    "make the consumer {} on {}",
                    subscription.durable, subscription.stream
                )
            })?;
        Ok(())
    }

    /// Tries whether the server would make, or change, the consumer of a subscription. Nothing is changed.
    ///
    /// # Errors
    /// Why the worker could never run. No error when the stream is not there.
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
        let stream_config = &stream.cached_info().config;
        if stream_config
            .consumer_limits
            .as_ref()
            .is_some_and(|limits| !limits.inactive_threshold.is_zero())
        {
            return Err(anyhow::anyhow!(
                "the stream {name} removes consumers that are not used for a while: a worker that is stopped would lose its \
                 place"
            ))
            .hint(format!("take `inactive_threshold` out of the consumer limits of {name}: nats stream edit {name}"));
        }
        let own = self
            .own_consumer(name, durable)
            .await?
            .map(|info| filters(&info));
        if own.as_ref() == Some(&subscription.subjects) {
            return Ok(());
        }
        if stream_config.retention == RetentionPolicy::WorkQueue {
            return self.check_queue_overlap(subscription).await;
        }
        // One that goes away by itself, with all that the server may object to.
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
            // The consumer that is there needs no further place.
            Err(error) if own.is_some() && exceeds_consumer_limit(&error) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("try the consumer {durable} on {name}"))
            }
        }
    }

    /// A work queue gives each message to one consumer: looks for another one that takes some of the same.
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
                    "the stream {name} is a work queue, which gives each message to one consumer, and its consumer {} takes \
                     {takes}",
                    info.name
                ))
                .hint("give the worker subjects that no other consumer takes, or read another stream");
            }
        }
        Ok(())
    }
}

/// For how long a consumer that was made to try it stays, should this process die meanwhile.
const TRIAL_INACTIVE_THRESHOLD: Duration = Duration::from_secs(10);

/// Makes or updates a consumer, with fewer messages under way if stream, account or server allow no more. Returns its name.
async fn create_within_limits<I>(
    stream: &async_nats::jetstream::stream::Stream<I>,
    mut config: Config,
) -> Result<String, ConsumerError> {
    loop {
        match stream.create_consumer(config.clone()).await {
            Ok(made) => return Ok(made.cached_info().name.clone()),
            // The limit itself stands in the text of the error alone.
            Err(error) if exceeds_ack_pending_limit(&error) && config.max_ack_pending > 1 => {
                config.max_ack_pending /= 2
            }
            Err(error) => return Err(error),
        }
    }
}

fn exceeds_ack_pending_limit(error: &ConsumerError) -> bool {
    has_code(error, ErrorCode::CONSUMER_MAX_PENDING_ACK_EXCESS)
}

fn exceeds_consumer_limit(error: &ConsumerError) -> bool {
    has_code(error, ErrorCode::MAXIMUM_CONSUMERS_LIMIT)
}

fn has_code(error: &ConsumerError, code: ErrorCode) -> bool {
    matches!(error.kind(), ConsumerErrorKind::JetStream(answer) if answer.error_code() == code)
}

/// The subjects that a consumer takes; empty for all of its stream.
fn filters(info: &Info) -> Vec<String> {
    let mut subjects = info.config.filter_subjects.clone();
    if !info.config.filter_subject.is_empty() {
        subjects.push(info.config.filter_subject.clone());
    }
    subjects
}

fn config(subscription: &Subscription) -> Config {
    // Servers show one subject and several in different fields; each in its own is an update that changes nothing.
    let (filter_subject, filter_subjects) = match subscription.subjects.as_slice() {
        [subject] => (subject.clone(), Vec::new()),
        subjects => (String::new(), subjects.to_vec()),
    };
    Config {
        durable_name: Some(subscription.durable.clone()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: subscription.ack_wait,
        // We count attempts, in the database: a broker that gives up would lose the message.
        max_deliver: -1,
        filter_subject,
        filter_subjects,
        max_ack_pending: subscription.max_ack_pending,
        metadata: subscription.metadata.clone(),
        ..Config::default()
    }
}

impl PullConsumer {
    /// The next message. Keeps one request of at most `capacity` messages open. A failure of the broker is waited out: after
    /// a reconnect, a silence, or when consumer or stream are gone, it asks again by itself. An error only when the
    /// connection was given up. The future may be dropped at any time; no message is lost by that.
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

    /// Asks for no more, and returns what the server had sent before, one message at a time; none when that was all. Left
    /// there, those messages would come again only after `ack_wait`, behind others of their key.
    pub async fn drain(&mut self) -> Option<DeliveredMessage> {
        if !self.is_draining {
            self.is_draining = true;
            self.request = None;
            // Ends `answers` once what is on its way is received.
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

    /// Waits for one event: a word of the server about the request, a new connection, or too long a silence.
    async fn next_event(&mut self, capacity: usize) -> Result<()> {
        let silence_deadline = match &self.request {
            Some(request) => request.last_activity + SILENCE_MAX,
            None => self.open_request(capacity)? + SILENCE_MAX,
        };
        tokio::select! {
            // What is received comes first: it tells that the request is alive.
            biased;
            answer = self.answers.next() => self.handle_incoming(answer.context("take messages: the connection to NATS is closed")?),
            // The server knows nothing of requests made on a connection that is gone.
            Ok(()) = self.connections.changed() => self.mark_suspect("there is a new connection to NATS"),
            () = tokio::time::sleep_until(silence_deadline) => self.mark_suspect("the server is silent about a pull request"),
        }
        Ok(())
    }

    /// Opens a request, now.
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
        let body = serde_json::to_vec(&batch).context("write a request for messages")?;
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
        // A publisher may have stored a status of its own: what has a place on a stream is a message.
        match self.bus.position(answer.reply.as_deref()) {
            Ok(Some(position)) if is_delete_marker(&answer.headers, &answer.body) => {
                self.terminate_marker(position)
            }
            Ok(Some(position)) => self.buffer(answer, position),
            Ok(None) => self.handle_request_status(&answer),
            // It stays unacknowledged and comes again.
            Err(error) => tracing::warn!(
                "a message from {} makes no sense: {error:#}",
                self.subscription.stream
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
                // The next message is larger than what this request has remaining.
                StatusCode::REQUEST_TERMINATED if is_request_full(&block.description) => {
                    self.request = None
                }
                status => self.mark_suspect(&format!("{status} {}", block.description)),
            }
        }
    }

    /// The request brought one message.
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

    /// Ends a delete marker, which is no event: the server wrote it, no publisher did.
    fn terminate_marker(&mut self, position: MessagePosition) {
        self.count_message();
        let progress = Progress::new(&self.bus.client, Subject::from(position.reply));
        tokio::spawn(async move {
            // If it gets lost, the marker comes again.
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
        let decoded = decode_message(&message);
        let derived_event_id =
            || derived_event_id(&origin.stream, origin.stored_at, origin.sequence);
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
        DeliveredMessage {
            message: Message {
                event_id,
                subject: decoded.subject,
                headers: decoded.headers,
                body: message.body,
                origin: Some(origin),
                redriven: None,
            },
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
            "consumer {} on {}: {why}",
            self.subscription.durable,
            self.subscription.stream
        );
        self.is_responsive.store(false, Ordering::Relaxed);
        self.request = None;
        self.is_suspect = true;
    }

    /// Waits until the consumer is there, making it if need be, and learns anew when the stream was made.
    async fn restore_consumer(&mut self) {
        loop {
            if self.backoff.failures() > 0 {
                self.back_off().await;
            }
            // Counted now: whatever comes of it, the next doubt must not find us in a tight loop.
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
                        tracing::warn!("no messages for {} yet: {why}", self.subscription.durable);
                    }
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                }
            }
        }
    }

    /// Waits for a while, or until there is a new connection.
    async fn back_off(&mut self) {
        let mut backoff = self.backoff.clone();
        tokio::select! {
            Ok(()) = self.connections.changed() => {}
            () = tokio::time::sleep(backoff.next(rand::random())) => {}
        }
    }

    /// A way to look at the consumer from elsewhere.
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

/// A message in the form that handlers are given.
struct DecodedMessage {
    subject: String,
    headers: Headers,
    /// Why it cannot be given to one; the bytes that cannot be read are then in headers of their own.
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

/// Looks at a consumer. Cheap to clone.
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
    pub messages: u64,
    /// When the oldest of them was stored; none when there is none.
    pub oldest: Option<Timestamp>,
}

/// What a consumer has acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerAckFloor {
    /// When the consumer was created.
    pub created: Timestamp,
    /// Everything up to here.
    pub sequence: u64,
    /// The subjects the consumer takes now; empty for all of the stream.
    pub subjects: Vec<String>,
}

impl Probe {
    /// Whether the server knows that somebody takes messages here: it answered our request, or holds one open.
    pub async fn is_seen_by_server(&self) -> Result<bool> {
        Ok(self.is_responsive.load(Ordering::Relaxed) || self.backlog().await?.waiting > 0)
    }

    /// How the consumer stands.
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

    /// What is not acknowledged. The oldest of it is the first message for this consumer above the place up to which
    /// everything is.
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

    /// Up to where everything is acknowledged; none when there is no consumer.
    pub async fn ack_floor(&self) -> Result<Option<ConsumerAckFloor>> {
        let Some(info) = self.bus.consumer_info(&self.stream, &self.durable).await? else {
            return Ok(None);
        };
        let (created, sequence) = (timestamp(info.created)?, info.ack_floor.stream_sequence);
        Ok(Some(ConsumerAckFloor {
            created,
            sequence,
            subjects: filters(&info),
        }))
    }

    async fn info(&self) -> Result<Info> {
        self.bus
            .consumer_info(&self.stream, &self.durable)
            .await?
            .context("look at the consumer: there is none")
    }

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
    /// Acknowledges: only with the proof that the database holds a final word on the message. Sent at once, and not
    /// waited for: if it gets lost, the message comes again and meets the inbox.
    pub async fn ack(self, _proof: &Settled) -> Result<()> {
        // Acknowledgements go by name and sequence: this one would settle a message of the stream made since.
        if self.stream_created != self.current_stream_created.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.reply
            .settle(AckKind::Ack)
            .await
            .context("acknowledge a message")
    }

    /// Asks for the message again after a while. Always with a delay: without one the server delivers it at once.
    pub async fn nack(self, after: Duration) -> Result<()> {
        let after = after.max(Duration::from_millis(1));
        self.reply
            .settle(AckKind::Nak(Some(after)))
            .await
            .context("ask for a message again")
    }

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

    /// Starts the wait for the acknowledgement anew, unless the message was settled or given back.
    pub async fn send(&self) -> Result<()> {
        let is_settled = self.is_settled.lock().await;
        if *is_settled {
            Ok(())
        } else {
            self.send_ack(AckKind::Progress)
                .await
                .context("tell of progress")
        }
    }

    /// The last word on this delivery.
    async fn settle(&self, kind: AckKind) -> Result<()> {
        let mut is_settled = self.is_settled.lock().await;
        *is_settled = true;
        self.send_ack(kind).await
    }

    async fn send_ack(&self, kind: AckKind) -> Result<()> {
        let sent = self.client.publish(self.reply.clone(), kind.into());
        Ok(tokio::time::timeout(SEND_TIMEOUT, sent)
            .await
            .context("find capacity while NATS is out of reach")??)
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
    // The client keeps no order between names; ours is at least always the same.
    headers.sort_by(|(one, _), (other, _)| one.cmp(other));
    headers
}

fn is_transport_header(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["nats-batch-", "nats-schedule", "nats-expected-"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}
