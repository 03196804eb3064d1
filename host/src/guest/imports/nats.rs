//! `wasmcloud:nats`: publishing goes to the outbox, key-value to keyed state. The host acknowledges
//! the message after the commit (`ack-mode: auto`).
//!
//! These functions are async, so the guest may have several under way. Each first waits for the
//! database without access to the call, and then takes effect at once, as a function of the
//! synchronous interfaces. So calls are recorded one after another.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use wasmtime::component::{Accessor, Resource};
use wasmtime_wasi::WasiView;

use super::super::bindings::nats::wasmcloud::nats::{core, jetstream, kv, types};
use super::super::bindings::oncely::worker::{outbox, state};
use super::AsyncHost;
use crate::guest::bucket::{Bucket, MessageHandle, PullConsumer};
use crate::guest::failure::FailureKind;
use crate::guest::record::{HostCall, HostResult};
use crate::guest::state::CallState;
use crate::model::failure_code::FailureCode;
use crate::model::message::Message;
use types::{Denial, DenialReason, DeniedResource, NatsError, NatsMessage};

/// Keys that one call of `keys` returns, at most.
const KEYS_MAX: u32 = 1_000;

/// The header by which streams detect duplicates. The host makes its own.
const MESSAGE_ID: &str = "Nats-Msg-Id";

type Outcome<T> = wasmtime::Result<Result<T, NatsError>>;

fn unavailable<T>(function: &str) -> Outcome<T> {
    Ok(Err(NatsError::Unexpected(format!(
        "wasmcloud:nats/{function} is not available: its result is outside the transaction, and may \
         differ in the next attempt"
    ))))
}

/// The result of a function that has nothing to wait for.
fn at_once<T>(function: impl Future<Output = wasmtime::Result<T>>) -> wasmtime::Result<T> {
    let result = function.now_or_never();
    result.unwrap_or_else(|| Err(wasmtime::Error::msg("a host function had to wait")))
}

impl CallState {
    /// Sends a message after the commit.
    fn publish_later(&mut self, message: NatsMessage) -> Outcome<()> {
        let mut id = None;
        let mut headers = Vec::new();
        for header in message.headers.unwrap_or_default() {
            if header.name.eq_ignore_ascii_case(MESSAGE_ID) {
                id = Some(header.value);
            } else {
                headers.push((header.name, header.value));
            }
        }
        let subject = message.subject.clone();
        let outgoing = outbox::Outgoing {
            subject: message.subject,
            headers,
            body: message.body,
            id,
            ordering_key: None,
            delay: None,
            caused_by: None,
        };
        let sent = at_once(outbox::Host::send(self, outgoing))?;
        Ok(sent.map(|_| ()).map_err(|error| match error {
            outbox::Error::NotGranted(_) => NatsError::Denied(Denial {
                reason: DenialReason::NotGranted,
                target: DeniedResource::Subject,
                name: subject,
            }),
            outbox::Error::InvalidHeader(why) => NatsError::InvalidHeader(why),
            outbox::Error::TooLarge(_) => {
                NatsError::MaxPayloadExceeded(self.call.payload_max as u64)
            }
            other => NatsError::Unexpected(super::outbox::error_message(&other).to_owned()),
        }))
    }
}

/// Reads a key into the state of the call, before a function that uses it. A playback has the
/// result in its record.
async fn load<U: Send>(
    accessor: &Accessor<U, AsyncHost>,
    bucket: &Resource<Bucket>,
    key: &str,
) -> wasmtime::Result<String> {
    let (key, missing) = accessor.with(|mut access| -> wasmtime::Result<_> {
        let state = access.get();
        let key = state.key_of(bucket, key)?;
        let is_known = state.call.recorder.is_playback() || state.call.state.slot(&key).is_some();
        let missing = (!is_known).then(|| Arc::clone(&state.call.database));
        Ok((key, missing))
    })?;
    // An invalid key is refused by the function.
    if let Some(database) = missing.filter(|_| super::state::is_valid_key(&key)) {
        let loaded = database.load_state(key.clone()).await;
        accessor.with(|mut access| {
            let state = access.get();
            match loaded {
                Ok(slot) if state.call.state.slot(&key).is_none() => {
                    state.call.state.record_read(key.clone(), slot);
                    Ok(())
                }
                Ok(_) => Ok(()),
                Err(error) => state.host_error(error),
            }
        })?;
    }
    Ok(key)
}

/// Runs a function of keyed state on a key of a bucket.
async fn on_key<U: Send, T>(
    accessor: &Accessor<U, AsyncHost>,
    bucket: &Resource<Bucket>,
    key: &str,
    function: impl AsyncFnOnce(&mut CallState, String) -> wasmtime::Result<Result<T, state::Error>>,
) -> Outcome<T> {
    let key = load(accessor, bucket, key).await?;
    let result = accessor.with(|mut access| at_once(function(access.get(), key)))?;
    Ok(result.map_err(Into::into))
}

impl types::Host for CallState {}
impl core::Host for CallState {}
impl jetstream::Host for CallState {}
impl kv::Host for CallState {}

impl<U: Send> core::HostWithStore<U> for AsyncHost {
    async fn publish(accessor: &Accessor<U, Self>, message: NatsMessage) -> Outcome<()> {
        accessor.with(|mut access| access.get().publish_later(message))
    }

    async fn request(_: &Accessor<U, Self>, _: NatsMessage, _: u32) -> Outcome<NatsMessage> {
        unavailable("core.request")
    }
}

impl<U: Send> jetstream::HostWithStore<U> for AsyncHost {
    /// The place on the stream is not known before the commit.
    async fn publish(
        accessor: &Accessor<U, Self>,
        message: NatsMessage,
    ) -> Outcome<jetstream::PublishAck> {
        let sent = accessor.with(|mut access| access.get().publish_later(message))?;
        Ok(sent.map(|()| jetstream::PublishAck {
            stream_name: String::new(),
            sequence: 0,
            duplicate: false,
        }))
    }

    async fn get_by_sequence(
        _: &Accessor<U, Self>,
        _: String,
        _: u64,
    ) -> Outcome<jetstream::StoredMessage> {
        unavailable("jetstream.get-by-sequence")
    }

    async fn scan(
        _: &Accessor<U, Self>,
        _: String,
        _: u64,
        _: u32,
    ) -> Outcome<Vec<jetstream::StoredMessage>> {
        unavailable("jetstream.scan")
    }

    async fn open_pull_consumer(
        _: &Accessor<U, Self>,
        _: String,
        _: String,
    ) -> Outcome<Resource<PullConsumer>> {
        unavailable("jetstream.open-pull-consumer")
    }

    async fn get_stream_info(_: &Accessor<U, Self>, _: String) -> Outcome<jetstream::StreamInfo> {
        unavailable("jetstream.get-stream-info")
    }

    async fn list_stream_subjects(
        _: &Accessor<U, Self>,
        _: String,
        _: String,
    ) -> Outcome<Vec<jetstream::SubjectCount>> {
        unavailable("jetstream.list-stream-subjects")
    }

    async fn get_consumer_info(
        _: &Accessor<U, Self>,
        _: String,
        _: String,
    ) -> Outcome<jetstream::ConsumerInfo> {
        unavailable("jetstream.get-consumer-info")
    }
}

impl jetstream::HostMessageHandle for CallState {
    async fn message(&mut self, _: Resource<MessageHandle>) -> wasmtime::Result<NatsMessage> {
        let message = CallState::message(self).map(nats_message);
        message.ok_or_else(|| wasmtime::Error::msg("this call has no message"))
    }

    async fn sequence(&mut self, _: Resource<MessageHandle>) -> wasmtime::Result<u64> {
        let origin = CallState::message(self).and_then(|message| message.origin.as_ref());
        Ok(origin.map_or(0, |origin| origin.sequence))
    }

    async fn delivery_count(&mut self, _: Resource<MessageHandle>) -> wasmtime::Result<u32> {
        self.call.recorder.inputs.has_read_attempt = true;
        Ok(self.call.attempt)
    }

    async fn drop(&mut self, handle: Resource<MessageHandle>) -> wasmtime::Result<()> {
        self.ctx().table.delete(handle)?;
        Ok(())
    }
}

impl<U: Send> jetstream::HostMessageHandleWithStore<U> for AsyncHost {
    /// The commit acknowledges the message.
    async fn ack(_: &Accessor<U, Self>, _: Resource<MessageHandle>) -> Outcome<()> {
        Ok(Ok(()))
    }

    async fn ack_sync(_: &Accessor<U, Self>, _: Resource<MessageHandle>) -> Outcome<()> {
        Ok(Ok(()))
    }

    /// Fails the message, whatever the handler returns.
    async fn nak(
        accessor: &Accessor<U, Self>,
        _: Resource<MessageHandle>,
        delay_ms: Option<u32>,
    ) -> Outcome<()> {
        let kind = match delay_ms {
            Some(ms) => FailureKind::RetryAfter(Duration::from_millis(ms.into())),
            None => FailureKind::Retry,
        };
        let why = "the handler sent a negative acknowledgement";
        accessor.with(|mut access| access.get().doom(kind, FailureCode::Nak, why));
        Ok(Ok(()))
    }

    async fn in_progress(_: &Accessor<U, Self>, _: Resource<MessageHandle>) -> Outcome<()> {
        Ok(Ok(()))
    }

    /// Dead-letters the message, whatever the handler returns.
    async fn term(accessor: &Accessor<U, Self>, _: Resource<MessageHandle>) -> Outcome<()> {
        let why = "the handler terminated the message";
        accessor.with(|mut access| {
            access
                .get()
                .doom(FailureKind::Reject, FailureCode::Term, why)
        });
        Ok(Ok(()))
    }
}

fn nats_message(message: &Message) -> NatsMessage {
    let entry = |(name, value): &(String, String)| types::HeaderEntry {
        name: name.clone(),
        value: value.clone(),
    };
    NatsMessage {
        subject: message.subject.clone(),
        body: message.body.to_vec(),
        reply_to: None,
        headers: Some(message.headers.iter().map(entry).collect()),
    }
}

impl jetstream::HostPullConsumer for CallState {
    async fn drop(&mut self, consumer: Resource<PullConsumer>) -> wasmtime::Result<()> {
        self.ctx().table.delete(consumer)?;
        Ok(())
    }
}

impl<U: Send> jetstream::HostPullConsumerWithStore<U> for AsyncHost {
    async fn fetch(
        _: &Accessor<U, Self>,
        _: Resource<PullConsumer>,
        _: u32,
        _: u32,
    ) -> Outcome<jetstream::FetchedBatch> {
        unavailable("jetstream.pull-consumer.fetch")
    }

    async fn fetch_with_limits(
        _: &Accessor<U, Self>,
        _: Resource<PullConsumer>,
        _: u32,
        _: u64,
        _: u32,
    ) -> Outcome<jetstream::FetchedBatch> {
        unavailable("jetstream.pull-consumer.fetch-with-limits")
    }

    async fn info(
        _: &Accessor<U, Self>,
        _: Resource<PullConsumer>,
    ) -> Outcome<jetstream::ConsumerInfo> {
        unavailable("jetstream.pull-consumer.info")
    }
}

impl<U: Send> kv::HostWithStore<U> for AsyncHost {
    async fn open(accessor: &Accessor<U, Self>, bucket: String) -> Outcome<Resource<Bucket>> {
        let opened = accessor.with(|mut access| access.get().open_bucket(&bucket))?;
        Ok(opened
            .map_err(|_| NatsError::NotFound(format!("`{bucket}` cannot be the name of a bucket"))))
    }
}

impl From<state::Error> for NatsError {
    fn from(error: state::Error) -> Self {
        match error {
            state::Error::VersionMismatch(version) => {
                NatsError::RevisionMismatch(version.unwrap_or_default())
            }
            state::Error::InvalidKey(why)
            | state::Error::TransactionFailed(why)
            | state::Error::Other(why) => NatsError::Unexpected(why),
            state::Error::TooLarge(why) => NatsError::LimitExceeded(why),
        }
    }
}

impl kv::HostBucket for CallState {
    async fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
        self.ctx().table.delete(bucket)?;
        Ok(())
    }
}

impl<U: Send> kv::HostBucketWithStore<U> for AsyncHost {
    async fn get(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
    ) -> Outcome<kv::Entry> {
        let get = async |state: &mut CallState, key| state::Host::get(state, key).await;
        let found = match on_key(accessor, &bucket, &key, get).await? {
            Ok(found) => found,
            Err(error) => return Ok(Err(error)),
        };
        let entry = found.map(|entry| kv::Entry {
            key,
            value: entry.value,
            revision: entry.version,
            // Keyed state has no times of its own.
            created_at_unix_nanos: 0,
            operation: kv::KvOperation::Put,
        });
        Ok(entry.ok_or(NatsError::KeyNotFound))
    }

    async fn put(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
        value: Vec<u8>,
    ) -> Outcome<u64> {
        let set = async |state: &mut CallState, key| state::Host::set(state, key, value).await;
        on_key(accessor, &bucket, &key, set).await
    }

    async fn create(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
        value: Vec<u8>,
    ) -> Outcome<u64> {
        Self::update(accessor, bucket, key, value, 0).await
    }

    async fn update(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
        value: Vec<u8>,
        expected: u64,
    ) -> Outcome<u64> {
        let expected = (expected > 0).then_some(expected);
        let set = async |state: &mut CallState, key| {
            state::Host::compare_and_set(state, key, expected, value).await
        };
        on_key(accessor, &bucket, &key, set).await
    }

    async fn delete(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
    ) -> Outcome<()> {
        let delete = async |state: &mut CallState, key| state::Host::delete(state, key).await;
        Ok(on_key(accessor, &bucket, &key, delete).await?.map(|_| ()))
    }

    async fn purge(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
    ) -> Outcome<()> {
        Self::delete(accessor, bucket, key).await
    }

    async fn keys(accessor: &Accessor<U, Self>, bucket: Resource<Bucket>) -> Outcome<kv::KeyPage> {
        let (prefix, database) = accessor.with(|mut access| -> wasmtime::Result<_> {
            let state = access.get();
            let prefix = state.key_of(&bucket, "")?;
            let is_playback = state.call.recorder.is_playback();
            let database = (!is_playback).then(|| Arc::clone(&state.call.database));
            Ok((prefix, database))
        })?;
        let listed = match database {
            Some(database) => {
                database
                    .list_state(prefix.clone(), prefix.clone(), KEYS_MAX + 1)
                    .await
            }
            None => Ok(Vec::new()),
        };
        accessor.with(|mut access| {
            let state = access.get();
            let listed = match listed {
                Ok(listed) => listed,
                Err(error) => return state.host_error(error),
            };
            state.key_page(prefix, listed)
        })
    }

    /// Keyed state keeps the latest value only.
    async fn history(
        accessor: &Accessor<U, Self>,
        bucket: Resource<Bucket>,
        key: String,
    ) -> Outcome<Vec<kv::Entry>> {
        let entry = Self::get(accessor, bucket, key).await?;
        Ok(entry.map(|entry| vec![entry]))
    }

    async fn status(_: &Accessor<U, Self>, _: Resource<Bucket>) -> Outcome<kv::BucketStatus> {
        unavailable("kv.bucket.status")
    }
}

impl CallState {
    /// The first keys of a bucket, of which the database has these.
    fn key_page(&mut self, prefix: String, listed: Vec<String>) -> Outcome<kv::KeyPage> {
        self.check_deadline()?;
        let call = || HostCall::List {
            prefix: prefix.clone(),
            after: prefix.clone(),
        };
        let listed = match self.call.recorder.begin_call(prefix.len(), call)? {
            Some(HostResult::Keys(keys)) => keys,
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                let size = listed.iter().map(String::len).sum();
                let keys = || HostResult::Keys(listed.clone());
                self.call.recorder.finish_call(size, keys);
                listed
            }
        };
        let most = KEYS_MAX as usize;
        let is_last = listed.len() <= most;
        let keys = self.call.state.page(&prefix, &prefix, listed, is_last);
        let names = keys.iter().filter_map(|key| key.strip_prefix(&prefix));
        let mut keys: Vec<String> = names.map(str::to_owned).collect();
        let truncated = !is_last || keys.len() > most;
        keys.truncate(most);
        Ok(Ok(kv::KeyPage { keys, truncated }))
    }
}
