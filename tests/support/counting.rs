//! Counting messages: the order of their outputs can be checked.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::nats::NewMessage;
use crate::world::World;

const KEYS: usize = 6;

/// Messages that each add one to one of a few keys and send the new value in the order of the key.
/// They reach lanes and hosts without regard to keys, so the order is that of the commits.
pub fn counting_messages(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .map(|n| count(n, &format!("key{}", n % KEYS), 0))
        .collect()
}

/// Message number `n`: it adds one to `key` and sends the value with `padding` bytes of padding.
pub fn count(n: usize, key: &str, padding: usize) -> NewMessage {
    let options = format!(r#"{{"key": "{key}", "padding": {padding}}}"#);
    NewMessage::new("in.x", &format!("e{n}"), "state_counter", &options)
}

/// The values published for each key, in stream order.
pub async fn published_values(world: &World) -> Result<BTreeMap<String, Vec<u64>>> {
    let mut published: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for message in world.nats.read_stream("OUT").await? {
        let body: Value = serde_json::from_slice(&message.body)?;
        let key = body["key"]
            .as_str()
            .context("output has no key")?
            .to_owned();
        published
            .entry(key)
            .or_default()
            .push(body["value"].as_u64().context("output has no value")?);
    }
    Ok(published)
}

/// Checks that every key counts from one without a gap, a repetition or a step back.
pub async fn check_order(world: &World, count: usize) -> Result<()> {
    let published = published_values(world).await?;
    ensure!(
        published.values().map(Vec::len).sum::<usize>() == count,
        "expected {count} outputs, found: {published:?}"
    );
    for (key, values) in published {
        let expected: Vec<u64> = (1..=values.len() as u64).collect();
        ensure!(values == expected, "{key}: {values:?}");
    }
    Ok(())
}
