//! Messages that count, so that the order of what they tell can be checked.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::nats::ToPublish;
use crate::world::World;

const KEYS: usize = 6;

/// Messages that each add one to one of a few keys and tell of it in the order of the key. They come to lanes and hosts
/// without regard to keys: the order is that of the commits.
pub fn counting(from: usize, to: usize) -> Vec<ToPublish> {
    (from..to).map(|n| count(n, &format!("key{}", n % KEYS), 0)).collect()
}

/// Message number `n`, which adds one to `key` and tells of it with as many bytes more.
pub fn count(n: usize, key: &str, padding: usize) -> ToPublish {
    let options = format!(r#"{{"key": "{key}", "padding": {padding}}}"#);
    ToPublish::new("in.x", &format!("e{n}"), "state_counter", &options)
}

/// The values that were told of each key, in the order of the stream.
pub async fn told(world: &World) -> Result<BTreeMap<String, Vec<u64>>> {
    let mut told: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for message in world.nats.read_stream("OUT").await? {
        let body: Value = serde_json::from_slice(&message.body)?;
        let key = body["key"].as_str().context("the output names no key")?.to_owned();
        told.entry(key).or_default().push(body["value"].as_u64().context("the output has no value")?);
    }
    Ok(told)
}

/// Every key counts from one without a gap, a repetition or a step back.
pub async fn check_order(world: &World, count: usize) -> Result<()> {
    let told = told(world).await?;
    ensure!(told.values().map(Vec::len).sum::<usize>() == count, "not {count} outputs: {told:?}");
    for (key, values) in told {
        let expected: Vec<u64> = (1..=values.len() as u64).collect();
        ensure!(values == expected, "{key}: {values:?}");
    }
    Ok(())
}
