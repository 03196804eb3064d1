//! Performs cache operations and logs the results: `key: value`, `key: nothing`, or the refusal.
//!
//! Options: `{"cache": [...], "key": "k", "value": "v", "ttl_ms": 60000, "tags": ["t"], "size":
//! 10}`. Operations: `get`, `put`, `invalidate`, `put_large` (a value of `size` bytes), `put_keys`
//! (`size` values) and `echo`, which sends the cached value to `out.cached`.

use std::fmt::Debug;
use std::time::Duration;

use oncely_guest::outbox::Outgoing;
use oncely_guest::{Failure, Message, cache, log, outbox};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    cache: Vec<String>,
    key: String,
    value: String,
    ttl_ms: u64,
    tags: Vec<String>,
    size: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache: vec!["get".to_owned()],
            key: "k".to_owned(),
            value: "v".to_owned(),
            ttl_ms: 60_000,
            tags: vec!["t".to_owned()],
            size: 10,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let Options {
        cache: what,
        key,
        value,
        ttl_ms,
        tags,
        size,
    } = crate::options(message)?;
    let ttl = Duration::from_millis(ttl_ms);
    for what in what {
        match what.as_str() {
            "get" => match cache::get(&key) {
                Ok(Some(value)) => log::info!("{key}: {}", String::from_utf8_lossy(&value)),
                Ok(None) => log::info!("{key}: nothing"),
                Err(error) => log_refusal("get", Err(error)),
            },
            "put" => log_refusal("put", cache::put(&key, value.as_bytes(), ttl, &tags)),
            "invalidate" => log_refusal("invalidate", cache::invalidate(&tags)),
            "put_large" => log_refusal("put", cache::put(&key, &vec![b'x'; size], ttl, &tags)),
            "put_keys" => (0..size).for_each(|n| {
                log_refusal("put", cache::put(&format!("{key}{n}"), &[0], ttl, &tags))
            }),
            "echo" => {
                outbox::send(Outgoing::new(
                    "out.cached",
                    cache::get(&key)?.unwrap_or_default(),
                ))?;
            }
            other => {
                return Err(Failure::reject(format!(
                    "unknown cache operation `{other}`"
                )));
            }
        }
    }
    Ok(())
}

fn log_refusal(operation: &str, result: Result<(), impl Debug>) {
    if let Err(error) = result {
        log::info!("{operation} refused: {error:?}");
    }
}
