//! A call in a fresh instance, compared with one in an instance that has handled messages before.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use oncely::config::CompileSettings;
use oncely::config::manifest::{Manifest, ResolvedConfig, Worker};
use oncely::guest::{
    CacheReader, CachedValue, Call, Database, Deferral, Guest, GuestEngine, Recorder, WarmInstance,
};
use oncely::model::keyed_state::{BatchState, StateSlot};
use oncely::model::message::Message;
use oncely::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use serde_json::json;
use support::guests;
use support::world::manifest;

use crate::statistics::median;

/// Calls of a measurement.
const CALLS: usize = 20_000;

/// Neither database nor cache: the handler uses none.
struct Nothing;

/// What all calls share.
struct Bench {
    guest: Guest,
    worker: Arc<Worker>,
    config: Arc<ResolvedConfig>,
    message: Arc<Message>,
}

/// Measures instance, call and drop against a warm call, in rotation.
pub async fn measure(rounds: usize) -> Result<serde_json::Value> {
    let folder = tempfile::tempdir()?;
    let component = tokio::task::spawn_blocking(guests::component).await??;
    let wasm = std::fs::read(&component).context("read the component")?;
    let compile = CompileSettings {
        program: guests::oncely()?,
        ..CompileSettings::default()
    };
    let engine = GuestEngine::new(&folder.path().join("compiled"), compile)?;
    let size = wasm.len();
    let worker = Manifest::parse(&manifest("isolation = \"batch\"")?, "oncely.toml")?
        .workers
        .remove(0)
        .worker;
    let bench = Bench {
        guest: Guest::load(&engine, wasm.into()).await?,
        config: Arc::new(worker.resolve_config()?),
        worker: Arc::new(worker),
        message: Arc::new(Message {
            event_id: "e1".to_owned(),
            subject: "in.x".to_owned(),
            headers: vec![("do".to_owned(), "emit".to_owned())],
            body: Bytes::from_static(b"{}"),
            origin: None,
            redriven: None,
        }),
    };
    let (mut fresh, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        fresh.push(bench.micros_per_call(false).await?);
        warm.push(bench.micros_per_call(true).await?);
    }
    let (fresh_micros, warm_micros) = (median(&fresh), median(&warm));
    println!(
        "component of {} KiB: {fresh_micros:.1} µs with a fresh instance, {warm_micros:.1} µs with a warm one",
        size / 1024
    );
    Ok(json!({
        "component_bytes": size, "fresh_micros": fresh_micros, "warm_micros": warm_micros,
        "fresh_rounds": fresh, "warm_rounds": warm, "ratio": fresh_micros / warm_micros,
    }))
}

impl Bench {
    async fn micros_per_call(&self, is_warm: bool) -> Result<f64> {
        let mut warm: Option<WarmInstance> = None;
        let began = Instant::now();
        for _ in 0..CALLS {
            let outcome = self.guest.call(self.call(), warm.take()).await?;
            let result = outcome.result.map_err(|failure| failure.message);
            ensure!(
                matches!(result.as_deref(), Ok([Ok(())])),
                "the handler failed: {result:?}"
            );
            warm = outcome.warm.filter(|_| is_warm);
        }
        Ok(began.elapsed().as_secs_f64() * 1e6 / CALLS as f64)
    }

    fn call(&self) -> Call {
        Call {
            messages: vec![Arc::clone(&self.message)],
            traces: Vec::new(),
            worker: Arc::clone(&self.worker),
            config: Arc::clone(&self.config),
            version: 1,
            attempt: 1,
            now: Timestamp::now(),
            payload_max: 1 << 20,
            database: Arc::new(Nothing),
            cache: Arc::new(Nothing),
            state: BatchState::default(),
            request: None,
            recorder: Recorder::default(),
        }
    }
}

#[async_trait]
impl CacheReader for Nothing {
    async fn get(&self, _key: &str) -> Option<CachedValue> {
        None
    }
}

#[async_trait]
impl Database for Nothing {
    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    async fn query(
        &self,
        _statement: String,
        _params: Vec<Value>,
        _limits: SqlLimits,
    ) -> Result<std::result::Result<Rows, SqlError>> {
        anyhow::bail!("there is no database")
    }

    async fn execute(
        &self,
        _statement: String,
        _params: Vec<Value>,
    ) -> Result<std::result::Result<u64, SqlError>> {
        anyhow::bail!("there is no database")
    }

    async fn defer(
        &self,
        _statement: String,
        _params: Vec<Value>,
    ) -> Result<std::result::Result<Deferral, SqlError>> {
        anyhow::bail!("there is no database")
    }

    async fn run_deferred(&self) -> Result<std::result::Result<(), SqlError>> {
        Ok(Ok(()))
    }

    async fn end_call(&self) -> Result<std::result::Result<(), SqlError>> {
        Ok(Ok(()))
    }

    async fn load_state(&self, _key: String) -> Result<StateSlot> {
        Ok(StateSlot::default())
    }

    async fn list_state(&self, _prefix: String, _after: String, _most: u32) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}
