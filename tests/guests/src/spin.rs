//! Loops for ever.

use std::hint::black_box;

use oncely_guest::Failure;

pub fn run() -> Result<(), Failure> {
    let mut turns = 0_u64;
    loop {
        turns = black_box(turns.wrapping_add(1));
    }
}
