//! The message that publishes the invalidated cache tags of a transaction to all hosts.
//!
//! It is an output like any other: a row of the invalidating transaction, published by any host. A
//! duplicate or late delivery only invalidates more than necessary.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::cache_writes::EVERYTHING;
use crate::model::message::{Output, OutputKind};

/// The stream of cache invalidations.
pub const CACHE_STREAM: &str = "ONCELY_CACHE";

/// The subjects of [`CACHE_STREAM`].
pub const CACHE_SUBJECTS: &str = "oncely.cache.>";

/// How long a newly created [`CACHE_STREAM`] keeps a message. An existing stream keeps its own
/// limit. A host that was disconnected for longer clears its cache.
pub const CACHE_STREAM_MAX_AGE: Duration = Duration::from_secs(60 * 60);

/// The part of the broker's payload limit that is reserved for headers, in bytes.
const HEADERS_SIZE: usize = 1024;

/// The invalidated tags of a worker, published as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invalidation {
    /// The same on every host. Random, so that a forged message cannot have the id of a later one.
    pub id: String,
    /// The worker whose cache has these tags.
    pub worker: String,
    /// The tags; [`EVERYTHING`] for the whole cache.
    pub tags: BTreeSet<String>,
    /// Just before the commit, by the clock of the committing host.
    pub at: Timestamp,
}

impl Invalidation {
    /// The invalidation of one transaction.
    pub fn new(worker: &str, tags: BTreeSet<String>, at: Timestamp) -> Self {
        let id = format!("cache:{worker}:{}", Uuid::new_v4());
        Invalidation {
            id,
            worker: worker.to_owned(),
            tags,
            at,
        }
    }

    /// The message to `oncely.cache.{worker}`. A message larger than `payload_max` bytes is
    /// replaced by one that invalidates everything.
    ///
    /// # Errors
    ///
    /// Fails if the body cannot be serialized.
    pub fn output(&self, event_id: &str, payload_max: usize) -> serde_json::Result<Output> {
        let mut body = serde_json::to_vec(self)?;
        if body.len() + HEADERS_SIZE > payload_max {
            body = serde_json::to_vec(&Invalidation {
                tags: [EVERYTHING.to_owned()].into(),
                ..self.clone()
            })?;
        }
        Ok(Output {
            kind: OutputKind::Invalidation,
            id: self.id.clone(),
            event_id: event_id.to_owned(),
            ordinal: 0,
            subject: format!("oncely.cache.{}", self.worker),
            headers: vec![("Content-Type".to_owned(), "application/json".to_owned())],
            body: Bytes::from(body),
            ordering_key: None,
            delay: Duration::ZERO,
        })
    }

    /// Parses the body of such a message.
    ///
    /// # Errors
    ///
    /// Fails if the body is not the JSON of an invalidation.
    pub fn read(body: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oversized_invalidation_covers_everything() {
        let tags: BTreeSet<String> = (0..100).map(|n| format!("tag {n}")).collect();
        let invalidation = Invalidation::new("shop", tags, Timestamp::UNIX_EPOCH);
        let output = invalidation.output("e1", 1 << 20).unwrap();
        assert_eq!(
            (output.id.as_str(), output.subject.as_str()),
            (invalidation.id.as_str(), "oncely.cache.shop")
        );
        assert_ne!(
            Invalidation::new("shop", invalidation.tags.clone(), invalidation.at).id,
            invalidation.id
        );
        assert_eq!(Invalidation::read(&output.body).unwrap(), invalidation);
        let cut = Invalidation::read(&invalidation.output("e1", 1_500).unwrap().body).unwrap();
        assert_eq!(cut.tags, BTreeSet::from([EVERYTHING.to_owned()]));
    }
}
