//! Sleeps inside a host call, where neither fuel nor epochs apply.
//!
//! Options: `{"sleep_ms": 3600000}`.

use oncely_guest::{Failure, Message};
use serde::Deserialize;

use wasip2::clocks::monotonic_clock;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    sleep_ms: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sleep_ms: 3_600_000,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    monotonic_clock::subscribe_duration(options.sleep_ms.saturating_mul(1_000_000)).block();
    Ok(())
}
