//! Calls itself without end until the stack overflows.

use std::hint::black_box;

use oncely_guest::Failure;

pub fn run() -> Result<(), Failure> {
    match deeper(0) {
        0 => Ok(()),
        depth => Err(Failure::reject(format!("came back from depth {depth}"))),
    }
}

#[allow(unconditional_recursion, reason = "that is what it is for")]
fn deeper(depth: u64) -> u64 {
    // Looking at the result keeps the call from becoming a jump.
    black_box(deeper(black_box(depth + 1))) + 1
}
