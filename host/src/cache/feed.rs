//! Hears of what other hosts invalidated, and applies it to the cache of this one.

use std::time::{Duration, Instant};

use crate::bus::{Feed, Heard};
use crate::cache::Cache;
use crate::drain::Stopping;
use crate::model::invalidation::Invalidation;
use crate::model::retry::Trouble;

/// How soon it asks again when it could not.
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// How often it is logged that an invalidation cannot be read.
const WARN_EVERY: Duration = Duration::from_secs(30);

/// Listens until the host stops. While nobody can be heard, cached values last for their time to live; when something went by
/// unheard, everything in this process is forgotten.
pub async fn listen(mut feed: Feed, cache: Cache, mut stopping: Stopping) {
    let mut trouble = Trouble::default();
    let mut warned = None;
    loop {
        let heard = tokio::select! {
            biased;
            () = stopping.stopped() => return,
            heard = feed.next() => heard,
        };
        match heard {
            Ok(heard) => {
                trouble.over();
                apply(&cache, heard, &mut warned).await;
            }
            Err(error) => {
                let why = format!("{error:#}");
                if trouble.is_new(&why) {
                    tracing::warn!("listening for invalidations of the cache again soon: {why}");
                }
                if stopping.wait(AGAIN_AFTER).await {
                    return;
                }
            }
        }
    }
}

/// `warned` is when the last warning was logged of a message that cannot be read: whoever publishes many of them fills no log.
async fn apply(cache: &Cache, heard: Heard, warned: &mut Option<Instant>) {
    match heard {
        Heard::Message(body) => match Invalidation::read(&body) {
            Ok(invalidation) => cache.hear(&invalidation).await,
            Err(error) => {
                if warned.is_none_or(|last| last.elapsed() >= WARN_EVERY) {
                    tracing::warn!(%error, "an invalidation cannot be read, forgetting all that is cached here");
                    *warned = Some(Instant::now());
                }
                cache.forget_local();
            }
        },
        Heard::Gap => {
            tracing::info!("forgetting all that is cached here: invalidations may have gone by unheard");
            cache.forget_local();
        }
    }
}
