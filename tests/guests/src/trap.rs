//! Executes an `unreachable` instruction.

use oncely_guest::Failure;

pub fn run() -> Result<(), Failure> {
    std::process::abort();
}
