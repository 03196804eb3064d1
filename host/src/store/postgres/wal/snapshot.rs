//! The transactions visible at a moment, by their 32-bit ids in the WAL.

use anyhow::{Context, Result};

/// The value of `pg_current_snapshot()` without the upper half of its ids. No transaction in the
/// WAL is two billion transactions old, so the lower half is unambiguous.
pub(super) struct Snapshot {
    /// This transaction and all later ones are invisible.
    end: u32,
    /// Earlier transactions that are invisible, too.
    running: Vec<u32>,
}

impl Snapshot {
    /// Parses a snapshot in PostgreSQL's notation, such as `10:20:10,14`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let read = || {
            let (_, rest) = text.split_once(':')?;
            let (end, running) = rest.split_once(':')?;
            let running = running
                .split(',')
                .filter(|number| !number.is_empty())
                .map(lower_half);
            Some(Snapshot {
                end: lower_half(end)?,
                running: running.collect::<Option<_>>()?,
            })
        };
        read().with_context(|| format!("parse the snapshot `{text}`"))
    }

    /// Whether the effects of this committed transaction are visible.
    pub(super) fn sees(&self, transaction: u32) -> bool {
        // Ids wrap around: of two ids, the later one exceeds the other by less than half of the
        // range.
        let is_before_end = transaction.wrapping_sub(self.end) > u32::MAX / 2;
        is_before_end && !self.running.contains(&transaction)
    }
}

fn lower_half(number: &str) -> Option<u32> {
    let number: u64 = number.parse().ok()?;
    u32::try_from(number & u64::from(u32::MAX)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_and_later_transactions_are_not_visible() {
        let snapshot = Snapshot::parse("10:20:10,14").unwrap();
        let seen: Vec<u32> = (8..24).filter(|number| snapshot.sees(*number)).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
        let idle = Snapshot::parse("20:20:").unwrap();
        assert!(idle.sees(19) && !idle.sees(20));
    }

    #[test]
    fn wrapped_transaction_ids_are_distinguished() {
        // The second to last id of the first epoch, and the fourth id of the second epoch.
        let snapshot = Snapshot::parse("4294967294:4294967300:4294967294,4294967299").unwrap();
        assert!(!snapshot.sees(4_294_967_294) && snapshot.sees(4_294_967_295));
        assert!(snapshot.sees(2) && !snapshot.sees(3) && !snapshot.sees(4));
    }

    #[test]
    fn an_invalid_snapshot_is_an_error() {
        assert!(
            ["", "1", "1:2", "a:b:", "1:2:x"]
                .iter()
                .all(|text| Snapshot::parse(text).is_err())
        );
    }
}
