//! Requests a retry until the attempt with a given number; `fail_once` is `{"attempt": 2}`.
//!
//! Options: `{"attempt": 2, "after_ms": null}`; `after_ms` is the earliest retry.

use std::time::Duration;

use oncely_guest::{Failure, FailureKind, Message, invocation};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    attempt: u32,
    after_ms: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            attempt: 2,
            after_ms: None,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    let after = options.after_ms.map(Duration::from_millis);
    run_until(options.attempt).map_err(|failure| match after {
        Some(after) => Failure {
            kind: FailureKind::RetryAfter(after),
            ..failure
        },
        None => failure,
    })
}

pub fn run_until(first_to_succeed: u32) -> Result<(), Failure> {
    let attempt = invocation::attempt();
    if attempt >= first_to_succeed {
        return Ok(());
    }
    Err(Failure::retry(format!("requested failure of attempt {attempt}")).code("requested-failure"))
}
