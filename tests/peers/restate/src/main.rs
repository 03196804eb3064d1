//! The work of the contender `state` as services of Restate, for `make bench-peers`.
//!
//! Usage: peer-restate ADDRESS FILE
//!
//! Counters wait until the file exists, so that messages can be accepted before the measurement.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use restate_sdk::prelude::*;
use serde::Serialize;
use tokio::sync::watch;

/// A counter under each key.
struct Counter;

#[object]
impl Counter {
    /// Adds one and sends the id of the event.
    #[handler]
    async fn add(&self, ctx: ObjectContext<'_>, event_id: String) -> Result<(), TerminalError> {
        wait_until_open().await;
        let count = ctx.get::<u64>("count").await?.unwrap_or(0);
        ctx.set("count", count + 1);
        ctx.service_client::<OutputsClient>()
            .receive(event_id)
            .send();
        Ok(())
    }
}

/// Receives the outputs.
struct Outputs;

#[service]
impl Outputs {
    #[handler]
    async fn receive(&self, ctx: Context<'_>, event_id: String) -> Result<(), TerminalError> {
        received().add(event_id, ctx.invocation_id());
        Ok(())
    }

    /// The outputs so far.
    #[handler]
    async fn report(&self, _ctx: Context<'_>) -> Result<Json<Report>, TerminalError> {
        Ok(Json(received().report()))
    }
}

/// The outputs that this process has received. The server may run an invocation again, and that is
/// the same output. Two invocations for one event are two outputs.
struct Received {
    /// The invocations for each event.
    invocations: BTreeMap<String, BTreeSet<String>>,
    outputs: usize,
    first_micros: u64,
    last_micros: u64,
}

impl Received {
    fn add(&mut self, event_id: String, invocation: &str) {
        let invocations = self.invocations.entry(event_id).or_default();
        if invocations.insert(invocation.to_owned()) {
            self.outputs += 1;
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
            let now = since_epoch.map_or(0, |since| since.as_micros() as u64);
            self.first_micros = self.first_micros.min(now);
            self.last_micros = self.last_micros.max(now);
        }
    }

    fn report(&self) -> Report {
        Report {
            events: self.invocations.len(),
            outputs: self.outputs,
            first_micros: self.first_micros,
            last_micros: self.last_micros,
        }
    }
}

#[derive(Serialize)]
struct Report {
    /// Events with an output.
    events: usize,
    outputs: usize,
    /// When the first and the last output arrived, in microseconds since the epoch.
    first_micros: u64,
    last_micros: u64,
}

static RECEIVED: Mutex<Received> = Mutex::new(Received {
    invocations: BTreeMap::new(),
    outputs: 0,
    first_micros: u64::MAX,
    last_micros: 0,
});

fn received() -> MutexGuard<'static, Received> {
    RECEIVED.lock().unwrap_or_else(PoisonError::into_inner)
}

static IS_OPEN: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(false));

async fn wait_until_open() {
    // The sender is static, so it is never closed.
    let _ = IS_OPEN.subscribe().wait_for(|is_open| *is_open).await;
}

async fn open_when_exists(file: PathBuf) {
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    IS_OPEN.send_replace(true);
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().and_then(|text| text.parse().ok());
    let (Some(address), Some(file)) = (address, arguments.next()) else {
        eprintln!("usage: peer-restate ADDRESS FILE");
        std::process::exit(2);
    };
    tokio::spawn(open_when_exists(file.into()));
    let endpoint = Endpoint::builder().bind(Counter).bind(Outputs).build();
    HttpServer::new(endpoint).listen_and_serve(address).await;
}
