//! Sends one message of `bytes` bytes to `out.huge`: more than any broker accepts.
//!
//! Options: `{"bytes": 10485760}`.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { bytes: 10 << 20 }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    outbox::send(Outgoing::new("out.huge", vec![b'x'; options.bytes]))?;
    Ok(())
}
