//! Renews the host's lease in the database, and takes over from hosts whose lease expired.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::drain::Stopping;
use crate::model::retry::LastError;
use crate::relay::RelayState;
use crate::store::{RENEW_INTERVAL, RENEW_TIMEOUT, Store, TakenOver};

/// Delay of the next renewal after a failed one, or while sessions of a lost host have not ended.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Renews the lease until the host has stopped, also while it drains.
pub(super) async fn run(store: Arc<Store>, state: Arc<RelayState>, mut stopping: Stopping) {
    let mut trouble = LastError::default();
    loop {
        let after = match renew(store.as_ref(), &state).await {
            Ok(after) => {
                trouble.clear();
                after
            }
            Err(error) => {
                let why = format!("{error:#}");
                if trouble.is_new(&why) {
                    tracing::warn!(
                        error = why,
                        "failed to renew the host's lease in the database, retrying"
                    );
                }
                RETRY_DELAY
            }
        };
        tokio::select! {
            biased;
            () = stopping.stopped() => return,
            () = tokio::time::sleep(after) => {}
        }
    }
}

/// Renews the lease once, and returns the delay until the next renewal.
pub(super) async fn renew(store: &Store, state: &RelayState) -> Result<Duration> {
    let began = Instant::now();
    let renewed = tokio::time::timeout(RENEW_TIMEOUT, store.renew_lease()).await;
    let taken_over = renewed.with_context(|| format!("no response within {RENEW_TIMEOUT:?}"))??;
    state.lease_renewed(began);
    taken_over.iter().for_each(log_takeover);
    // Outputs that such a session commits before its end still have to be released.
    let is_over = taken_over.iter().all(|instance| instance.outputs.is_some());
    Ok(if is_over { RENEW_INTERVAL } else { RETRY_DELAY })
}

fn log_takeover(taken_over: &TakenOver) {
    let TakenOver {
        instance,
        sessions,
        outputs,
    } = taken_over;
    match outputs {
        None => tracing::warn!(
            instance,
            sessions,
            "ending the sessions of a host with an expired lease"
        ),
        Some(outputs) => tracing::warn!(instance, outputs, "took over from a lost host"),
    }
}
