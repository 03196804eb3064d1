//! Allocates without bound and writes to every page, so that the memory is really used.

use std::hint::black_box;

use oncely_guest::Failure;

const CHUNK_BYTES: usize = 1 << 20;

pub fn run() -> Result<(), Failure> {
    let mut hoard = Vec::new();
    loop {
        hoard.push(black_box(vec![1_u8; CHUNK_BYTES]));
    }
}
