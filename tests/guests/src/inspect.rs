//! Calls host functions in a given order and logs their results.
//!
//! Options: `{"inspect": ["now"], "times": 1, "bytes": 16, "key": "counter", "sql": "select 1"}`.
//! Functions: `now`, `attempt`, `remaining`, `wall`, `monotonic`, `random` (`bytes` bytes), `seed`,
//! `sleep` (a millisecond), `state` and `cache` (of `key`) and `sql` (the number of rows). Each is
//! called `times` times.

use std::fmt::Debug;

use oncely_guest::{Failure, Message, cache, invocation, log, params, sql, state};
use serde::Deserialize;

use wasip2::clocks::{monotonic_clock, wall_clock};
use wasip2::random::{insecure_seed, random};

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    inspect: Vec<String>,
    times: u32,
    bytes: u64,
    key: String,
    sql: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            inspect: vec!["now".to_owned()],
            times: 1,
            bytes: 16,
            key: "counter".to_owned(),
            sql: "select 1".to_owned(),
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    for what in &options.inspect {
        for _ in 0..options.times {
            inspect(what, &options)?;
        }
    }
    Ok(())
}

fn inspect(what: &str, options: &Options) -> Result<(), Failure> {
    let value: &dyn Debug = match what {
        "now" => &invocation::now(),
        "attempt" => &invocation::attempt(),
        "remaining" => &invocation::remaining(),
        "wall" => &wall_clock::now(),
        "monotonic" => &monotonic_clock::now(),
        "random" => &random::get_random_bytes(options.bytes).len(),
        "seed" => &insecure_seed::insecure_seed(),
        "sleep" => &monotonic_clock::subscribe_duration(1_000_000).block(),
        "state" => &state::get(&options.key)?.map(|entry| entry.version),
        "cache" => &cache::get(&options.key)?,
        "sql" => &sql::query(&options.sql, params![])?.len(),
        other => return Err(Failure::reject(format!("unknown host function `{other}`"))),
    };
    log::info!("{what}: {value:?}");
    Ok(())
}
