//! Sends `n` small messages to `out.many`: more than the output limit of a delivery.
//!
//! Options: `{"n": 100000}`.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    n: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { n: 100_000 }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    for number in 0..options.n {
        outbox::send(Outgoing::new("out.many", number.to_string()))?;
    }
    Ok(())
}
