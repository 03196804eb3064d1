//! Adds one to a key and sends `{"key", "value", "version"}` to `out.state`.
//!
//! Options: `{"key": "counter"}`.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, state};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    key: String,
}

impl Default for Options {
    fn default() -> Self {
        Self { key: "counter".to_owned() }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options { key } = crate::options(message)?;
    let value = state::get_json::<u64>(&key)?.unwrap_or(0) + 1;
    let version = state::set_json(&key, &value)?;
    outbox::send(Outgoing::json("out.state", &json!({ "key": key, "value": value, "version": version }))?)?;
    Ok(())
}
