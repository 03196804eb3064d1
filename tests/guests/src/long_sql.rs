//! Runs a statement followed by `bytes` bytes of filler: longer than any message could carry.
//!
//! Options: `{"statement": "select 1", "filler": ";", "bytes": 8388608}`. An error of the database
//! or the host becomes a reject with the error's text.

use oncely_guest::{Failure, Message, params, sql};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    statement: String,
    filler: String,
    bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            statement: "select 1".to_owned(),
            filler: ";".to_owned(),
            bytes: 8 << 20,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options {
        statement,
        filler,
        bytes,
    } = crate::options(message)?;
    let text = statement + &filler.repeat(bytes / filler.len().max(1));
    sql::query(&text, params![])
        .map(drop)
        .map_err(|error| Failure::reject(&error).code("refused"))
}
