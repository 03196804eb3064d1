//! `wasi:keyvalue`: buckets are parts of the worker's keyed state, in its transaction.
//!
//! The key `K` of the bucket `B` is the key `B/K` of the state. Both drafts have the same functions
//! except for their cursors and `cas` of the second one.

use std::sync::Arc;

use wasmtime::component::Resource;
use wasmtime_wasi::WasiView;

use super::super::bindings::oncely::worker::state;
use super::super::bindings::others::wasi::keyvalue0_2_0_draft as draft;
use super::super::bindings::others::wasi::keyvalue0_2_0_draft2 as draft2;
use crate::guest::bucket::{Bucket, Cas};
use crate::guest::record::{HostCall, HostResult};
use crate::guest::state::CallState;

/// The bucket of an empty identifier.
const DEFAULT_BUCKET: &str = "default";

/// Keys that one call of `list-keys` returns, at most.
const PAGE: u32 = 500;

/// Why an operation failed.
pub(super) enum Error {
    NoSuchStore,
    Other(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::NoSuchStore => f.write_str("there is no such bucket"),
            Error::Other(why) => f.write_str(why),
        }
    }
}

type Outcome<T> = wasmtime::Result<Result<T, Error>>;

/// The value of an operation. Returns its error to the guest.
macro_rules! value {
    ($outcome:expr) => {
        match $outcome.await? {
            Ok(value) => value,
            Err(error) => return Ok(Err(error.into())),
        }
    };
}

impl From<state::Error> for Error {
    fn from(error: state::Error) -> Self {
        Error::Other(match error {
            state::Error::InvalidKey(why)
            | state::Error::TooLarge(why)
            | state::Error::TransactionFailed(why)
            | state::Error::Other(why) => why,
            state::Error::VersionMismatch(_) => "the key has another version".to_owned(),
        })
    }
}

impl From<Error> for draft::store::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::NoSuchStore => draft::store::Error::NoSuchStore,
            Error::Other(why) => draft::store::Error::Other(why),
        }
    }
}

impl From<Error> for draft2::store::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::NoSuchStore => draft2::store::Error::NoSuchStore,
            Error::Other(why) => draft2::store::Error::Other(why),
        }
    }
}

impl CallState {
    pub(super) fn open_bucket(
        &mut self,
        identifier: &str,
    ) -> wasmtime::Result<Result<Resource<Bucket>, Error>> {
        let name = if identifier.is_empty() {
            DEFAULT_BUCKET
        } else {
            identifier
        };
        // With a slash, two buckets could share a key.
        if name.contains(['/', '\0']) {
            return Ok(Err(Error::NoSuchStore));
        }
        let prefix = format!("{name}/");
        Ok(Ok(self.ctx().table.push(Bucket { prefix })?))
    }

    pub(super) fn key_of(
        &mut self,
        bucket: &Resource<Bucket>,
        key: &str,
    ) -> wasmtime::Result<String> {
        let bucket = self.ctx().table.get(bucket)?;
        Ok(format!("{}{key}", bucket.prefix))
    }

    async fn entry(
        &mut self,
        bucket: &Resource<Bucket>,
        key: &str,
    ) -> Outcome<Option<state::Entry>> {
        let key = self.key_of(bucket, key)?;
        Ok(Ok(value!(state::Host::get(self, key))))
    }

    async fn put(&mut self, bucket: &Resource<Bucket>, key: &str, value: Vec<u8>) -> Outcome<()> {
        let key = self.key_of(bucket, key)?;
        value!(state::Host::set(self, key, value));
        Ok(Ok(()))
    }

    async fn remove(&mut self, bucket: &Resource<Bucket>, key: &str) -> Outcome<()> {
        let key = self.key_of(bucket, key)?;
        value!(state::Host::delete(self, key));
        Ok(Ok(()))
    }

    async fn entries(
        &mut self,
        bucket: &Resource<Bucket>,
        keys: Vec<String>,
    ) -> Outcome<Vec<(String, Option<Vec<u8>>)>> {
        let mut found = Vec::new();
        for key in keys {
            let entry = value!(self.entry(bucket, &key));
            found.push((key, entry.map(|entry| entry.value)));
        }
        Ok(Ok(found))
    }

    /// Adds to a number in decimal text. A missing key counts as 0.
    async fn add<N>(&mut self, bucket: &Resource<Bucket>, key: &str, delta: i128) -> Outcome<N>
    where
        N: TryFrom<i128>,
    {
        let number = match value!(self.entry(bucket, key)) {
            None => Some(0),
            Some(entry) => parse_number(&entry.value),
        };
        let Some(sum) = number.and_then(|number| number.checked_add(delta)) else {
            let why = format!("the value of `{key}` is not a number in decimal text");
            return Ok(Err(Error::Other(why)));
        };
        let Ok(number) = N::try_from(sum) else {
            let why = format!("the sum {sum} of `{key}` is out of range");
            return Ok(Err(Error::Other(why)));
        };
        value!(self.put(bucket, key, sum.to_string().into_bytes()));
        Ok(Ok(number))
    }

    /// A page of the keys of a bucket, and the key after which the next page begins.
    pub(super) async fn page(
        &mut self,
        bucket: &Resource<Bucket>,
        after: Option<String>,
    ) -> Outcome<(Vec<String>, Option<String>)> {
        self.check_deadline()?;
        let prefix = self.key_of(bucket, "")?;
        let after = format!("{prefix}{}", after.unwrap_or_default());
        let call = || HostCall::List {
            prefix: prefix.clone(),
            after: after.clone(),
        };
        let recorder = &mut self.call.recorder;
        let stored = match recorder.begin_call(prefix.len() + after.len(), call)? {
            Some(HostResult::Keys(keys)) => keys,
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                let database = Arc::clone(&self.call.database);
                let listed = database.list_state(prefix.clone(), after.clone(), PAGE);
                let keys = match listed.await {
                    Ok(keys) => keys,
                    Err(error) => return self.host_error(error),
                };
                let size = keys.iter().map(String::len).sum();
                self.call
                    .recorder
                    .finish_call(size, || HostResult::Keys(keys.clone()));
                keys
            }
        };

        let name = |key: &String| key.strip_prefix(&prefix).map(str::to_owned);
        let is_last = stored.len() < PAGE as usize;
        let next = stored.last().filter(|_| !is_last).and_then(name);
        let keys = self.call.state.page(&prefix, &after, stored, is_last);
        Ok(Ok((keys.iter().filter_map(name).collect(), next)))
    }

    /// The same page by the number of keys before it.
    async fn page_at(
        &mut self,
        bucket: &Resource<Bucket>,
        cursor: Option<u64>,
    ) -> Outcome<(Vec<String>, Option<u64>)> {
        let mut skip = cursor.unwrap_or_default();
        let mut after = None;
        loop {
            let (mut keys, next) = value!(self.page(bucket, after));
            let count = keys.len() as u64;
            if skip < count || next.is_none() {
                keys.drain(..usize::try_from(skip.min(count))?);
                let end = cursor.unwrap_or_default() + keys.len() as u64;
                return Ok(Ok((keys, next.map(|_| end))));
            }
            skip -= count;
            after = next;
        }
    }
}

fn parse_number(value: &[u8]) -> Option<i128> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Implements a draft: its integers, its cursor and the function that pages by it, the results of
/// `get-many`, and its other functions of `atomics`.
macro_rules! keyvalue {
    ($draft:ident, $integer:ty, $cursor:ty, $page:ident, $many:ty, $to_many:expr, {$($swap:tt)*}) => {
        impl $draft::store::Host for CallState {
            async fn open(
                &mut self,
                identifier: String,
            ) -> wasmtime::Result<Result<Resource<Bucket>, $draft::store::Error>> {
                Ok(self.open_bucket(&identifier)?.map_err(Into::into))
            }
        }

        impl $draft::store::HostBucket for CallState {
            async fn get(
                &mut self,
                bucket: Resource<Bucket>,
                key: String,
            ) -> wasmtime::Result<Result<Option<Vec<u8>>, $draft::store::Error>> {
                let entry = value!(self.entry(&bucket, &key));
                Ok(Ok(entry.map(|entry| entry.value)))
            }

            async fn set(
                &mut self,
                bucket: Resource<Bucket>,
                key: String,
                value: Vec<u8>,
            ) -> wasmtime::Result<Result<(), $draft::store::Error>> {
                Ok(self.put(&bucket, &key, value).await?.map_err(Into::into))
            }

            async fn delete(
                &mut self,
                bucket: Resource<Bucket>,
                key: String,
            ) -> wasmtime::Result<Result<(), $draft::store::Error>> {
                Ok(self.remove(&bucket, &key).await?.map_err(Into::into))
            }

            async fn exists(
                &mut self,
                bucket: Resource<Bucket>,
                key: String,
            ) -> wasmtime::Result<Result<bool, $draft::store::Error>> {
                Ok(Ok(value!(self.entry(&bucket, &key)).is_some()))
            }

            async fn list_keys(
                &mut self,
                bucket: Resource<Bucket>,
                cursor: Option<$cursor>,
            ) -> wasmtime::Result<Result<$draft::store::KeyResponse, $draft::store::Error>> {
                let (keys, cursor) = value!(self.$page(&bucket, cursor));
                Ok(Ok($draft::store::KeyResponse { keys, cursor }))
            }

            async fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
                self.ctx().table.delete(bucket)?;
                Ok(())
            }
        }

        impl $draft::batch::Host for CallState {
            async fn get_many(
                &mut self,
                bucket: Resource<Bucket>,
                keys: Vec<String>,
            ) -> wasmtime::Result<Result<Vec<$many>, $draft::store::Error>> {
                let found = value!(self.entries(&bucket, keys));
                Ok(Ok(found.into_iter().map($to_many).collect()))
            }

            async fn set_many(
                &mut self,
                bucket: Resource<Bucket>,
                entries: Vec<(String, Vec<u8>)>,
            ) -> wasmtime::Result<Result<(), $draft::store::Error>> {
                for (key, value) in entries {
                    value!(self.put(&bucket, &key, value));
                }
                Ok(Ok(()))
            }

            async fn delete_many(
                &mut self,
                bucket: Resource<Bucket>,
                keys: Vec<String>,
            ) -> wasmtime::Result<Result<(), $draft::store::Error>> {
                for key in keys {
                    value!(self.remove(&bucket, &key));
                }
                Ok(Ok(()))
            }
        }

        impl $draft::atomics::Host for CallState {
            async fn increment(
                &mut self,
                bucket: Resource<Bucket>,
                key: String,
                delta: $integer,
            ) -> wasmtime::Result<Result<$integer, $draft::store::Error>> {
                let sum = self.add(&bucket, &key, delta.into()).await?;
                Ok(sum.map_err(Into::into))
            }

            $($swap)*
        }
    };
}

keyvalue!(
    draft,
    u64,
    u64,
    page_at,
    Option<(String, Vec<u8>)>,
    |(key, value)| value.map(|value| (key, value)),
    {}
);

keyvalue!(
    draft2,
    i64,
    String,
    page,
    (String, Option<Vec<u8>>),
    |many| many,
    {
        async fn swap(
            &mut self,
            cas: Resource<Cas>,
            value: Vec<u8>,
        ) -> wasmtime::Result<Result<(), draft2::atomics::CasError>> {
            let Cas { key, version, .. } = self.ctx().table.delete(cas)?;
            let swapped = state::Host::compare_and_set(self, key.clone(), version, value);
            match swapped.await? {
                Ok(_) => Ok(Ok(())),
                Err(state::Error::VersionMismatch(_)) => {
                    let newer = match self.cas(key).await? {
                        Ok(newer) => newer,
                        Err(error) => return Ok(Err(error.into())),
                    };
                    Ok(Err(draft2::atomics::CasError::CasFailed(newer)))
                }
                Err(error) => Ok(Err(Error::from(error).into())),
            }
        }
    }
);

impl From<Error> for draft2::atomics::CasError {
    fn from(error: Error) -> Self {
        draft2::atomics::CasError::StoreError(error.into())
    }
}

impl CallState {
    /// The current value of a key, to compare and swap.
    async fn cas(&mut self, key: String) -> Outcome<Resource<Cas>> {
        let entry = value!(state::Host::get(self, key.clone()));
        let (version, value) = entry.map(|entry| (entry.version, entry.value)).unzip();
        let cas = Cas {
            key,
            version,
            value,
        };
        Ok(Ok(self.ctx().table.push(cas)?))
    }
}

impl draft2::atomics::HostCas for CallState {
    async fn new(
        &mut self,
        bucket: Resource<Bucket>,
        key: String,
    ) -> wasmtime::Result<Result<Resource<Cas>, draft2::store::Error>> {
        let key = self.key_of(&bucket, &key)?;
        Ok(self.cas(key).await?.map_err(Into::into))
    }

    async fn current(
        &mut self,
        cas: Resource<Cas>,
    ) -> wasmtime::Result<Result<Option<Vec<u8>>, draft2::store::Error>> {
        Ok(Ok(self.ctx().table.get(&cas)?.value.clone()))
    }

    async fn drop(&mut self, cas: Resource<Cas>) -> wasmtime::Result<()> {
        self.ctx().table.delete(cas)?;
        Ok(())
    }
}
