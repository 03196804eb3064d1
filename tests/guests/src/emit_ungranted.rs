//! Sends to a subject that no test manifest grants.

use oncely_guest::{Failure, outbox, outbox::Outgoing};

pub fn run() -> Result<(), Failure> {
    outbox::send(Outgoing::new("forbidden.subject", "let me out"))?;
    Ok(())
}
