//! Runs for a while and then succeeds.
//!
//! Options: `{"ms": 1000, "sql": false}`; with `sql` it runs statements in the database.

use std::hint::black_box;

use oncely_guest::{Failure, Message, params, sql};
use serde::Deserialize;

use wasip2::clocks::monotonic_clock;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    ms: u64,
    sql: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ms: 1000,
            sql: false,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    let end = monotonic_clock::now() + options.ms * 1_000_000;
    while monotonic_clock::now() < end {
        if options.sql {
            sql::query("select count(*) from effect", params![])?;
        } else {
            (0..10_000_u64).for_each(|number| {
                black_box(number);
            });
        }
    }
    Ok(())
}
