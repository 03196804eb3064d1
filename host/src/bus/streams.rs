//! Streams: listing, creation, and scans for published messages.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use async_nats::datetime::{DateTime, from_nanos};
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy, pull};
use async_nats::jetstream::context::{
    CreateStreamErrorKind, GetStreamByNameErrorKind, GetStreamErrorKind,
};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use futures::StreamExt;
use jiff::Timestamp;

use super::Bus;
use super::pull::headers;
use super::pull_requests::FetchedMessage;
use crate::model::hint;
use crate::model::message::Headers;
use crate::model::subject;

/// The definition of a stream to create.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamSpec {
    /// The name, unique in its NATS account.
    pub name: String,
    /// The subjects it captures, wildcards allowed.
    pub subjects: Vec<String>,
    /// How long it keeps a message; `None` for no limit.
    pub max_age: Option<Duration>,
    /// Its maximum size in bytes; `None` for no limit.
    pub max_bytes: Option<u64>,
    /// The server's dedupe window for message ids; `None` for its default of two minutes.
    pub duplicate_window: Option<Duration>,
    /// Whether acknowledged messages are removed.
    pub is_queue: bool,
    /// How many messages of each subject it keeps, newest first; `None` for all.
    pub messages_per_subject_max: Option<i64>,
}

impl StreamSpec {
    /// A stream that captures these subjects and keeps all messages.
    pub fn new(name: &str, subjects: &[&str]) -> Self {
        let subjects = subjects.iter().map(|&subject| subject.to_owned()).collect();
        StreamSpec {
            name: name.to_owned(),
            subjects,
            ..StreamSpec::default()
        }
    }
}

/// The result of [`Bus::ensure_stream`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnsuredStream {
    /// The stream was created by this call.
    Created,
    /// A stream of this name existed and is unchanged.
    AlreadyExists,
}

/// The current state of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    /// The name, unique in its NATS account.
    pub name: String,
    /// When it was created; later for a recreated stream of the same name.
    pub created: Timestamp,
    /// The subjects it captures, possibly with wildcards.
    pub subjects: Vec<String>,
    /// The number of stored messages.
    pub messages: u64,
    /// The lowest stored sequence. In an empty stream 0, or one more than the last sequence.
    pub first_sequence: u64,
    /// The sequence of the last message, even if it was removed since; 0 if there was none.
    pub last_sequence: u64,
    /// The server's dedupe window for message ids.
    pub duplicate_window: Duration,
    /// How long it keeps a message; `None` for no limit.
    pub max_age: Option<Duration>,
    /// Whether it transforms the subjects of stored messages.
    pub has_subject_transform: bool,
    /// Whether it copies messages from other streams.
    pub is_copy: bool,
    /// Whether acknowledged messages are removed: a work queue, or a stream with interest
    /// retention. A missing message may have been stored before, and a scan would remove messages.
    pub is_queue: bool,
}

impl Bus {
    /// Creates a stream unless one of this name exists; an existing one is left unchanged. Unless
    /// it is a queue, retention is by limits, so that messages can be read again after a restore. A
    /// full stream refuses new messages instead of dropping old ones.
    pub async fn ensure_stream(&self, spec: &StreamSpec) -> Result<EnsuredStream> {
        if self.stream(&spec.name).await?.is_some() {
            return Ok(EnsuredStream::AlreadyExists);
        }
        self.create_stream(spec).await
    }

    /// The same bus with this many replicas per created stream; `None` for as many as there are
    /// servers, up to three.
    #[must_use]
    pub fn with_replicas(self, replicas: Option<usize>) -> Bus {
        Bus { replicas, ..self }
    }

    /// Creates a stream; an existing one of this name is left unchanged.
    pub(super) async fn create_stream(&self, spec: &StreamSpec) -> Result<EnsuredStream> {
        let mut config = stream_config(spec);
        self.set_owner(&mut config.metadata);
        config.num_replicas = self.replicas.unwrap_or(REPLICAS_AUTO);
        let mut made = self.context.create_stream(config.clone()).await;

        // Fall back to one replica.
        if let Err(error) = &made
            && self.replicas.is_none()
            && let Some(why) = replica_shortage(error)
        {
            if why == ReplicaShortage::TooFewServers {
                tracing::warn!(
                    stream = spec.name,
                    error = error.to_string(),
                    "stream created with one replica, too few servers in the cluster"
                );
            }
            config.num_replicas = 1;
            made = self.context.create_stream(config).await;
        }
        match made {
            Ok(_) => Ok(EnsuredStream::Created),
            // Another host was faster.
            Err(error) if is_name_in_use(&error) => Ok(EnsuredStream::AlreadyExists),
            Err(error) => Err(error).with_context(|| {
                format!(
                    "create the stream {} for {}",
                    spec.name,
                    spec.subjects.join(", ")
                )
            }),
        }
    }

    /// Raises a stream of this installation to the wanted number of replicas. On failure the stream
    /// keeps those it has.
    pub(super) async fn raise_replicas(&self, name: &str) -> Result<()> {
        let stream = self
            .context
            .get_stream(name)
            .await
            .with_context(|| format!("query the stream {name}"))?;
        let mut config = stream.cached_info().config.clone();
        let (wanted, has) = (self.replicas.unwrap_or(REPLICAS_AUTO), config.num_replicas);
        // A single server cannot hold more replicas.
        if has >= wanted
            || stream
                .cached_info()
                .cluster
                .as_ref()
                .is_none_or(|cluster| cluster.name.is_none())
        {
            return Ok(());
        }
        config.num_replicas = wanted;
        match self.context.update_stream(config).await {
            Ok(_) => tracing::info!(stream = name, replicas = wanted, "stream replicas raised"),
            // Without those replicas, no host can start while the server that holds the stream is
            // down.
            Err(error) => tracing::warn!(
                stream = name,
                replicas = has,
                wanted,
                error = error.to_string(),
                "failed to raise the stream's replicas"
            ),
        }
        Ok(())
    }

    /// A stream; `None` if it does not exist.
    pub async fn stream(&self, name: &str) -> Result<Option<StreamInfo>> {
        match self.context.get_stream(name).await {
            Ok(stream) => stream_info(stream.cached_info()).map(Some),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(answer)
                    if answer.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(error).with_context(|| format!("query the stream {name}")),
            },
        }
    }

    /// All streams, from a listing no older than `age_max`.
    pub async fn streams(&self, age_max: Duration) -> Result<Arc<Vec<StreamInfo>>> {
        let mut known = self.stream_cache.lock().await;
        if let Some((as_of, streams)) = known.as_ref()
            && as_of.elapsed() < age_max
        {
            return Ok(Arc::clone(streams));
        }
        let as_of = Instant::now();
        let mut found = Vec::new();
        let mut streams = self.context.streams();
        while let Some(stream) = streams.next().await {
            found.push(stream_info(&stream.context("list the streams")?)?);
        }
        let found = Arc::new(found);
        *known = Some((as_of, Arc::clone(&found)));
        Ok(found)
    }

    /// Whether a stream accepts a subject, including streams without a leader at the moment.
    pub async fn takes_subject(&self, subject: &str) -> Result<bool> {
        match self.context.stream_by_subject(subject).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == GetStreamByNameErrorKind::NotFound => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("query the stream that accepts {subject}"))
            }
        }
    }

    /// The name of the stream that holds all of `wanted`, a subject or a pattern; `None` if there
    /// is none.
    pub async fn stream_name_for_subject(&self, wanted: &str) -> Result<Option<String>> {
        let streams = self.streams(Duration::ZERO).await?;
        Ok(stream_for_subject(&streams, wanted).map(|stream| stream.name.clone()))
    }

    /// Finds message ids on a stream, among the messages to `subjects` stored since a time. Returns
    /// the sequence of each id found. Reads headers only.
    pub async fn find_published(
        &self,
        stream: &str,
        subjects: &[String],
        since: Timestamp,
        ids: &HashSet<String>,
    ) -> Result<HashMap<String, u64>> {
        let stream = self
            .context
            .get_stream(stream)
            .await
            .with_context(|| format!("open the stream {stream}"))?;
        let since = from_nanos(since.as_nanosecond())
            .map_err(Error::from_boxed)
            .context("read a time")?;
        let config = pull::Config {
            deliver_policy: DeliverPolicy::ByStartTime { start_time: since },
            // With more filters than that, a full scan costs no more.
            filter_subjects: if subjects.len() <= FILTERS_MAX {
                subjects.to_vec()
            } else {
                Vec::new()
            },
            ..scan_config()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .context("scan the stream")?;

        // Scan, then remove the consumer.
        let found = find_ids(self, &consumer, ids)
            .await
            .context("scan the stream");
        let _ = stream.delete_consumer(&consumer.cached_info().name).await;
        found
    }

    /// Calls `each` for up to `most` messages from a position on, headers only. With no `subjects`,
    /// all are read. Returns true if there are more.
    pub async fn scan_messages(
        &self,
        stream: &str,
        from: StartPosition,
        subjects: &[String],
        most: usize,
        each: impl FnMut(ScannedMessage),
    ) -> Result<bool> {
        let stream = self
            .context
            .get_stream(stream)
            .await
            .with_context(|| format!("open the stream {stream}"))?;
        let deliver_policy = match from {
            StartPosition::Sequence(sequence) => DeliverPolicy::ByStartSequence {
                start_sequence: sequence.max(1),
            },
            StartPosition::Time(time) => {
                let time = from_nanos(time.as_nanosecond())
                    .map_err(Error::from_boxed)
                    .context("read a time")?;
                DeliverPolicy::ByStartTime { start_time: time }
            }
        };
        let config = pull::Config {
            deliver_policy,
            filter_subjects: subjects.to_vec(),
            ..scan_config()
        };
        let consumer = stream
            .create_consumer(config)
            .await
            .context("scan the stream")?;

        // Scan, then remove the consumer.
        let has_more = scan_up_to(self, &consumer, most, each)
            .await
            .context("scan the stream");
        let _ = stream.delete_consumer(&consumer.cached_info().name).await;
        has_more
    }
}

/// The configuration of a consumer that scans headers. The server removes it if this process dies
/// meanwhile.
fn scan_config() -> pull::Config {
    pull::Config {
        ack_policy: AckPolicy::None,
        headers_only: true,
        inactive_threshold: Duration::from_secs(60),
        memory_storage: true,
        ..pull::Config::default()
    }
}

/// A scanned message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScannedMessage {
    /// The position of the message on the stream.
    pub sequence: u64,
    /// When the stream stored the message.
    pub stored_at: Timestamp,
    /// The subject under which the message is stored.
    pub subject: String,
    /// All headers of the message, in order.
    pub headers: Headers,
}

/// The position on a stream at which a scan begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartPosition {
    /// The first message with this sequence or a higher one.
    Sequence(u64),
    /// The first message that was stored at this time or later.
    Time(Timestamp),
}

/// The maximum number of subject filters of one scan.
const FILTERS_MAX: usize = 16;

/// The stream that holds all of `wanted`, a subject or a pattern.
pub fn stream_for_subject<'s>(streams: &'s [StreamInfo], wanted: &str) -> Option<&'s StreamInfo> {
    streams.iter().find(|stream| {
        stream
            .subjects
            .iter()
            .any(|pattern| subject::covers(pattern, wanted))
    })
}

/// How many messages one request of a scan brings, and how long it stays open.
const REQUEST_MAX: usize = 1_000;
const REQUEST_OPEN: Duration = Duration::from_secs(5);

/// The sequences of `ids`, found in one pass over the consumer's messages.
async fn find_ids(
    bus: &Bus,
    consumer: &Consumer<pull::Config>,
    ids: &HashSet<String>,
) -> Result<HashMap<String, u64>> {
    let mut found = HashMap::new();
    let visit = |message: FetchedMessage| {
        let id = message.headers.get(async_nats::header::NATS_MESSAGE_ID);
        if let Some(id) = id.map(|id| id.as_str()).filter(|id| ids.contains(*id)) {
            found
                .entry(id.to_owned())
                .or_insert(message.position.sequence);
        }
        found.len() < ids.len()
    };
    for_each_message(bus, consumer, visit).await?;
    Ok(found)
}

/// Calls `each` for the consumer's messages, at most `most`; true if there are more.
async fn scan_up_to(
    bus: &Bus,
    consumer: &Consumer<pull::Config>,
    most: usize,
    mut each: impl FnMut(ScannedMessage),
) -> Result<bool> {
    let mut visited = 0;
    let visit = |message: FetchedMessage| {
        visited += 1;
        let headers = headers(Some(&message.headers));
        each(ScannedMessage {
            sequence: message.position.sequence,
            stored_at: message.position.stored_at,
            subject: message.subject,
            headers,
        });
        visited < most
    };
    Ok(for_each_message(bus, consumer, visit).await? > 0)
}

/// Calls `visit` for each message of a consumer until it returns false. Returns the number of
/// messages left.
async fn for_each_message(
    bus: &Bus,
    consumer: &Consumer<pull::Config>,
    mut visit: impl FnMut(FetchedMessage) -> bool,
) -> Result<u64> {
    let info = consumer.cached_info();
    let mut left = info.num_pending;
    let mut requests = bus.pull_requests(&info.stream_name, &info.name).await?;
    while left > 0 {
        requests.open(REQUEST_MAX, REQUEST_OPEN, true)?;
        let mut received_any = false;
        while let Some(message) = requests.next(bus).await? {
            (received_any, left) = (true, message.position.pending);
            if !visit(message) {
                return Ok(left);
            }
        }
        if !received_any {
            bail!("the server stopped answering with {left} messages left");
        }
    }
    Ok(left)
}

fn stream_config(spec: &StreamSpec) -> Config {
    Config {
        name: spec.name.clone(),
        subjects: spec.subjects.clone(),
        retention: if spec.is_queue {
            RetentionPolicy::WorkQueue
        } else {
            RetentionPolicy::Limits
        },
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        max_age: spec.max_age.unwrap_or_default(),
        max_bytes: spec
            .max_bytes
            .map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        max_messages_per_subject: spec.messages_per_subject_max.unwrap_or(-1),
        duplicate_window: spec.duplicate_window.unwrap_or_default(),
        allow_direct: true,
        ..Config::default()
    }
}

/// The number of replicas that `auto` requests.
const REPLICAS_AUTO: usize = 3;

/// The reason why a stream cannot have the requested replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReplicaShortage {
    /// There is no cluster.
    NoCluster,
    TooFewServers,
}

fn replica_shortage(
    error: &async_nats::jetstream::context::CreateStreamError,
) -> Option<ReplicaShortage> {
    let CreateStreamErrorKind::JetStream(answer) = error.kind() else {
        return None;
    };
    match answer.error_code() {
        ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => Some(ReplicaShortage::NoCluster),
        ErrorCode::CLUSTER_NO_PEERS | ErrorCode::INSUFFICIENT_RESOURCES => {
            Some(ReplicaShortage::TooFewServers)
        }
        _ => None,
    }
}

/// Whether the creation of a stream failed permanently: the server refuses its configuration.
pub fn is_permanent_error(error: &Error) -> bool {
    let refused = hint::find_cause::<async_nats::jetstream::context::CreateStreamError>(error)
        .map(|error| error.kind());
    let Some(CreateStreamErrorKind::JetStream(answer)) = refused else {
        return false;
    };
    let passes = [
        ErrorCode::CLUSTER_NO_PEERS,
        ErrorCode::INSUFFICIENT_RESOURCES,
    ];
    (400..500).contains(&answer.code()) && !passes.contains(&answer.error_code())
}

fn is_name_in_use(error: &async_nats::jetstream::context::CreateStreamError) -> bool {
    matches!(error.kind(), CreateStreamErrorKind::JetStream(answer)
        if answer.error_code() == ErrorCode::STREAM_NAME_EXIST)
}

pub(super) fn stream_info(info: &async_nats::jetstream::stream::Info) -> Result<StreamInfo> {
    Ok(StreamInfo {
        name: info.config.name.clone(),
        created: timestamp(info.created)?,
        subjects: info.config.subjects.clone(),
        messages: info.state.messages,
        first_sequence: info.state.first_sequence,
        last_sequence: info.state.last_sequence,
        duplicate_window: info.config.duplicate_window,
        max_age: Some(info.config.max_age).filter(|age| !age.is_zero()),
        has_subject_transform: info.config.subject_transform.is_some(),
        is_copy: info.config.mirror.is_some()
            || info
                .config
                .sources
                .as_ref()
                .is_some_and(|sources| !sources.is_empty()),
        is_queue: info.config.retention != RetentionPolicy::Limits,
    })
}

/// Converts the client library's time.
pub(super) fn timestamp(time: DateTime) -> Result<Timestamp> {
    Timestamp::from_nanosecond(time.unix_timestamp_nanos()).context("read a time")
}
