//! The cache: read outside the transaction, and changed after its commit.

use std::time::Duration;

use bytes::Bytes;

use super::READ_ONLY_REQUEST;
use crate::guest::bindings::oncely::worker::cache;
use crate::guest::record::{HostCall, HostResult};
use crate::guest::state::CallState;
use crate::model::cache_writes::{
    CachePut, PUTS_SIZE_MAX, TAGS_MAX, TTL_MAX, VALUE_MAX, WRITES_MAX, check_name,
};

impl cache::Host for CallState {
    async fn get(
        &mut self,
        key: String,
    ) -> wasmtime::Result<Result<Option<Vec<u8>>, cache::Error>> {
        self.check_deadline()?;
        if let Err(why) = check_name("key", &key) {
            return Ok(Err(cache::Error::InvalidKey(why)));
        }
        let value = match self
            .call
            .recorder
            .begin_call(key.len(), || HostCall::CacheGet { key: key.clone() })?
        {
            Some(HostResult::Cached(value)) => value,
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                let value = self.cached(&key).await;
                self.call
                    .recorder
                    .finish_call(value.as_ref().map_or(0, Bytes::len), || {
                        HostResult::Cached(value.clone())
                    });
                value
            }
        };
        Ok(Ok(value.map(Into::into)))
    }

    async fn put(
        &mut self,
        key: String,
        value: Vec<u8>,
        ttl_ms: u64,
        tags: Vec<String>,
    ) -> wasmtime::Result<Result<(), cache::Error>> {
        self.check_deadline()?;
        let ttl = Duration::from_millis(ttl_ms);
        if let Err(error) = self.check_put(&key, value.len(), ttl, &tags) {
            return Ok(Err(error));
        }
        let value = Bytes::from(value);
        let call = || HostCall::CachePut {
            key: key.clone(),
            value: value.clone(),
            ttl_ms,
            tags: tags.clone(),
        };
        self.call
            .recorder
            .record_call(key.len() + value.len() + size(&tags), call)?;
        self.cache.put(key, CachePut { value, ttl, tags });
        Ok(Ok(()))
    }

    async fn invalidate(
        &mut self,
        tags: Vec<String>,
    ) -> wasmtime::Result<Result<(), cache::Error>> {
        self.check_deadline()?;
        if !self.may_write() {
            return Ok(Err(cache::Error::Other(READ_ONLY_REQUEST.to_owned())));
        }
        if let Err(error) = check_tags(&tags, WRITES_MAX.saturating_sub(self.cache.tags().len())) {
            return Ok(Err(error));
        }
        self.call
            .recorder
            .record_call(size(&tags), || HostCall::CacheInvalidate {
                tags: tags.clone(),
            })?;
        self.cache.invalidate(tags);
        Ok(Ok(()))
    }
}

impl CallState {
    /// The value that this call put, or else the cached value if this call did not invalidate it.
    async fn cached(&mut self, key: &str) -> Option<Bytes> {
        if let Some(put) = self.cache.pending_put(key) {
            return Some(put.value.clone());
        }
        let found = self.call.cache.get(key).await?;
        (!self.cache.invalidates(&found.tags)).then_some(found.value)
    }

    fn check_put(
        &self,
        key: &str,
        size: usize,
        ttl: Duration,
        tags: &[String],
    ) -> Result<(), cache::Error> {
        check_name("key", key).map_err(cache::Error::InvalidKey)?;
        check_tags(tags, TAGS_MAX)?;
        if ttl.is_zero() || ttl > TTL_MAX {
            return Err(cache::Error::InvalidTtl(
                "the time to live must be between 1 ms and 24 hours".to_owned(),
            ));
        }
        if size > VALUE_MAX {
            return Err(cache::Error::TooLarge(format!(
                "the value has {size} bytes; at most {VALUE_MAX} are allowed"
            )));
        }
        if self.cache.puts_count() >= WRITES_MAX {
            return Err(cache::Error::TooMany(format!(
                "a delivery may put {WRITES_MAX} values"
            )));
        }
        if self.cache.puts_size() + size > PUTS_SIZE_MAX {
            let why = format!("the values of this delivery exceed {PUTS_SIZE_MAX} bytes in total");
            return Err(cache::Error::TooLarge(why));
        }
        Ok(())
    }
}

fn check_tags(tags: &[String], most: usize) -> Result<(), cache::Error> {
    if tags.len() > most {
        return Err(cache::Error::TooMany(format!(
            "too many tags: at most {TAGS_MAX} for a value and {WRITES_MAX} invalidated by a \
             delivery are allowed"
        )));
    }
    tags.iter()
        .try_for_each(|tag| check_name("tag", tag))
        .map_err(cache::Error::InvalidTag)
}

fn size(tags: &[String]) -> usize {
    tags.iter().map(|tag| tag.len() + 8).sum()
}
