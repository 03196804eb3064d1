//! A circuit breaker: opens after several failures in a row, then a single probe decides.
//!
//! Time and randomness are arguments. The breaker does not depend on the guarded resource.

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Failures in a row that open the breaker.
const FAILURE_THRESHOLD: u32 = 5;

/// How long the breaker stays open the first time. Each failed probe doubles the time.
const OPEN_MIN: Duration = Duration::from_millis(500);

/// The upper limit of that doubling. A recovery is detected within this time.
const OPEN_MAX: Duration = Duration::from_secs(8);

/// How long a probe may stay unanswered before the next one is granted.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long callers wait while a probe is in flight.
const PROBE_RETRY_AFTER: Duration = Duration::from_millis(500);

/// The decision of a breaker on a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// The call may proceed.
    Granted,
    /// The call may not proceed for this long.
    Denied(Duration),
}

/// The public state of a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "BreakerCondition")]
pub enum State {
    /// Calls proceed.
    Closed,
    /// Calls are denied.
    Open,
    /// One probe is in flight.
    HalfOpen,
}

/// A circuit breaker, closed at first.
#[derive(Debug, Clone)]
pub struct Breaker {
    state: State,
    /// Failures in a row.
    failures: u32,
    /// Number of times that it opened in a row.
    opened: u32,
    /// The end of the open time, or of the time for the probe.
    until: Instant,
    last_error: String,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(now: Instant) -> Self {
        Breaker {
            state: State::Closed,
            failures: 0,
            opened: 0,
            until: now,
            last_error: String::new(),
        }
    }

    /// The current state.
    pub fn state(&self) -> State {
        self.state
    }

    /// The last failure, for display.
    pub fn last_error(&self) -> &str {
        &self.last_error
    }

    /// Decides whether a call may proceed now. The first call after the open time is the probe.
    pub fn permit(&mut self, now: Instant) -> Permit {
        if self.state == State::Closed {
            return Permit::Granted;
        }
        if now < self.until {
            let left = self.until - now;
            return Permit::Denied(if self.state == State::HalfOpen {
                left.min(PROBE_RETRY_AFTER)
            } else {
                left
            });
        }
        self.state = State::HalfOpen;
        self.until = now + PROBE_TIMEOUT;
        Permit::Granted
    }

    /// How long calls are denied from now on.
    pub fn open_for(&self, now: Instant) -> Duration {
        if self.state == State::Closed {
            Duration::ZERO
        } else {
            self.until.saturating_duration_since(now)
        }
    }

    /// Records a success. Returns whether it closed the breaker.
    pub fn succeeded(&mut self) -> bool {
        let was_closed = self.state == State::Closed;
        (self.state, self.failures, self.opened) = (State::Closed, 0, 0);
        !was_closed
    }

    /// Records a failure. Returns whether it opened the breaker. A call that began before the
    /// breaker opened does not extend the open time.
    pub fn failed(&mut self, now: Instant, random: f64, last_error: &str) -> bool {
        self.failures = self.failures.saturating_add(1);
        last_error.clone_into(&mut self.last_error);
        let opens = match self.state {
            State::Closed => self.failures >= FAILURE_THRESHOLD,
            State::HalfOpen => true,
            State::Open => false,
        };
        if opens {
            let most = OPEN_MIN
                .saturating_mul(2_u32.saturating_pow(self.opened))
                .min(OPEN_MAX);
            self.state = State::Open;
            self.opened = self.opened.saturating_add(1);
            // Uniform between half of the time and all of it, so that hosts do not probe together.
            self.until = now + most / 2 + (most / 2).mul_f64(random.clamp(0.0, 1.0));
        }
        opens
    }

    /// Records a call that says nothing about the resource: it failed for another reason, or was
    /// not made. If it was the probe, the next call is another probe.
    pub fn inconclusive(&mut self, now: Instant) {
        if self.state == State::HalfOpen {
            (self.state, self.until) = (State::Open, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trip(breaker: &mut Breaker, now: Instant, random: f64) {
        for failure in 1..=FAILURE_THRESHOLD {
            assert_eq!(
                breaker.failed(now, random, "x"),
                failure == FAILURE_THRESHOLD
            );
        }
    }

    #[test]
    fn consecutive_failures_open_it_and_one_probe_closes_it() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        for _ in 1..FAILURE_THRESHOLD {
            assert!(!breaker.failed(now, 0.0, "no answer"));
        }
        // A success in between restarts the count.
        breaker.succeeded();
        for _ in 1..FAILURE_THRESHOLD {
            assert!(!breaker.failed(now, 0.0, "no answer"));
        }
        assert_eq!(breaker.permit(now), Permit::Granted);
        assert!(breaker.failed(now, 1.0, "no answer"));
        assert_eq!(
            (breaker.state(), breaker.last_error()),
            (State::Open, "no answer")
        );
        assert_eq!(breaker.permit(now), Permit::Denied(OPEN_MIN));
        let later = now + OPEN_MIN;
        assert_eq!(breaker.permit(later), Permit::Granted);
        assert_eq!(breaker.state(), State::HalfOpen);
        assert!(
            matches!(breaker.permit(later), Permit::Denied(_)),
            "two probes at a time"
        );
        assert!(breaker.succeeded());
        assert_eq!(breaker.permit(later), Permit::Granted);
    }

    #[test]
    fn each_failed_probe_doubles_the_open_time_up_to_a_limit() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(now);
        trip(&mut breaker, now, 1.0);
        let mut waited = Vec::new();
        for _ in 0..6 {
            let Permit::Denied(wait) = breaker.permit(now) else {
                panic!("the breaker is not open")
            };
            waited.push(wait.as_millis());
            now += wait;
            assert_eq!(breaker.permit(now), Permit::Granted);
            assert!(breaker.failed(now, 1.0, "x"));
        }
        assert_eq!(waited, [500, 1_000, 2_000, 4_000, 8_000, 8_000]);
    }

    #[test]
    fn in_flight_failures_do_not_extend_the_open_state() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        trip(&mut breaker, now, 0.5);
        let before = breaker.permit(now);
        assert!(!breaker.failed(now, 1.0, "x"));
        assert_eq!(breaker.permit(now), before);
    }

    #[test]
    fn an_unanswered_probe_is_followed_by_another() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(now);
        trip(&mut breaker, now, 0.0);
        now += OPEN_MIN;
        assert_eq!(breaker.permit(now), Permit::Granted);
        assert_eq!(breaker.permit(now), Permit::Denied(PROBE_RETRY_AFTER));
        now += PROBE_TIMEOUT;
        assert_eq!(breaker.permit(now), Permit::Granted);
        breaker.inconclusive(now);
        assert_eq!(
            (breaker.state(), breaker.permit(now)),
            (State::Open, Permit::Granted)
        );
    }
}
