//! Retry delays: exponential backoff with full jitter. Randomness is an argument from 0 to 1.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::units;

/// The longest wait before the next attempt, also if the handler requests a longer one.
pub const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// `[worker.retry]`: the number of attempts, and the waits between them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RetryPolicy {
    /// Attempts before a message is dead-lettered; 1 means no retry.
    pub attempts: u32,
    /// The longest wait after the first failed attempt. It doubles with each further attempt.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub backoff: Duration,
    /// The upper limit of that doubling.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub backoff_max: Duration,
    /// The handling of a trap that repeats after exactly the same host calls and results.
    pub deterministic_failures: OnDeterministicFailure,
}

/// The handling of a deterministic failure: two attempts prove that a third fails in the same way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnDeterministicFailure {
    /// The message is dead-lettered at once.
    #[default]
    DeadLetter,
    /// The message keeps all of its attempts.
    Retry,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            attempts: 5,
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(5 * 60),
            deterministic_failures: OnDeterministicFailure::DeadLetter,
        }
    }
}

impl RetryPolicy {
    /// The wait after failed attempt number `attempt` (from 1).
    ///
    /// Full jitter: the wait is evenly spread between zero and the doubled backoff. Messages that
    /// failed together are thus not retried together. A `requested` wait is a lower bound, capped
    /// at [`WAIT_MAX`] and spread by a tenth of itself.
    pub fn delay_after(&self, attempt: u32, requested: Option<Duration>, random: f64) -> Duration {
        let jittered = scale(
            doubled(self.backoff, attempt.saturating_sub(1), self.backoff_max),
            random,
        );
        let least = requested.unwrap_or_default().min(WAIT_MAX);
        let spread = scale(least / 10, random);
        jittered.max(least + spread).min(WAIT_MAX)
    }

    /// Whether a message with a deterministic failure is not retried.
    pub fn dead_letters_deterministic_failures(&self) -> bool {
        self.deterministic_failures == OnDeterministicFailure::DeadLetter
    }

    /// The longest time over which a message is retried, without waits requested by the handler.
    pub fn max_duration(&self) -> Duration {
        // All waits beyond the doubling are equal.
        let waits = self.attempts.saturating_sub(1);
        let doubling = (0..waits.min(32)).map(|wait| doubled(self.backoff, wait, self.backoff_max));
        doubling
            .sum::<Duration>()
            .saturating_add(self.backoff_max.saturating_mul(waits.saturating_sub(32)))
    }

    /// Whether a message is retried after `attempts` failed attempts.
    pub fn allows_retry(&self, attempts: u32) -> bool {
        attempts < self.attempts
    }
}

/// Waits between attempts to reach something the host needs, such as a connection. They start at
/// 100 ms and double up to 5 s, each uniform between half of the delay and all of it. There is no
/// limit on attempts.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(5);

    /// The wait after one more failure.
    pub fn next(&mut self, random: f64) -> Duration {
        let most = doubled(Self::FIRST, self.failures, Self::MAX);
        self.failures = self.failures.saturating_add(1);
        most / 2 + scale(most / 2, random)
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Records a success: the next wait is short again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    2_u32
        .checked_pow(times)
        .and_then(|factor| first.checked_mul(factor))
        .map_or(most, |wait| wait.min(most))
}

/// `duration` times `random`, which counts as 0 if it is NaN.
fn scale(duration: Duration, random: f64) -> Duration {
    let random = if random.is_nan() {
        0.0
    } else {
        random.clamp(0.0, 1.0)
    };
    duration.mul_f64(random)
}

/// Distinguishes a new error from one that is already logged, for loops that retry at once.
#[derive(Debug, Default)]
pub struct LastError {
    logged: String,
}

impl LastError {
    /// Whether `why` differs from the last error, which it then replaces.
    pub fn is_new(&mut self, why: &str) -> bool {
        let is_new = self.logged != why;
        if is_new {
            why.clone_into(&mut self.logged);
        }
        is_new
    }

    /// Records a success: the same error is new again.
    pub fn clear(&mut self) {
        self.logged.clear();
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn a_repeated_error_is_new_again_after_a_success() {
        let mut trouble = LastError::default();
        assert!(trouble.is_new("a") && !trouble.is_new("a") && trouble.is_new("b"));
        trouble.clear();
        assert!(trouble.is_new("b"));
    }

    fn policy(backoff_ms: u64, backoff_max_ms: u64) -> RetryPolicy {
        RetryPolicy {
            attempts: 5,
            backoff: Duration::from_millis(backoff_ms),
            backoff_max: Duration::from_millis(backoff_max_ms),
            deterministic_failures: OnDeterministicFailure::DeadLetter,
        }
    }

    #[test]
    fn the_longest_wait_doubles_until_the_cap() {
        let policy = policy(1000, 6000);
        let longest: Vec<_> = (1..=5)
            .map(|attempt| policy.delay_after(attempt, None, 1.0).as_secs())
            .collect();
        assert_eq!(longest, [1, 2, 4, 6, 6]);
        assert_eq!(policy.delay_after(3, None, 0.0), Duration::ZERO);
        assert_eq!(policy.delay_after(3, None, 0.25), Duration::from_secs(1));
    }

    #[test]
    fn a_retry_delay_stays_within_its_bounds() {
        let mut rng = rand::rng();
        for _ in 0..10_000 {
            let policy = policy(
                rng.random_range(1..100_000),
                rng.random_range(1..1_000_000_000),
            );
            let requested = rng
                .random_bool(0.5)
                .then(|| Duration::from_millis(rng.random()));
            let random = [0.0, 1.0, f64::NAN, -1.0, 7.0, f64::INFINITY, rng.random()]
                [rng.random_range(0..7)];
            let wait = policy.delay_after(rng.random(), requested, random);
            assert!(wait <= WAIT_MAX);
            match requested {
                Some(requested) => assert!(wait >= requested.min(WAIT_MAX)),
                None => assert!(wait <= policy.backoff_max),
            }
        }
    }

    #[test]
    fn waits_are_spread_evenly_and_not_bunched() {
        let mut rng = rand::rng();
        let policy = policy(1000, 60_000);
        let mut buckets = [0_u32; 10];
        for _ in 0..10_000 {
            let wait = policy.delay_after(4, None, rng.random());
            buckets[usize::try_from(wait.as_millis() / 800).unwrap().min(9)] += 1;
        }
        assert!(
            buckets.iter().all(|count| (800..1200).contains(count)),
            "{buckets:?}"
        );
    }

    #[test]
    fn a_requested_delay_is_honoured_and_capped() {
        let policy = policy(1000, 60_000);
        assert_eq!(
            policy.delay_after(1, Some(Duration::from_secs(600)), 0.0),
            Duration::from_secs(600)
        );
        assert_eq!(
            policy.delay_after(1, Some(Duration::from_secs(600)), 1.0),
            Duration::from_secs(660)
        );
        assert_eq!(policy.delay_after(1, Some(Duration::MAX), 1.0), WAIT_MAX);
        // A short request does not undercut the backoff from the other failures of this message.
        assert_eq!(
            policy.delay_after(5, Some(Duration::from_secs(1)), 1.0),
            Duration::from_secs(16)
        );
    }

    #[test]
    fn attempts_include_the_first_one() {
        assert!(policy(1, 1).allows_retry(4));
        assert!(!policy(1, 1).allows_retry(5));
    }

    #[test]
    fn backoff_grows_to_five_seconds_and_resets_after_a_success() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..8).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.next(0.0), Duration::from_millis(2500));
        backoff.reset();
        assert_eq!(backoff.next(0.0), Duration::from_millis(50));
        for _ in 0..1000 {
            assert!(backoff.next(1.0) <= Duration::from_secs(5));
        }
    }
}
