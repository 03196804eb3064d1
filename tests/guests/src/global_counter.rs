//! Counts in a static and rejects if an earlier message changed it: instances are never shared.

use std::sync::atomic::{AtomicU32, Ordering};

use oncely_guest::Failure;

static HANDLED: AtomicU32 = AtomicU32::new(0);

pub fn run() -> Result<(), Failure> {
    match HANDLED.fetch_add(1, Ordering::Relaxed) {
        0 => Ok(()),
        before => Err(
            Failure::reject(format!("this instance handled {before} before"))
                .code("instance-reused"),
        ),
    }
}
