//! The retry budget of a client: a share of its operations, so that retries never cause an outage.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// In any ten seconds, retries are at most a share of the operations begun in them, plus a reserve
/// for clients with few operations. The budgets of Finagle and tower count the same way.
#[derive(Debug)]
pub(crate) struct Budget {
    share: f64,
    reserve: u32,
    /// Oldest first, one for each second with operations or retries.
    seconds: VecDeque<Second>,
}

#[derive(Debug)]
struct Second {
    began: Instant,
    operations: u64,
    retries: u64,
}

const WINDOW: Duration = Duration::from_secs(10);

impl Budget {
    pub const SHARE: f64 = 0.2;
    /// Enough to try two or three single operations until their deadline.
    pub const RESERVE: u32 = 30;

    pub fn new(share: f64, reserve: u32) -> Self {
        Budget {
            share,
            reserve,
            seconds: VecDeque::new(),
        }
    }

    /// Counts a new operation, which earns a share of a retry.
    pub fn deposit(&mut self, now: Instant) {
        if let Some(second) = self.second(now) {
            second.operations += 1;
        }
    }

    /// Takes a retry, if one is left.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        let (share, reserve) = (self.share, f64::from(self.reserve));
        let Some(second) = self.second(now) else {
            return false;
        };
        second.retries += 1;
        let (operations, retries) =
            self.seconds
                .iter()
                .fold((0, 0), |(operations, retries), second| {
                    (operations + second.operations, retries + second.retries)
                });
        // The thousandth covers products such as 0.2 × 15, which miss whole numbers by a rounding
        // error.
        let within = retries as f64 <= share * operations as f64 + reserve + 0.001;
        if let (false, Some(second)) = (within, self.seconds.back_mut()) {
            second.retries -= 1;
        }
        within
    }

    /// The current second. Seconds outside the window are dropped.
    fn second(&mut self, now: Instant) -> Option<&mut Second> {
        while self
            .seconds
            .front()
            .is_some_and(|second| now.saturating_duration_since(second.began) >= WINDOW)
        {
            self.seconds.pop_front();
        }
        let current = self
            .seconds
            .back()
            .is_some_and(|second| now.saturating_duration_since(second.began) < WINDOW / 10);
        if !current {
            self.seconds.push_back(Second {
                began: now,
                operations: 0,
                retries: 0,
            });
        }
        self.seconds.back_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of granted retries out of `wanted`.
    fn granted(budget: &mut Budget, wanted: u32, now: Instant) -> usize {
        (0..wanted).filter(|_| budget.withdraw(now)).count()
    }

    #[test]
    fn operations_add_a_share_of_retries_to_the_reserve() {
        let now = Instant::now();
        let mut budget = Budget::new(0.2, 30);
        (0..1000).for_each(|_| budget.deposit(now));
        assert_eq!(granted(&mut budget, 5000, now), 230);
        assert_eq!(granted(&mut budget, 5000, now), 0);
    }

    #[test]
    fn deposits_and_withdrawals_expire_after_ten_seconds() {
        let now = Instant::now();
        let mut budget = Budget::new(0.2, 3);
        (0..10).for_each(|_| budget.deposit(now));
        assert_eq!(granted(&mut budget, 100, now + Duration::from_secs(9)), 5);
        assert_eq!(
            granted(&mut budget, 100, now + Duration::from_secs(11)),
            0,
            "deposits have expired"
        );
        assert_eq!(
            granted(&mut budget, 100, now + Duration::from_secs(19)),
            3,
            "withdrawals have expired"
        );
    }

    #[test]
    fn retries_stay_below_the_share_in_any_ten_seconds() {
        let start = Instant::now();
        let mut budget = Budget::new(0.1, 5);
        let mut taken = Vec::new();
        for tick in 0..600_u32 {
            let now = start + Duration::from_millis(100) * tick;
            (0..10).for_each(|_| budget.deposit(now));
            taken.push(granted(&mut budget, 10, now));
        }
        // A hundred ticks are ten seconds. The counted window is up to a second shorter.
        let most = taken
            .windows(90)
            .map(|ten| ten.iter().sum::<usize>())
            .max()
            .unwrap();
        assert!(most <= 100 + 5, "{most}");
        assert!(taken.iter().sum::<usize>() >= 500, "{taken:?}");
    }

    #[test]
    fn a_zero_budget_grants_no_retry() {
        let now = Instant::now();
        let mut budget = Budget::new(0.0, 0);
        (0..1000).for_each(|_| budget.deposit(now));
        assert_eq!(granted(&mut budget, 10, now), 0);
        assert_eq!(budget.seconds.len(), 1);
    }
}
