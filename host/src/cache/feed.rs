//! Receives invalidations of other hosts and applies them to this host's cache.

use std::time::{Duration, Instant};

use crate::bus::{Feed, FeedEvent};
use crate::cache::Cache;
use crate::drain::Stopping;
use crate::model::invalidation::Invalidation;
use crate::model::retry::LastError;

/// The delay before a retry when the feed is unavailable.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// The shortest interval between two warnings about malformed invalidations.
const WARN_INTERVAL: Duration = Duration::from_secs(30);

/// Applies invalidations until the host stops. While the feed is unavailable, cached values last at
/// most their time to live. After a gap everything in this process is dropped.
pub async fn listen(mut feed: Feed, cache: Cache, mut stopping: Stopping) {
    let mut trouble = LastError::default();
    let mut warned = None;
    loop {
        let event = tokio::select! {
            biased;
            () = stopping.stopped() => return,
            event = feed.next() => event,
        };
        match event {
            Ok(event) => {
                trouble.clear();
                apply(&cache, event, &mut warned).await;
            }
            Err(error) => {
                let why = format!("{error:#}");
                if trouble.is_new(&why) {
                    tracing::warn!(error = why, "cache invalidation feed failed, retrying");
                }
                if stopping.wait(RETRY_DELAY).await {
                    return;
                }
            }
        }
    }
}

/// Applies one event. `warned` is the time of the last warning about a malformed message, so that
/// many of them do not flood the log.
async fn apply(cache: &Cache, event: FeedEvent, warned: &mut Option<Instant>) {
    match event {
        FeedEvent::Message(body) => match Invalidation::read(&body) {
            Ok(invalidation) => cache.apply_invalidation(&invalidation).await,
            Err(error) => {
                if warned.is_none_or(|last| last.elapsed() >= WARN_INTERVAL) {
                    tracing::warn!(
                        error = error.to_string(),
                        "malformed cache invalidation, clearing the local cache"
                    );
                    *warned = Some(Instant::now());
                }
                cache.clear_local();
            }
        },
        FeedEvent::Gap => {
            tracing::info!("cache invalidations may have been missed, clearing the local cache");
            cache.clear_local();
        }
    }
}
