//! Adds one to a key and sends `{"key", "value", "version", "padding"}` to `out.state`, in the order of the key.
//!
//! Options: `{"key": "counter", "padding": 0}`, the latter in bytes.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, state};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    key: String,
    padding: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { key: "counter".to_owned(), padding: 0 }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options { key, padding } = crate::options(message)?;
    let value = state::get_json::<u64>(&key)?.unwrap_or(0) + 1;
    let version = state::set_json(&key, &value)?;
    let told = json!({ "key": key, "value": value, "version": version, "padding": "x".repeat(padding) });
    outbox::send(Outgoing::json("out.state", &told)?.ordering_key(&key))?;
    Ok(())
}
