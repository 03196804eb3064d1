//! Recurses without end until the stack overflows.

use std::hint::black_box;

use oncely_guest::Failure;

pub fn run() -> Result<(), Failure> {
    match deeper(0) {
        0 => Ok(()),
        depth => Err(Failure::reject(format!("returned from depth {depth}"))),
    }
}

#[allow(unconditional_recursion, reason = "the behaviour under test")]
fn deeper(depth: u64) -> u64 {
    // Using the result prevents a tail call.
    black_box(deeper(black_box(depth + 1))) + 1
}
