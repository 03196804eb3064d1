//! Closes checkpoints for receipts, about once in the configured interval.

use std::sync::Arc;
use std::time::Duration;

use super::Host;
use crate::drain::Stopping;
use crate::model::retry::LastError;
use crate::receipts::{Closing, close_due};

/// The shortest and the longest time between two reads of the head.
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Closes checkpoints until the host stops. Of several hosts, one closes each of them.
pub(super) async fn watch(host: Arc<Host>, interval: Duration, stopping: Stopping) {
    let wait = (interval / 4).clamp(WAIT_MIN, WAIT_MAX);
    let closing = Closing {
        interval,
        keep: host.config.keep_receipts,
        keep_outputs: host.retention.outputs,
    };
    let mut trouble = LastError::default();
    while !stopping.wait(wait).await {
        // A recovery may still change the rows.
        if host.hold().is_some() {
            continue;
        }
        match close_due(&host.services, &closing).await {
            Ok(_) => trouble.clear(),
            Err(error) => {
                let error = format!("{error:#}");
                if trouble.is_new(&error) {
                    tracing::warn!(error, "failed to close a checkpoint, retrying");
                }
            }
        }
    }
}
