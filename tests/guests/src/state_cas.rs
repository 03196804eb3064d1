//! Sets a key if it still has an expected version.
//!
//! It sends `{"key", "version"}` to `out.state`, or rejects with the code `version-mismatch`.
//!
//! Options: `{"key": "cas", "expected": null, "value": "x"}`.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, state};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    key: String,
    expected: Option<u64>,
    value: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key: "cas".to_owned(),
            expected: None,
            value: "x".to_owned(),
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options {
        key,
        expected,
        value,
    } = crate::options(message)?;
    match state::compare_and_set(&key, expected, value.as_bytes()) {
        Ok(version) => {
            outbox::send(Outgoing::json(
                "out.state",
                &json!({ "key": key, "version": version }),
            )?)?;
            Ok(())
        }
        Err(error) if error.is_version_mismatch() => {
            Err(Failure::reject(error).code("version-mismatch"))
        }
        Err(error) => Err(error.into()),
    }
}
