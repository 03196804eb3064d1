//! Reports the running deployment.
//!
//! It sends `{"worker", "version", "label", "id", "attempt", "max_attempts"}` to `out.version`. The
//! label is the config value `label`, or null.

use oncely_guest::{Failure, config, invocation, outbox, outbox::Outgoing};
use serde_json::json;

pub fn run() -> Result<(), Failure> {
    let body = json!({
        "worker": invocation::worker(),
        "version": invocation::version(),
        "label": config::get("label")?,
        "id": invocation::id(),
        "attempt": invocation::attempt(),
        "max_attempts": invocation::max_attempts(),
    });
    outbox::send(Outgoing::json("out.version", &body)?)?;
    Ok(())
}
