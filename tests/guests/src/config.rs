//! Sends the whole configuration as a JSON object to `out.config`, or to `out.reversed` with each
//! value reversed: a test of secrets must not store them.

use std::collections::BTreeMap;

use oncely_guest::{Failure, config, outbox, outbox::Outgoing};

pub fn run() -> Result<(), Failure> {
    let values: BTreeMap<_, _> = config::all()?.into_iter().collect();
    outbox::send(Outgoing::json("out.config", &values)?)?;
    Ok(())
}

pub fn run_reversed() -> Result<(), Failure> {
    let values: BTreeMap<_, String> = config::all()?
        .into_iter()
        .map(|(key, value)| (key, value.chars().rev().collect()))
        .collect();
    outbox::send(Outgoing::json("out.reversed", &values)?)?;
    Ok(())
}
