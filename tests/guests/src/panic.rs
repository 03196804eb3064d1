//! Panics.

use oncely_guest::Failure;

#[allow(clippy::panic, reason = "that is what it is for")]
pub fn run() -> Result<(), Failure> {
    panic!("told to panic");
}
