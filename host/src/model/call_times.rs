//! Times of calls, counted by buckets that each are √2 times as long as the one before.

use std::time::Duration;

/// The number of buckets: from 0.1 ms to 75 seconds, and the last one for all longer times.
pub const BUCKETS: usize = 40;

/// The upper limit of the first bucket, in microseconds.
const FIRST_US: f64 = 100.0;

/// The bucket of a time.
pub fn bucket(time: Duration) -> usize {
    let ratio = time.as_secs_f64() * 1_000_000.0 / FIRST_US;
    // The logarithm of the ratio, to the base √2.
    let place = (ratio.max(1.0).log2() * 2.0).ceil();
    (place as usize).min(BUCKETS - 1)
}

/// The upper limit of a bucket, in microseconds.
fn limit_us(bucket: usize) -> u64 {
    (FIRST_US * 2f64.powf(bucket as f64 / 2.0)).round() as u64
}

/// The time within which this share of the calls ended, in microseconds: the upper limit of its
/// bucket. `None` without calls.
pub fn quantile_us(counts: &[u64], share: f64) -> Option<u64> {
    let total: u64 = counts.iter().sum();
    let wanted = (total as f64 * share).ceil().max(1.0) as u64;
    let mut sum = 0;
    let found = counts.iter().position(|count| {
        sum += count;
        sum >= wanted
    });
    found.filter(|_| total > 0).map(limit_us)
}

/// Adds counts to others, bucket by bucket.
pub fn add(to: &mut Vec<u64>, counts: &[u64]) {
    if to.len() < counts.len() {
        to.resize(counts.len(), 0);
    }
    for (sum, count) in to.iter_mut().zip(counts) {
        *sum += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_bucket_with_its_limit() {
        for (us, limit) in [
            (0, 100),
            (100, 100),
            (101, 141),
            (1_000, 1_131),
            (60_000_000, 74_145_520),
        ] {
            let found = limit_us(bucket(Duration::from_micros(us)));
            assert!(found.abs_diff(limit) <= limit / 100, "{us}: {found}");
        }
        assert_eq!(bucket(Duration::from_secs(3_600)), BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_at_most_half_an_octave_too_high() {
        assert_eq!(quantile_us(&[], 0.5), None);
        assert_eq!(quantile_us(&[0, 0], 0.5), None);
        let mut counts = vec![0; BUCKETS];
        for us in (1..=100).map(|n| n * 1_000) {
            counts[bucket(Duration::from_micros(us))] += 1;
        }
        for (share, exact) in [(0.5, 50_000), (0.99, 99_000)] {
            let found = quantile_us(&counts, share).unwrap();
            assert!(
                (exact..=exact * 142 / 100).contains(&found),
                "{share}: {found}"
            );
        }
        let mut sum = vec![1];
        add(&mut sum, &[1, 2]);
        assert_eq!(sum, [2, 2]);
    }
}
