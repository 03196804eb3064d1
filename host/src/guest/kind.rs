//! Whether a component handles messages or answers requests, and whether its manifest agrees.

use anyhow::{Result, anyhow};

use crate::component::Handler;
use crate::config::manifest::Worker;
use crate::model::hint::WithHint;

/// Checks that a component is of the kind that its manifest says.
pub fn check_kind(worker: &Worker, handler: Handler) -> Result<()> {
    let name = &worker.name;
    match (worker.routes.is_empty(), handler == Handler::Http) {
        (true, true) => Err(anyhow!(
            "the component of worker {name} answers requests, and the manifest gives it a stream"
        ))
        .hint("put a [[worker.route]] with a path in the place of `stream`"),
        (false, false) => Err(anyhow!(
            "the component of worker {name} handles messages, and the manifest gives it routes"
        ))
        .hint(
            "put a `stream` in the place of [[worker.route]], or export wasi:http/incoming-handler",
        ),
        _ => Ok(()),
    }
}
