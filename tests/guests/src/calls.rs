//! Sends the number of calls to this instance to `out.calls`: 1 in a fresh one.

use std::sync::atomic::{AtomicU32, Ordering};

use oncely_guest::{Failure, outbox, outbox::Outgoing};

static CALLS: AtomicU32 = AtomicU32::new(0);

pub fn run() -> Result<(), Failure> {
    let call = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    outbox::send(Outgoing::json("out.calls", &call)?)?;
    Ok(())
}
