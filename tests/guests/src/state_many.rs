//! Sets `keys` keys to values of `size` bytes each, after reading `reads` others.
//!
//! Options: `{"keys": 0, "size": 1, "reads": 0}`.

use oncely_guest::{Failure, Message, state};
use serde::Deserialize;

#[derive(Deserialize, Default)]
#[serde(default)]
struct Options {
    keys: u32,
    size: usize,
    reads: u32,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options { keys, size, reads } = crate::options(message)?;
    for key in 0..reads {
        state::get(&format!("read/{key}"))?;
    }
    let value = "x".repeat(size);
    for key in 0..keys {
        state::set(&format!("many/{key}"), value.as_bytes())?;
    }
    Ok(())
}
