//! The parts that a running host shares, and the few operations that need several of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::bus::{Bus, UnhandledMessages};
use crate::cache::Cache;
use crate::config::manifest::Worker;
use crate::delivery::{ConnectionBreaks, Delivery};
use crate::guest::{Guest, GuestEngine, SharedGuests, check_kind};
use crate::metrics::Metrics;
use crate::metrics::health::Health;
use crate::model::hint::WithHint;
use crate::model::signature::{PublicKeys, Signature};
use crate::relay::{RelayHandle, RelayState};
use crate::store::{DeploymentRecord, OutboxRow, Store};
use crate::traces::Traces;

/// The timeout for the age of a worker's oldest message.
const AGE_WITHIN: Duration = Duration::from_secs(1);

/// The commands that sign a component.
const SIGN_HINT: &str = "sign it and deploy it again: cosign sign --key cosign.key REFERENCE, \
     or for a file: cosign sign-blob --key cosign.key --output-signature worker.wasm.sig worker.wasm   \
     (see docs/deploying.md)";

/// The shared parts of a host.
pub struct Services {
    pub store: Arc<Store>,
    pub bus: Bus,
    pub engine: GuestEngine,
    pub guests: SharedGuests,
    /// The keys by which components have to be signed; `None` if unsigned ones may run.
    pub component_keys: Option<PublicKeys>,
    pub cache: Cache,
    pub metrics: Arc<Metrics>,
    pub traces: Traces,
    pub health: Arc<Health>,
    pub relay_state: Arc<RelayState>,
    /// Closed once the host drains: the relay ends when no sender is left.
    pub relay: RelayLink,
}

/// The link to the relay, until the host drains.
pub struct RelayLink(Mutex<Option<RelayHandle>>);

impl RelayLink {
    pub fn new(relay_handle: RelayHandle) -> Self {
        RelayLink(Mutex::new(Some(relay_handle)))
    }

    /// `None` once the host drains.
    pub fn get(&self) -> Option<RelayHandle> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Services {
    /// The manifests of the active deployments; unreadable ones are omitted.
    pub async fn deployed_workers(&self) -> Result<Vec<Worker>> {
        let deployments = self.store.active_deployments().await?;
        Ok(deployments
            .iter()
            .filter_map(|deployment| serde_json::from_str(&deployment.manifest).ok())
            .collect())
    }

    /// Checks the signature of a component, if this host has keys. Without a given signature, that
    /// of an earlier deployment counts.
    ///
    /// # Errors
    /// The component is not signed by one of the keys.
    pub async fn check_signature(
        &self,
        digest: &str,
        wasm: &[u8],
        given: Option<&Signature>,
    ) -> Result<()> {
        let Some(keys) = &self.component_keys else {
            return Ok(());
        };
        let stored = match given {
            Some(_) => None,
            None => self.store.signature(digest).await?,
        };
        let stored = stored.map(|text| serde_json::from_str::<Signature>(&text));
        let stored = stored.transpose().context("read the stored signature")?;
        let checked = match given.or(stored.as_ref()) {
            Some(signature) => keys.verify(wasm, signature),
            None => Err("it is not signed".to_owned()),
        };
        checked
            .map_err(anyhow::Error::msg)
            .context(
                "this host runs only components that are signed by one of its `component_keys`",
            )
            .hint(SIGN_HINT)
    }

    /// Stores a component, after checking that it is a worker. Returns its digest.
    pub async fn add_component(&self, wasm: Bytes) -> Result<String> {
        self.check_component(wasm.clone()).await?;
        self.store_component(wasm).await
    }

    /// Checks that a component is a worker. With keys, it is compiled after the check of its
    /// signature, by the plan. Dropping the future cancels that.
    pub async fn check_component(&self, wasm: Bytes) -> Result<()> {
        match self.component_keys {
            None => self.load(wasm).await.map(drop),
            Some(_) => Ok(()),
        }
    }

    /// Stores a checked component. Returns its digest.
    pub async fn store_component(&self, wasm: Bytes) -> Result<String> {
        let digest = hex::encode(Sha256::digest(&wasm));
        self.store.put_component(&digest, &wasm).await?;
        Ok(digest)
    }

    /// Checks and compiles a component. Dropping the future cancels that.
    pub async fn load(&self, wasm: Bytes) -> Result<Guest> {
        Guest::load(&self.engine, wasm).await
    }

    /// Compiles the component of a deployment and parses its manifest: everything that can fail
    /// before it starts. The secrets of its configuration are read.
    pub async fn prepare(&self, deployment: &DeploymentRecord) -> Result<Delivery> {
        let worker: Worker = serde_json::from_str(&deployment.manifest)
            .context("parse the deployment's manifest")?;
        worker.compile_schemas()?;
        let mut signed = None;
        if self.component_keys.is_some() {
            let wasm = self.read_component(&deployment.digest).await?;
            self.check_signature(&deployment.digest, &wasm, None)
                .await?;
            signed = Some(wasm);
        }
        let read = async || match signed {
            Some(wasm) => Ok(wasm),
            None => self.read_component(&deployment.digest).await,
        };
        let guest = self
            .guests
            .get(&self.engine, &deployment.digest, read)
            .await?;
        check_kind(&worker, guest.handler())?;
        // Secrets are read at each start, so a new value needs only a restart.
        let config = worker.resolve_config()?;
        Ok(Delivery {
            store: Arc::clone(&self.store),
            guest,
            config: Arc::new(config),
            worker: Arc::new(worker),
            version: deployment.version,
            payload_max: self.bus.max_payload(),
            metrics: Arc::clone(&self.metrics),
            cache: self.cache.clone(),
            connection_breaks: ConnectionBreaks::default(),
            health: Arc::clone(&self.health),
            traces: self.traces.clone(),
        })
    }

    async fn read_component(&self, digest: &str) -> Result<Bytes> {
        let wasm = self.store.component(digest).await?;
        let wasm = wasm.with_context(|| format!("component {digest} is not in the database"))?;
        Ok(wasm.into())
    }

    /// The active deployment of a worker, ready to run; `None` if it has none.
    pub async fn active_delivery(&self, worker: &str) -> Result<Option<Delivery>> {
        match self.store.active_deployment(worker).await? {
            Some(deployment) => Ok(Some(self.prepare(&deployment).await?)),
            None => Ok(None),
        }
    }

    /// Hands committed outputs to the relay. Their leases began at `since` or later. A draining
    /// host leaves them to the poller of another host.
    pub async fn publish_outputs(&self, rows: Vec<OutboxRow>, since: Instant) {
        if let Some(relay) = self.relay.get() {
            relay.hand_over(rows, since).await;
        }
    }

    /// The age of the oldest message on the stream that waits for a worker on any host: zero if
    /// none waits, `None` if the server does not answer in time.
    pub async fn unhandled_age(&self, worker: &Worker) -> Option<Duration> {
        let probe = self
            .bus
            .probe(worker.stream.as_ref()?, &worker.subjects, &worker.durable());
        let unhandled = tokio::time::timeout(AGE_WITHIN, probe.unhandled())
            .await
            .ok()?
            .ok()?;
        Some(age(unhandled).unwrap_or_default())
    }
}

/// The age of the oldest waiting message; `None` if none waits.
pub fn age(unhandled: UnhandledMessages) -> Option<Duration> {
    let stored = unhandled.oldest?;
    // The broker's clock may be ahead of the host's.
    Some(Duration::try_from(Timestamp::now().duration_since(stored)).unwrap_or_default())
}
