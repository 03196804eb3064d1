//! Hears of what other hosts invalidated, and applies it to the cache of this one.

use std::time::Duration;

use crate::bus::{Feed, Heard};
use crate::cache::Cache;
use crate::drain::Stopping;
use crate::invalidation::Invalidation;

/// How soon it asks again when it could not.
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// Listens until the host stops. While nobody can be heard, cached values last for their time to live; when something went by
/// unheard, everything in this process is forgotten.
pub async fn listen(mut feed: Feed, cache: Cache, mut stopping: Stopping) {
    let mut told = String::new();
    loop {
        let heard = tokio::select! {
            biased;
            () = stopping.stopped() => return,
            heard = feed.next() => heard,
        };
        match heard {
            Ok(heard) => {
                told.clear();
                apply(&cache, heard).await;
            }
            Err(error) => {
                let why = format!("{error:#}");
                // It is tried again at once; the same trouble is told of once.
                if why != told {
                    tracing::warn!("listening for invalidations of the cache again soon: {why}");
                    told = why;
                }
                if stopping.wait(AGAIN_AFTER).await {
                    return;
                }
            }
        }
    }
}

async fn apply(cache: &Cache, heard: Heard) {
    match heard {
        Heard::Message(body) => match Invalidation::read(&body) {
            Ok(invalidation) => cache.hear(&invalidation).await,
            Err(error) => {
                tracing::warn!("forgetting all that is cached here: an invalidation cannot be read: {error}");
                cache.forget_local();
            }
        },
        Heard::Gap => {
            tracing::info!("forgetting all that is cached here: invalidations may have gone by unheard");
            cache.forget_local();
        }
    }
}
