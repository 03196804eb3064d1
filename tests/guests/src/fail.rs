//! Asks for a retry, every time.
//!
//! Options: `{"after_ms": null, "code": null}`; with `after_ms` it asks for no retry before that long.

use std::time::Duration;

use oncely_guest::{Failure, Message};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Options {
    after_ms: Option<u64>,
    code: Option<String>,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    let failure = match options.after_ms {
        Some(after_ms) => {
            Failure::retry_after(Duration::from_millis(after_ms), "told to fail for a while")
        }
        None => Failure::retry("told to fail"),
    };
    Err(Failure {
        code: options.code,
        ..failure
    })
}
