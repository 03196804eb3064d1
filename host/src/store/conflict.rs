//! Pauses between tries of transactions that collide.

use std::time::Duration;

/// The most a transaction waits after its first conflict; in proportion after more.
const FIRST: Duration = Duration::from_millis(5);

/// Waits for a random time, longer after more conflicts, so that transactions that collided do not collide again.
pub async fn pause_after(conflicts: u32) {
    tokio::time::sleep(FIRST.mul_f64(f64::from(conflicts) * rand::random::<f64>())).await;
}
