//! Circuit breakers, one for each stream, and their published state.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RelayState;
use crate::model::breaker::{Breaker, Permit};

/// The breakers of the streams that outputs go to. An output with an unknown stream is always
/// tried.
pub struct Breakers {
    by_stream: HashMap<String, Breaker>,
    state: Arc<RelayState>,
}

impl Breakers {
    pub fn new(state: Arc<RelayState>) -> Self {
        Breakers {
            by_stream: HashMap::new(),
            state,
        }
    }

    /// Delay before the next publish to a stream. `None` to publish now.
    pub fn delay(&mut self, stream: Option<&str>, now: Instant) -> Option<Duration> {
        match self.with(stream, |breaker| breaker.permit(now))? {
            Permit::Granted => None,
            // Jitter, so that outputs do not return at the same moment.
            Permit::Denied(wait) => Some(wait + wait.mul_f64(rand::random::<f64>() / 4.0)),
        }
    }

    /// A stream stored a message.
    pub fn succeeded(&mut self, stream: &str) {
        if self.with(Some(stream), Breaker::succeeded) == Some(true) {
            tracing::info!(stream, "breaker closed, publishing resumed");
        }
    }

    /// A stream did not answer, or refused every message.
    pub fn failed(&mut self, stream: Option<&str>, why: &str) {
        let opened = self.with(stream, |breaker| {
            breaker.failed(Instant::now(), rand::random(), why)
        });
        if let (Some(true), Some(stream)) = (opened, stream) {
            tracing::warn!(stream, error = why, "breaker opened, publishing suspended");
        }
    }

    /// The outcome says nothing about the stream: the output failed for another reason, or was not
    /// sent.
    pub fn inconclusive(&mut self, stream: Option<&str>) {
        self.with(stream, |breaker| breaker.inconclusive(Instant::now()));
    }

    /// Time until the next probe of a stream. Zero when its breaker is closed or the stream is
    /// unknown.
    pub fn open_for(&self, stream: Option<&str>, now: Instant) -> Duration {
        stream
            .and_then(|stream| self.by_stream.get(stream))
            .map_or(Duration::ZERO, |breaker| breaker.open_for(now))
    }

    fn with<T>(
        &mut self,
        stream: Option<&str>,
        update: impl FnOnce(&mut Breaker) -> T,
    ) -> Option<T> {
        let stream = stream?;
        if !self.by_stream.contains_key(stream) {
            self.by_stream
                .insert(stream.to_owned(), Breaker::new(Instant::now()));
        }
        let breaker = self.by_stream.get_mut(stream)?;
        let result = update(breaker);
        self.state.set_breaker(stream, breaker);
        Some(result)
    }
}
