//! Random pauses between attempts of conflicting transactions.

use std::time::Duration;

/// The maximum pause after the first conflict. It grows in proportion to the number of conflicts.
const FIRST_PAUSE_MAX: Duration = Duration::from_millis(5);

/// Sleeps for a random time that grows with the number of conflicts, so that the same transactions
/// do not conflict again.
pub async fn pause_after(conflicts: u32) {
    tokio::time::sleep(FIRST_PAUSE_MAX.mul_f64(f64::from(conflicts) * rand::random::<f64>())).await;
}
