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
use super::connection::{Connection, Listener, Message as Sent};
use super::readable::{is_marker, read_block, read_subject};
use super::requests::{Place, next_subject};
use super::streams::timestamp;
use super::wire::Arrived;
use crate::fault;
use crate::model::hint::WithHint;
use crate::model::message::{Headers, InvalidEventId, Message, Origin, event_id, place_id};
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

/// How long an acknowledgement may take to find room in the client's buffer, which is full only in an outage.
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

/// How long it may take until what is on its way has arrived.
const REST_WITHIN: Duration = Duration::from_secs(1);

/// The taking end of a subscription.
pub struct Pull {
    bus: Bus,
    subscription: Subscription,
    deliveries: Connection,
    stream_created: Timestamp,
    /// The same for receipts, in microseconds since the epoch.
    stream_now: Arc<AtomicI64>,
    /// Requests are numbered; request 7 is answered at `{inbox}.7`.
    inbox: String,
    answers: Listener,
    requests: u64,
    request: Option<Request>,
    /// A message that was taken and is yet to be returned.
    held: Option<Pulled>,
    /// Whether the consumer has to be looked after before the next request.
    in_doubt: bool,
    /// Whether nothing more is asked for.
    resting: bool,
    backoff: Backoff,
    /// Whether the server said anything about a request since there was last a doubt.
    heard: Arc<AtomicBool>,
    connections: watch::Receiver<u64>,
    trouble: Trouble,
}

/// An open pull request.
struct Request {
    answered_at: String,
    /// How many messages it can still bring.
    left: usize,
    last_word: Instant,
}

/// A message, and what to do with it.
pub struct Pulled {
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
    stream_now: Arc<AtomicI64>,
}

/// Tells the server that a message is being worked on. Cheap to clone.
#[derive(Clone)]
pub struct Progress {
    client: async_nats::Client,
    reply: Subject,
    /// Whether the message was settled or given back. A sign of life after that would undo it: the server would wait anew
    /// before it delivers the message again, and later ones of its key would overtake it.
    is_over: Arc<Mutex<bool>>,
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
pub enum Standing {
    #[default]
    Serving,
    /// An operator paused it, for so long.
    Paused(Option<Duration>),
    /// It is not there, or its stream is not, for this reason.
    Gone(String),
}

/// Why a consumer is not there, as long as it is not.
type Trouble = Arc<std::sync::Mutex<Option<String>>>;

impl Bus {
    /// Makes or updates the durable consumer. It is never deleted: it holds the place on the stream.
    pub async fn subscribe(&self, subscription: &Subscription) -> Result<Pull> {
        let deliveries = self.deliveries().await?;
        let mut connections = deliveries.connections();
        connections.mark_unchanged();
        let stream_created = self.ensure_consumer(subscription).await?;
        let inbox = self.client.new_inbox();
        let answers = deliveries.listen(&format!("{inbox}.*"));
        Ok(Pull {
            bus: self.clone(),
            subscription: subscription.clone(),
            deliveries,
            stream_created,
            stream_now: Arc::new(AtomicI64::new(stream_created.as_microsecond())),
            inbox,
            answers,
            requests: 0,
            request: None,
            held: None,
            in_doubt: false,
            resting: false,
            backoff: Backoff::default(),
            heard: Arc::default(),
            trouble: Arc::default(),
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
            heard: Arc::default(),
            trouble: Arc::default(),
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
        let own = self.own_consumer(&subscription.stream, &subscription.durable).await?;
        let began = own.map_or(DeliverPolicy::All, |info| info.config.deliver_policy);
        self.make_consumer(subscription, began).await?;
        Ok(created)
    }

    /// Gives a subscription another place on its stream: what stands from this sequence on comes again.
    pub async fn rewind(&self, subscription: &Subscription, from: u64) -> Result<()> {
        self.retire_consumer(&subscription.stream, &subscription.durable).await?;
        let from = match from {
            0 | 1 => DeliverPolicy::All,
            start_sequence => DeliverPolicy::ByStartSequence { start_sequence },
        };
        self.make_consumer(subscription, from).await
    }

    /// What the server says of a consumer; none when it, or its stream, is not there.
    pub(super) async fn consumer_info(&self, stream: &str, durable: &str) -> Result<Option<Info>> {
        let doing = || format!("look at the consumer {durable} on {stream}");
        let of_stream = self.context.get_stream_no_info(stream).await.with_context(doing)?;
        match of_stream.consumer_info(durable).await {
            Ok(info) => Ok(Some(info)),
            Err(error) => match error.kind() {
                ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound => Ok(None),
                _ => Err(error).with_context(doing),
            },
        }
    }

    async fn make_consumer(&self, subscription: &Subscription, from: DeliverPolicy) -> Result<()> {
        let mut config = Config { deliver_policy: from, ..config(subscription) };
        self.mark_owner(&mut config.metadata);
        let stream = self.context.get_stream_no_info(&subscription.stream).await;
        let stream = stream.with_context(|| format!("open the stream {}", subscription.stream))?;
        create_within_limits(&stream, config)
            .await
            .with_context(|| format!("make the consumer {} on {}", subscription.durable, subscription.stream))?;
        Ok(())
    }

    /// Tries whether the server would make, or change, the consumer of a subscription. Nothing is changed.
    ///
    /// # Errors
    /// Why the worker could never run. No error when the stream is not there.
    pub async fn try_subscription(&self, subscription: &Subscription) -> Result<()> {
        let Subscription { stream: name, durable, .. } = subscription;
        if self.stream(name).await?.is_none() {
            return Ok(());
        }
        let stream = self.context.get_stream(name).await.with_context(|| format!("open the stream {name}"))?;
        let of_stream = &stream.cached_info().config;
        if of_stream.consumer_limits.as_ref().is_some_and(|limits| !limits.inactive_threshold.is_zero()) {
            return Err(anyhow::anyhow!(
                "the stream {name} removes consumers that are not used for a while: a worker that is stopped would lose its \
                 place"
            ))
            .hint(format!("take `inactive_threshold` out of the consumer limits of {name}: nats stream edit {name}"));
        }
        let own = self.own_consumer(name, durable).await?.map(|info| filters(&info));
        if own.as_ref() == Some(&subscription.subjects) {
            return Ok(());
        }
        if of_stream.retention == RetentionPolicy::WorkQueue {
            return self.find_rival(subscription).await;
        }
        // One that goes away by itself, with all that the server may object to.
        let trial = Config {
            durable_name: None,
            metadata: HashMap::new(),
            inactive_threshold: TRIAL_KEPT,
            memory_storage: true,
            ..config(subscription)
        };
        match create_within_limits(&stream, trial).await {
            Ok(trial) => {
                let _ = stream.delete_consumer(&trial).await;
                Ok(())
            }
            // The consumer that is there needs no further place.
            Err(error) if own.is_some() && is_full_of_consumers(&error) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("try the consumer {durable} on {name}")),
        }
    }

    /// A work queue gives each message to one consumer: looks for another one that takes some of the same.
    async fn find_rival(&self, subscription: &Subscription) -> Result<()> {
        let Subscription { stream: name, durable, subjects, .. } = subscription;
        let stream = self.context.get_stream_no_info(name).await.with_context(|| format!("open the stream {name}"))?;
        let mut consumers = stream.consumers();
        while let Some(info) = consumers.next().await {
            let info = info.with_context(|| format!("list the consumers of {name}"))?;
            let theirs = filters(&info);
            let meets = |one: &String| subjects.iter().any(|other| subject::overlaps(one, other));
            let is_rival = theirs.is_empty() || subjects.is_empty() || theirs.iter().any(meets);
            if info.name != *durable && is_rival {
                let takes = if theirs.is_empty() { "everything".to_owned() } else { theirs.join(", ") };
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
const TRIAL_KEPT: Duration = Duration::from_secs(10);

/// Makes or updates a consumer, with fewer messages under way if stream, account or server allow no more. Returns its name.
async fn create_within_limits<I>(
    stream: &async_nats::jetstream::stream::Stream<I>,
    mut config: Config,
) -> Result<String, ConsumerError> {
    loop {
        match stream.create_consumer(config.clone()).await {
            Ok(made) => return Ok(made.cached_info().name.clone()),
            // The limit itself stands in the text of the error alone.
            Err(error) if is_beyond_ack_pending(&error) && config.max_ack_pending > 1 => config.max_ack_pending /= 2,
            Err(error) => return Err(error),
        }
    }
}

fn is_beyond_ack_pending(error: &ConsumerError) -> bool {
    has_code(error, ErrorCode::CONSUMER_MAX_PENDING_ACK_EXCESS)
}

fn is_full_of_consumers(error: &ConsumerError) -> bool {
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

impl Pull {
    /// The next message. Keeps one request of at most `room` messages open. Trouble with the broker is waited out: after
    /// a reconnect, a silence, or when consumer or stream are gone, it asks again by itself. An error only when the
    /// connection was given up. The future may be dropped at any time; no message is lost by that.
    pub async fn next(&mut self, room: usize) -> Result<Pulled> {
        loop {
            if self.in_doubt {
                self.renew().await;
            }
            if self.held.is_none() {
                self.step(room).await?;
            }
            if let Some(pulled) = self.held.take() {
                if fault::mutant(fault::ACK_BEFORE_COMMIT) {
                    pulled.receipt.reply.reply(AckKind::Ack).await?;
                }
                return Ok(pulled);
            }
        }
    }

    /// Asks for no more, and returns what the server had sent before, one message at a time; none when that was all. Left
    /// there, those messages would come again only after `ack_wait`, behind others of their key.
    pub async fn rest(&mut self) -> Option<Pulled> {
        if !self.resting {
            self.resting = true;
            self.request = None;
            // Ends `answers` once what is on its way has arrived.
            self.answers.drain();
        }
        loop {
            if let Some(held) = self.held.take() {
                return Some(held);
            }
            match tokio::time::timeout(REST_WITHIN, self.answers.next()).await {
                Ok(Some(answer)) => self.hear(answer),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Waits for one event: a word of the server about the request, a new connection, or too long a silence.
    async fn step(&mut self, room: usize) -> Result<()> {
        let silent_from = match &self.request {
            Some(request) => request.last_word + SILENCE_MAX,
            None => self.ask(room)? + SILENCE_MAX,
        };
        tokio::select! {
            // What has arrived comes first: it tells that the request is alive.
            biased;
            answer = self.answers.next() => self.hear(answer.context("take messages: the connection to NATS is closed")?),
            // The server knows nothing of requests made on a connection that is gone.
            Ok(()) = self.connections.changed() => self.doubt("there is a new connection to NATS"),
            () = tokio::time::sleep_until(silent_from) => self.doubt("the server is silent about a pull request"),
        }
        Ok(())
    }

    /// Opens a request, now.
    fn ask(&mut self, room: usize) -> Result<Instant> {
        let now = Instant::now();
        let left = room.max(1);
        let answered_at = format!("{}.{}", self.inbox, self.requests);
        let batch = BatchConfig {
            batch: left,
            expires: Some(REQUEST_OPEN),
            idle_heartbeat: HEARTBEAT,
            max_bytes: REQUEST_BYTES.max(self.bus.max_payload() * 2),
            ..BatchConfig::default()
        };
        let body = serde_json::to_vec(&batch).context("write a request for messages")?;
        self.deliveries.publish(Sent {
            over: *self.connections.borrow(),
            subject: next_subject(&self.bus, &self.subscription.stream, &self.subscription.durable),
            reply: answered_at.clone(),
            headers: Vec::new(),
            body: body.into(),
        });
        self.requests += 1;
        self.request = Some(Request { answered_at, left, last_word: now });
        Ok(now)
    }

    fn hear(&mut self, answer: Arrived) {
        // A publisher may have stored a status of its own: what has a place on a stream is a message.
        match self.bus.place(answer.reply.as_deref()) {
            Ok(Some(place)) if is_marker(&answer.headers, &answer.body) => self.pass_over(place),
            Ok(Some(place)) => self.take(answer, place),
            Ok(None) => self.hear_of_request(&answer),
            // It stays unacknowledged and comes again.
            Err(error) => tracing::warn!("a message from {} makes no sense: {error:#}", self.subscription.stream),
        }
    }

    fn hear_of_request(&mut self, answer: &Arrived) {
        let Ok(block) = read_block(&answer.headers) else { return };
        if let (Some(status), Some(request)) = (block.status, &mut self.request)
            && request.answered_at.as_bytes() == answer.subject.as_ref()
        {
            request.last_word = Instant::now();
            match status {
                StatusCode::IDLE_HEARTBEAT => self.sound(),
                StatusCode::TIMEOUT | StatusCode::NOT_FOUND => self.request = None,
                // The next message is larger than what this request has left.
                StatusCode::REQUEST_TERMINATED if is_full(&block.description) => self.request = None,
                status => self.doubt(&format!("{status} {}", block.description)),
            }
        }
    }

    /// The request brought one message.
    fn count_one(&mut self) {
        self.sound();
        if let Some(request) = &mut self.request {
            request.last_word = Instant::now();
            request.left = request.left.saturating_sub(1);
        }
        self.request.take_if(|request| request.left == 0);
    }

    fn take(&mut self, message: Arrived, place: Place) {
        self.count_one();
        self.held = Some(self.open(message, place));
    }

    /// Ends a delete marker, which is no event: the server wrote it, no publisher did.
    fn pass_over(&mut self, place: Place) {
        self.count_one();
        let progress = Progress::new(&self.bus.client, Subject::from(place.reply));
        tokio::spawn(async move {
            // If it gets lost, the marker comes again.
            let _ = progress.end(AckKind::Term).await;
        });
    }

    fn open(&self, message: Arrived, place: Place) -> Pulled {
        let origin = Origin { stream: place.stream, sequence: place.sequence, stored_at: place.stored_at };
        let readable = readable(&message);
        let place_id = || place_id(&origin.stream, origin.stored_at, origin.sequence);
        let (event_id, unusable) = match readable.why {
            Some(why) => (place_id(), Some((Reason::Unreadable, why))),
            None => match event_id(
                &readable.headers,
                Some(&message.body),
                &origin.stream,
                origin.stored_at,
                origin.sequence,
            ) {
                Ok(id) => (id, None),
                Err(InvalidEventId { stand_in, why }) => (stand_in, Some((Reason::InvalidId, why))),
            },
        };
        Pulled {
            message: Message {
                event_id,
                subject: readable.subject,
                headers: readable.headers,
                body: message.body,
                origin: Some(origin),
                redriven: None,
            },
            unusable,
            delivered: place.delivered,
            receipt: Receipt {
                reply: Progress::new(&self.bus.client, Subject::from(place.reply)),
                stream_created: self.stream_created.as_microsecond(),
                stream_now: Arc::clone(&self.stream_now),
            },
        }
    }

    fn sound(&mut self) {
        self.heard.store(true, Ordering::Relaxed);
        self.backoff.reset();
    }

    fn doubt(&mut self, why: &str) {
        tracing::debug!("consumer {} on {}: {why}", self.subscription.durable, self.subscription.stream);
        self.heard.store(false, Ordering::Relaxed);
        self.request = None;
        self.in_doubt = true;
    }

    /// Waits until the consumer is there, making it if need be, and learns anew when the stream was made.
    async fn renew(&mut self) {
        loop {
            if self.backoff.failures() > 0 {
                self.wait().await;
            }
            // Counted now: whatever comes of it, the next doubt must not find us in a tight loop.
            let first = self.backoff.failures() == 0;
            let _ = self.backoff.next(0.0);
            self.connections.mark_unchanged();
            match self.bus.ensure_consumer(&self.subscription).await {
                Ok(created) => {
                    self.stream_created = created;
                    self.stream_now.store(created.as_microsecond(), Ordering::Relaxed);
                    self.in_doubt = false;
                    *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return;
                }
                Err(error) => {
                    let why = format!("{error:#}");
                    if first {
                        tracing::warn!("no messages for {} yet: {why}", self.subscription.durable);
                    }
                    *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                }
            }
        }
    }

    /// Waits for a while, or until there is a new connection.
    async fn wait(&mut self) {
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
            heard: Arc::clone(&self.heard),
            trouble: Arc::clone(&self.trouble),
        }
    }
}

/// A message in the form that handlers are given.
struct Readable {
    subject: String,
    headers: Headers,
    /// Why it cannot be given to one; the bytes that cannot be read are then in headers of their own.
    why: Option<String>,
}

fn readable(message: &Arrived) -> Readable {
    let (subject, bad_subject) = match read_subject(&message.subject) {
        Ok(subject) => (subject, None),
        Err((shown, why)) => (shown, Some(why)),
    };
    let (mut headers, bad_headers) = match read_block(&message.headers) {
        Ok(block) => (headers(Some(&block.headers)), None),
        Err(why) => (Headers::new(), Some(why)),
    };
    let mut keep = |name: &str, bytes: &[u8]| headers.push((name.to_owned(), bytes.escape_ascii().to_string()));
    if bad_headers.is_some() {
        keep("Oncely-Unreadable-Headers", &message.headers);
    }
    if bad_subject.is_some() {
        keep("Oncely-Unreadable-Subject", &message.subject);
    }
    let why: Vec<String> = bad_subject.into_iter().chain(bad_headers).collect();
    Readable { subject, headers, why: Some(why.join("; ")).filter(|why| !why.is_empty()) }
}

/// Whether a request ended because it brought as much as it could.
fn is_full(description: &str) -> bool {
    description.contains("MaxBytes") || description.starts_with("Batch Completed")
}

/// Looks at a consumer. Cheap to clone.
#[derive(Clone)]
pub struct Probe {
    bus: Bus,
    stream: String,
    subjects: Vec<String>,
    durable: String,
    heard: Arc<AtomicBool>,
    trouble: Trouble,
}

/// Messages on the stream that wait for a consumer or are being handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unhandled {
    pub messages: u64,
    /// When the oldest of them was stored; none when there is none.
    pub oldest: Option<Timestamp>,
}

/// What a consumer has acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledged {
    /// When the consumer was created.
    pub created: Timestamp,
    /// Everything up to here.
    pub sequence: u64,
    /// The subjects the consumer takes now; empty for all of the stream.
    pub subjects: Vec<String>,
}

impl Probe {
    /// Whether the server knows that somebody takes messages here: it answered our request, or holds one open.
    pub async fn seen_by_server(&self) -> Result<bool> {
        Ok(self.heard.load(Ordering::Relaxed) || self.backlog().await?.waiting > 0)
    }

    /// How the consumer stands.
    pub async fn standing(&self) -> Result<Standing> {
        if let Some(info) = self.bus.consumer_info(&self.stream, &self.durable).await? {
            return Ok(if info.paused { Standing::Paused(info.pause_remaining) } else { Standing::Serving });
        }
        if self.bus.stream(&self.stream).await?.is_none() {
            return Ok(Standing::Gone(format!("the stream {} does not exist", self.stream)));
        }
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Standing::Gone(trouble.unwrap_or_else(|| format!("its consumer {} is gone", self.durable))))
    }

    /// What is not acknowledged. The oldest of it is the first message for this consumer above the place up to which
    /// everything is.
    pub async fn unhandled(&self) -> Result<Unhandled> {
        let info = self.info().await?;
        let messages = info.num_pending + info.num_ack_pending as u64;
        let oldest = match messages {
            0 => None,
            _ => self.bus.first_stored_at(&self.stream, &self.subjects, info.ack_floor.stream_sequence + 1).await?,
        };
        Ok(Unhandled { messages, oldest })
    }

    /// Up to where everything is acknowledged; none when there is no consumer.
    pub async fn acknowledged(&self) -> Result<Option<Acknowledged>> {
        let Some(info) = self.bus.consumer_info(&self.stream, &self.durable).await? else { return Ok(None) };
        let (created, sequence) = (timestamp(info.created)?, info.ack_floor.stream_sequence);
        Ok(Some(Acknowledged { created, sequence, subjects: filters(&info) }))
    }

    async fn info(&self) -> Result<Info> {
        self.bus.consumer_info(&self.stream, &self.durable).await?.context("look at the consumer: there is none")
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
        if self.stream_created != self.stream_now.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.reply.end(AckKind::Ack).await.context("acknowledge a message")
    }

    /// Asks for the message again after a while. Always with a delay: without one the server delivers it at once.
    pub async fn nak(self, after: Duration) -> Result<()> {
        let after = after.max(Duration::from_millis(1));
        self.reply.end(AckKind::Nak(Some(after))).await.context("ask for a message again")
    }

    pub fn progress(&self) -> Progress {
        self.reply.clone()
    }
}

impl Progress {
    fn new(client: &async_nats::Client, reply: Subject) -> Self {
        Progress { client: client.clone(), reply, is_over: Arc::default() }
    }

    /// Starts the wait for the acknowledgement anew, unless the message was settled or given back.
    pub async fn send(&self) -> Result<()> {
        let is_over = self.is_over.lock().await;
        if *is_over { Ok(()) } else { self.reply(AckKind::Progress).await.context("tell of progress") }
    }

    /// The last word on this delivery.
    async fn end(&self, kind: AckKind) -> Result<()> {
        let mut is_over = self.is_over.lock().await;
        *is_over = true;
        self.reply(kind).await
    }

    async fn reply(&self, kind: AckKind) -> Result<()> {
        let sent = self.client.publish(self.reply.clone(), kind.into());
        Ok(tokio::time::timeout(SEND_TIMEOUT, sent).await.context("find room while NATS is out of reach")??)
    }
}

/// Headers by name, without those that only concern the transport.
pub(super) fn headers(map: Option<&async_nats::HeaderMap>) -> Headers {
    let Some(map) = map else { return Headers::new() };
    let mut headers: Headers = map
        .iter()
        .filter(|(name, _)| !is_transport(name.as_ref()))
        .flat_map(|(name, values)| values.iter().map(move |value| (name.to_string(), value.to_string())))
        .collect();
    // The client keeps no order between names; ours is at least always the same.
    headers.sort_by(|(one, _), (other, _)| one.cmp(other));
    headers
}

fn is_transport(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["nats-batch-", "nats-schedule", "nats-expected-"].iter().any(|prefix| name.starts_with(prefix))
}
