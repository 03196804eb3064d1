//! Streams: what there is, making what is missing, and looking for what was published.

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

/// A stream to make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamSpec {
    pub name: String,
    pub subjects: Vec<String>,
    /// How long it keeps a message; none for ever.
    pub max_age: Option<Duration>,
    /// How large it may become, in bytes; none without limit.
    pub max_bytes: Option<u64>,
    /// For how long the server recognises a message id; none for its default, two minutes.
    pub duplicate_window: Option<Duration>,
    /// Whether what is acknowledged leaves it.
    pub is_queue: bool,
    /// How many messages of each subject it keeps, the newest ones; none for all.
    pub messages_per_subject_max: Option<i64>,
}

impl StreamSpec {
    pub fn new(name: &str, subjects: &[&str]) -> Self {
        let subjects = subjects.iter().map(|&subject| subject.to_owned()).collect();
        StreamSpec {
            name: name.to_owned(),
            subjects,
            ..StreamSpec::default()
        }
    }
}

/// What [`Bus::ensure_stream`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnsuredStream {
    Created,
    AlreadyExists,
}

/// A stream as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    pub name: String,
    pub created: Timestamp,
    pub subjects: Vec<String>,
    pub messages: u64,
    /// The lowest sequence still there; 0 or one more than the last when the stream is empty.
    pub first_sequence: u64,
    pub last_sequence: u64,
    /// For how long the server recognises a message id.
    pub duplicate_window: Duration,
    /// How long it keeps a message; none for ever.
    pub max_age: Option<Duration>,
    /// Whether it stores messages under other subjects than they were published to.
    pub has_subject_transform: bool,
    /// Whether it takes messages over from other streams.
    pub is_copy: bool,
    /// Whether messages go away once they are acknowledged: a work queue, or a stream kept by interest. What is not there any
    /// more may well have been there, and nobody can look through it without taking from it.
    pub is_queue: bool,
}

impl Bus {
    /// Makes a stream unless one of this name is there; that one stays as it is. Limits retention, so that messages can
    /// be read again after a restore, unless it is a queue; when it is full it refuses new messages rather than drop old ones.
    pub async fn ensure_stream(&self, spec: &StreamSpec) -> Result<EnsuredStream> {
        if self.stream(&spec.name).await?.is_some() {
            return Ok(EnsuredStream::AlreadyExists);
        }
        self.create_stream(spec).await
    }

    /// The same bus, which makes streams of so many replicas; none for as many as there are servers, up to three.
    #[must_use]
    pub fn with_replicas(self, replicas: Option<usize>) -> Bus {
        Bus { replicas, ..self }
    }

    /// Makes a stream; one of this name that is there stays as it is.
    pub(super) async fn create_stream(&self, spec: &StreamSpec) -> Result<EnsuredStream> {
        let mut config = stream_config(spec);
        self.set_owner(&mut config.metadata);
        config.num_replicas = self.replicas.unwrap_or(REPLICAS_AUTO);
        let mut made = self.context.create_stream(config.clone()).await;
        if let Err(error) = &made
            && self.replicas.is_none()
            && let Some(why) = replica_shortage(error)
        {
            if why == ReplicaShortage::TooFewServers {
                tracing::warn!(
                    stream = spec.name,
                    "made with one replica, because the cluster lacks servers: {error}"
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
                    "make the stream {} for {}",
                    spec.name,
                    spec.subjects.join(", ")
                )
            }),
        }
    }

    /// Raises a stream of the installation's own to as many replicas as are wanted. One that lacks them works as it is.
    pub(super) async fn raise_replicas(&self, name: &str) -> Result<()> {
        let stream = self
            .context
            .get_stream(name)
            .await
            .with_context(|| format!("ask NATS for the stream {name}"))?;
        let mut config = stream.cached_info().config.clone();
        let (wanted, has) = (self.replicas.unwrap_or(REPLICAS_AUTO), config.num_replicas);
        // A single server has nothing to raise it to.
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
            Ok(_) => tracing::info!(
                stream = name,
                "kept by {wanted} servers of the cluster from now on"
            ),
            Err(error) => tracing::warn!(
                stream = name,
                "the cluster keeps {has} of {wanted} wanted replicas; while the server that has it is away, no host \
                 starts: {error}"
            ),
        }
        Ok(())
    }

    /// A stream; none when there is none of this name.
    pub async fn stream(&self, name: &str) -> Result<Option<StreamInfo>> {
        match self.context.get_stream(name).await {
            Ok(stream) => stream_info(stream.cached_info()).map(Some),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(answer)
                    if answer.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(error).with_context(|| format!("ask NATS for the stream {name}")),
            },
        }
    }

    /// All streams, as they were at most this long ago.
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

    /// Whether any stream takes a subject, also one that has no leader for now.
    pub async fn takes_subject(&self, subject: &str) -> Result<bool> {
        match self.context.stream_by_subject(subject).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == GetStreamByNameErrorKind::NotFound => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("ask NATS which stream takes {subject}"))
            }
        }
    }

    /// The name of the stream that holds all of `wanted`, a subject or a pattern; none when there is none.
    pub async fn stream_name_for_subject(&self, wanted: &str) -> Result<Option<String>> {
        let streams = self.streams(Duration::ZERO).await?;
        Ok(stream_for_subject(&streams, wanted).map(|stream| stream.name.clone()))
    }

    /// Which of these message ids stand on a stream, among the messages to `subjects` stored since a time, and at which
    /// sequence. Reads headers only.
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
            // With too many of them it is as well to look at everything.
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
            .context("look through the stream")?;
        let found = find_ids(self, &consumer, ids)
            .await
            .context("look through the stream");
        let _ = stream.delete_consumer(&consumer.cached_info().name).await;
        found
    }

    /// Tells `each` of the messages from some place on, headers only, at most `most`; of all subjects when none are given.
    /// True when there are more.
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
            .context("look through the stream")?;
        let has_more = scan_up_to(self, &consumer, most, each)
            .await
            .context("look through the stream");
        let _ = stream.delete_consumer(&consumer.cached_info().name).await;
        has_more
    }
}

/// A consumer that looks at headers as they pass. The server removes it should this process die meanwhile.
fn scan_config() -> pull::Config {
    pull::Config {
        ack_policy: AckPolicy::None,
        headers_only: true,
        inactive_threshold: Duration::from_secs(60),
        memory_storage: true,
        ..pull::Config::default()
    }
}

/// A message that came by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScannedMessage {
    pub sequence: u64,
    pub subject: String,
    pub headers: Headers,
}

/// Where on a stream to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartPosition {
    Sequence(u64),
    /// The first message that was stored at this time or later.
    Time(Timestamp),
}

/// How many subjects one look through a stream is limited to.
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

/// How many messages one request of a look through a stream brings, and how long it stays open.
const REQUEST_MAX: usize = 1_000;
const REQUEST_OPEN: Duration = Duration::from_secs(5);

/// The sequences of those `ids` that come by before the consumer has seen everything.
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

/// Tells of what comes by before the consumer has seen everything, or `most` of it; true when that was not all.
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
            subject: message.subject,
            headers,
        });
        visited < most
    };
    Ok(for_each_message(bus, consumer, visit).await? > 0)
}

/// Shows what a consumer has, until `visit` is false. Returns how much is left.
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
            bail!("the server stopped answering with {left} messages to go");
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

/// What `auto` asks for.
const REPLICAS_AUTO: usize = 3;

/// Why a stream cannot have as many replicas as were asked for.
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

/// Whether a stream could not be made for a reason that does not pass by itself: the server refuses its configuration.
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

/// The client's time as ours.
pub(super) fn timestamp(time: DateTime) -> Result<Timestamp> {
    Timestamp::from_nanosecond(time.unix_timestamp_nanos()).context("read a time")
}
