//! Requests a retry on every attempt.
//!
//! Options: `{"after_ms": null, "code": null}`; `after_ms` is the earliest retry.

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
        Some(after_ms) => Failure::retry_after(
            Duration::from_millis(after_ms),
            "requested failure with a delay",
        ),
        None => Failure::retry("requested failure"),
    };
    Err(Failure {
        code: options.code,
        ..failure
    })
}
