//! Rejects the message.
//!
//! Options: `{"code": "requested-reject", "message": "requested reject"}`.

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
            code: "requested-reject".to_owned(),
            message: "requested reject".to_owned(),
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    Err(Failure::reject(options.message).code(options.code))
}
