//! Hears of what other hosts invalidated, and applies it to the cache of this one.

use std::time::{Duration, Instant};

use crate::bus::{Feed, FeedEvent};
use crate::cache::Cache;
use crate::drain::Stopping;
use crate::model::invalidation::Invalidation;
use crate::model::retry::LastError;

/// How soon it asks again when it could not.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// How often it is logged that an invalidation cannot be read.
const WARN_INTERVAL: Duration = Duration::from_secs(30);

/// Listens until the host stops. While the feed is unavailable, cached values last for their time to live; when something went by
/// unheard, everything in this process is forgotten.
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
                    tracing::warn!("listening for invalidations of the cache again soon: {why}");
                }
                if stopping.wait(RETRY_DELAY).await {
                    return;
                }
            }
        }
    }
}

/// `warned` is when the last warning was logged of a message that cannot be read: whoever publishes many of them fills no log.
async fn apply(cache: &Cache, event: FeedEvent, warned: &mut Option<Instant>) {
    match event {
        FeedEvent::Message(body) => match Invalidation::read(&body) {
            Ok(invalidation) => cache.apply_invalidation(&invalidation).await,
            Err(error) => {
                if warned.is_none_or(|last| last.elapsed() >= WARN_INTERVAL) {
                    tracing::warn!(%error, "an invalidation cannot be read, forgetting all that is cached here");
                    *warned = Some(Instant::now());
                }
                cache.clear_local();
            }
        },
        FeedEvent::Gap => {
            tracing::info!(
                "forgetting all that is cached here: invalidations may have gone by unheard"
            );
            cache.clear_local();
        }
    }
}
