//! Checks that the kind of a component matches its manifest: messages or HTTP requests.

use anyhow::{Result, anyhow};

use crate::component::Handler;
use crate::config::manifest::Worker;
use crate::model::hint::WithHint;

/// Checks that a component exports the handler that its manifest needs.
///
/// # Errors
/// The component answers requests and the manifest has a stream, or the reverse. The hint names the
/// setting to change.
pub fn check_kind(worker: &Worker, handler: Handler) -> Result<()> {
    let name = &worker.name;
    match (worker.routes.is_empty(), handler.is_http()) {
        (true, true) => Err(anyhow!(
            "the component of worker {name} answers requests, and the manifest gives it a stream"
        ))
        .hint("replace `stream` with a [[worker.route]] that has a path"),
        (false, false) => Err(anyhow!(
            "the component of worker {name} handles messages, and the manifest gives it routes"
        ))
        .hint("replace [[worker.route]] with a `stream`, or export wasi:http/incoming-handler"),
        _ => Ok(()),
    }
}
