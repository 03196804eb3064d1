//! Single flight: of all who miss a key at the same time one looks and loads, and the others wait for what comes of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use super::local::Entry;
use super::{CacheKey, Layer, LoadError};

#[derive(Clone, Default)]
pub(super) struct Flights(Arc<Mutex<UnderWay>>);

#[derive(Default)]
struct UnderWay {
    next: u64,
    by_key: HashMap<CacheKey, (u64, Landing)>,
}

/// What came of a flight.
#[derive(Debug, Clone)]
pub(super) enum Landed {
    Kept(Arc<Entry>, Layer),
    /// For the first passenger alone.
    Once(Bytes),
    Failed(LoadError),
}

/// A place on the flight of a key.
pub(super) enum Seat {
    /// There was none: whoever has this sees to it.
    First(Departure, Landing),
    Beside(Landing),
}

/// The end of a flight as its passengers see it.
#[derive(Clone)]
pub(super) struct Landing(watch::Receiver<Option<Landed>>);

/// A flight that is under way until this lands or is dropped.
pub(super) struct Departure {
    flights: Flights,
    key: CacheKey,
    number: u64,
    sender: watch::Sender<Option<Landed>>,
}

impl Flights {
    pub fn board(&self, key: &CacheKey) -> Seat {
        let mut under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, landing)) = under_way.by_key.get(key) {
            return Seat::Beside(landing.clone());
        }
        let (sender, receiver) = watch::channel(None);
        let (number, landing) = (under_way.next, Landing(receiver));
        under_way.next += 1;
        under_way.by_key.insert(key.clone(), (number, landing.clone()));
        Seat::First(Departure { flights: self.clone(), key: key.clone(), number, sender }, landing)
    }
}

impl Departure {
    /// Ends the flight. What it brought is kept by now, so whoever comes from here on finds it or begins another one.
    pub fn land(self, landed: Landed) {
        self.leave();
        self.sender.send_replace(Some(landed));
    }

    fn leave(&self) {
        let mut under_way = self.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        if under_way.by_key.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            under_way.by_key.remove(&self.key);
        }
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Landing {
    /// Waits for the end. An error when the load panicked.
    pub async fn landed(&mut self) -> Result<Landed, LoadError> {
        match self.0.wait_for(Option::is_some).await.map(|landed| landed.clone()) {
            Ok(Some(landed)) => Ok(landed),
            _ => Err(LoadError(Arc::new(anyhow::anyhow!("the load of a cached value did not end properly")))),
        }
    }
}
