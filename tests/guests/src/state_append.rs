//! Appends the message's id to a list in keyed state, which records the order of effects.
//!
//! Options: `{"list": "order"}`, the key of the list.

use oncely_guest::{Failure, Message, state};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    list: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            list: "order".to_owned(),
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options { list } = crate::options(message)?;
    let mut ids: Vec<String> = state::get_json(&list)?.unwrap_or_default();
    ids.push(message.id.clone());
    state::set_json(&list, &ids)?;
    Ok(())
}
