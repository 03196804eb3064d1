//! Asks for a retry until the attempt with a given number, which succeeds; `fail_once` is `{"attempt": 2}`.
//!
//! Options: `{"attempt": 2}`.

use oncely_guest::{Failure, Message, invocation};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    attempt: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { attempt: 2 }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    run_until(options.attempt)
}

pub fn run_until(first_to_succeed: u32) -> Result<(), Failure> {
    let attempt = invocation::attempt();
    if attempt >= first_to_succeed {
        return Ok(());
    }
    Err(Failure::retry(format!("attempt {attempt} was told to fail")).code("told-to-fail"))
}
