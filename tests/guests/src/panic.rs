//! Panics.

use oncely_guest::Failure;

#[allow(clippy::panic, reason = "the behaviour under test")]
pub fn run() -> Result<(), Failure> {
    panic!("requested panic");
}
