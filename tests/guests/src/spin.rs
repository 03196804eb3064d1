//! Loops forever.

use std::hint::black_box;

use oncely_guest::Failure;

pub fn run() -> Result<(), Failure> {
    let mut count = 0_u64;
    loop {
        count = black_box(count.wrapping_add(1));
    }
}
