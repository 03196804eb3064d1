//! The guests that workers run: one for all workers with the same component.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::Result;
use bytes::Bytes;

use super::component::{Guest, LinkedComponent};
use super::engine::GuestEngine;

/// The guests that workers run, by the digests of their components.
#[derive(Default)]
pub struct SharedGuests(Mutex<HashMap<String, Place>>);

/// The guest of one digest. It is locked while the guest is loaded.
type Place = Arc<tokio::sync::Mutex<Weak<LinkedComponent>>>;

impl SharedGuests {
    /// The guest of a component that is known by its digest. It is loaded unless another worker
    /// runs it; `read` reads the component.
    ///
    /// # Errors
    /// Those of [`Guest::load`], and those of `read`.
    pub async fn get(
        &self,
        engine: &GuestEngine,
        digest: &str,
        read: impl AsyncFnOnce() -> Result<Bytes>,
    ) -> Result<Guest> {
        let place = self.place(digest);
        let mut place = place.lock().await;
        if let Some(linked) = place.upgrade() {
            return Ok(Guest(linked));
        }
        let guest = Guest::load(engine, read().await?).await?;
        *place = Arc::downgrade(&guest.0);
        Ok(guest)
    }

    /// The place of a digest. Places of guests that no worker runs any more are removed.
    fn place(&self, digest: &str) -> Place {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = places.get(digest) {
            return Arc::clone(place);
        }
        places.retain(|_, place| {
            // One that is held elsewhere is being loaded.
            Arc::strong_count(place) > 1
                || place.try_lock().is_ok_and(|guest| guest.strong_count() > 0)
        });
        Arc::clone(places.entry(digest.to_owned()).or_default())
    }
}
