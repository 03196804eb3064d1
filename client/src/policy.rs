//! The wait before the next try: exponential backoff with full jitter. Randomness is an argument.

use std::time::Duration;

use crate::Error;

/// The times of a client; see [`Builder`](crate::Builder) for their meaning.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    pub deadline: Duration,
    pub try_timeout: Duration,
    pub backoff: Duration,
    pub backoff_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            deadline: Duration::from_secs(30),
            try_timeout: Duration::from_secs(10),
            backoff: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

impl Policy {
    /// The wait after try number `tries` (from 1) failed, or `None` if it would reach the deadline,
    /// which is `left` away.
    ///
    /// Without `Retry-After` the wait is uniformly distributed between zero and the doubled
    /// backoff, so that clients that failed together do not retry together. The wait is never
    /// shorter than `Retry-After`. The server may have sent the same value to all clients, so a
    /// random part is added to it. The range of that part is at least half of `Retry-After`, and
    /// ends at the deadline.
    pub fn wait(
        &self,
        tries: u32,
        retry_after: Option<Duration>,
        left: Duration,
        random: f64,
    ) -> Option<Duration> {
        let window = doubled(self.backoff, tries.saturating_sub(1), self.backoff_max);
        let wait = match retry_after {
            None => scale(window, random),
            Some(retry_after) => retry_after.saturating_add(scale(
                window
                    .max(retry_after / 2)
                    .min(left.saturating_sub(retry_after)),
                random,
            )),
        };
        (wait < left).then_some(wait)
    }

    pub fn check(&self) -> Result<(), Error> {
        let times = [
            self.deadline,
            self.try_timeout,
            self.backoff,
            self.backoff_max,
        ];
        match times.iter().all(|time| *time >= Duration::from_millis(1))
            && self.backoff <= self.backoff_max
        {
            true => Ok(()),
            false => Err(Error::Invalid(format!(
                "invalid times: deadline {:?}, try_timeout {:?}, backoff {:?} up to {:?}; each must be \
                 at least 1 ms, and the first backoff must not exceed the last",
                self.deadline, self.try_timeout, self.backoff, self.backoff_max
            ))),
        }
    }
}

fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    2_u32
        .checked_pow(times)
        .and_then(|factor| first.checked_mul(factor))
        .map_or(most, |wait| wait.min(most))
}

/// `duration` times `random`. A `random` that is not a number counts as 0.
fn scale(duration: Duration, random: f64) -> Duration {
    let random = if random.is_nan() {
        0.0
    } else {
        random.clamp(0.0, 1.0)
    };
    // A product that rounds up beyond the largest duration would panic.
    Duration::try_from_secs_f64(duration.as_secs_f64() * random)
        .unwrap_or(duration)
        .min(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_longest_wait_doubles_until_the_cap() {
        let policy = Policy::default();
        let most: Vec<_> = (1..=8)
            .map(|tries| policy.wait(tries, None, LONG, 1.0).unwrap().as_millis())
            .collect();
        assert_eq!(most, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(policy.wait(3, None, LONG, 0.0), Some(Duration::ZERO));
        assert_eq!(policy.wait(u32::MAX, None, LONG, 0.5), Some(ms(2500)));
    }

    #[test]
    fn retry_after_is_honoured_and_jitter_added_after_it() {
        let policy = Policy::default();
        let second = Some(ms(1000));
        assert_eq!(policy.wait(1, second, LONG, 0.0), Some(ms(1000)));
        assert_eq!(policy.wait(1, second, LONG, 1.0), Some(ms(1500)));
        assert_eq!(policy.wait(6, second, LONG, 1.0), Some(ms(4200)));
        // The random part is cut at the deadline; `Retry-After` is not.
        assert_eq!(policy.wait(1, second, ms(1200), 0.5), Some(ms(1100)));
        assert_eq!(policy.wait(1, second, ms(1000), 0.0), None);
        assert_eq!(
            policy.wait(1, Some(Duration::MAX), Duration::MAX, 0.5),
            None
        );
    }

    #[test]
    fn a_wait_beyond_the_deadline_is_not_started() {
        let policy = Policy::default();
        assert_eq!(policy.wait(8, None, ms(2000), 0.5), None);
        assert_eq!(policy.wait(8, None, ms(2000), 0.25), Some(ms(1250)));
    }

    #[test]
    fn wait_accepts_any_numbers() {
        let policy = Policy {
            backoff: Duration::MAX,
            backoff_max: Duration::MAX,
            ..Policy::default()
        };
        for random in [f64::NAN, f64::INFINITY, -1.0, 0.0, 0.999, 1.0, 7.0] {
            for retry_after in [None, Some(Duration::ZERO), Some(Duration::MAX)] {
                for left in [Duration::ZERO, ms(1), Duration::MAX] {
                    let wait = policy.wait(u32::MAX, retry_after, left, random);
                    assert!(wait.is_none_or(|wait| wait < left));
                }
            }
        }
    }

    #[test]
    fn check_refuses_invalid_times() {
        assert!(Policy::default().check().is_ok());
        assert!(
            Policy {
                backoff: Duration::ZERO,
                ..Policy::default()
            }
            .check()
            .is_err()
        );
        assert!(
            Policy {
                backoff: LONG,
                ..Policy::default()
            }
            .check()
            .is_err()
        );
        assert!(
            Policy {
                deadline: Duration::ZERO,
                ..Policy::default()
            }
            .check()
            .is_err()
        );
    }
}
