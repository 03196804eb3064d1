//! Adds one to a key and sends the new value, by default in the order of the key.
//!
//! The output to `out.state` is `{"key", "value", "version", "padding"}`.
//!
//! Options: `{"key": "counter", "padding": 0, "ordered": true}`, the padding in bytes.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, state};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    key: String,
    padding: usize,
    ordered: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key: "counter".to_owned(),
            padding: 0,
            ordered: true,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options {
        key,
        padding,
        ordered,
    } = crate::options(message)?;
    let value = state::get_json::<u64>(&key)?.unwrap_or(0) + 1;
    let version = state::set_json(&key, &value)?;
    let body =
        json!({ "key": key, "value": value, "version": version, "padding": "x".repeat(padding) });
    let outgoing = Outgoing::json("out.state", &body)?;
    outbox::send(if ordered {
        outgoing.ordering_key(&key)
    } else {
        outgoing
    })?;
    Ok(())
}
