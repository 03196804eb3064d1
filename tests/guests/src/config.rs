//! Sends the whole configuration as a JSON object to `out.config`.

use std::collections::BTreeMap;

use oncely_guest::{Failure, config, outbox, outbox::Outgoing};

pub fn run() -> Result<(), Failure> {
    let values: BTreeMap<_, _> = config::all()?.into_iter().collect();
    outbox::send(Outgoing::json("out.config", &values)?)?;
    Ok(())
}
