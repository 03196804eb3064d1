//! Rejects the message.
//!
//! Options: `{"code": "told-to-reject", "message": "told to reject"}`.

use oncely_guest::{Failure, Message};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    code: String,
    message: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            code: "told-to-reject".to_owned(),
            message: "told to reject".to_owned(),
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    Err(Failure::reject(options.message).code(options.code))
}
