//! The inputs of a call, and the host-side state of an instance while it runs.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{
    Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

use super::backends::{CacheReader, Database};
use super::code::MEMORY_MAX;
use super::failure::CallFailure;
use super::limiter::Limiter;
use super::logs::Logs;
use super::record::{RECORD_FORMAT, Record};
use super::recorder::Recorder;
use crate::config::manifest::{ResolvedConfig, Worker};
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::model::request::{HttpRequest, HttpResponse};
use crate::model::trace_context::OutputTrace;

/// The inputs of one call.
pub struct Call {
    /// One message for a handler, one or more for a batch handler.
    pub messages: Vec<Arc<Message>>,
    /// The trace of each message, for its outputs; empty when traces are off.
    pub traces: Vec<OutputTrace>,
    /// The worker, with its limits.
    pub worker: Arc<Worker>,
    /// The configuration that the guest reads, with the values of secrets.
    pub config: Arc<ResolvedConfig>,
    /// Version of the worker.
    pub version: u32,
    /// 1 for the first attempt. In a batch, the highest of all messages.
    pub attempt: u32,
    /// Start of this attempt, as the guest reads it.
    pub now: Timestamp,
    /// Largest payload that the broker accepts, headers included, in bytes.
    pub payload_max: usize,
    /// The transaction for SQL and keyed state.
    pub database: Arc<dyn Database>,
    /// The cache that the guest reads. Its writes are returned in the [`super::CallOutcome`].
    pub cache: Arc<dyn CacheReader>,
    /// State after the previous item. The [`super::CallOutcome`] returns it.
    pub state: BatchState,
    /// The request for an HTTP worker. Its single message stands for the request.
    pub request: Option<RequestCall>,
    /// Records the host calls, or plays them back from a record.
    pub recorder: Recorder,
}

/// The inputs of an HTTP worker.
pub struct RequestCall {
    /// The request, read to its end.
    pub request: HttpRequest,
    /// Id of this invocation, if it differs from that of the message.
    pub id: Option<String>,
    /// Whether the transaction may write.
    pub may_write: bool,
}

/// The host-side state of one running instance.
pub(super) struct CallState {
    pub call: Call,
    /// Whether a batch handler runs, also with a single message.
    pub in_batch: bool,
    pub outputs: Vec<Output>,
    pub output_bytes: usize,
    pub state_usage: StateUsage,
    pub cache: CacheWrites,
    pub statements: u32,
    /// Whether statements reached the database.
    pub ran_sql: bool,
    /// Whether statements are queued.
    pub has_deferred: bool,
    /// The first failure that dooms this delivery, regardless of the handler result.
    pub doomed: Option<CallFailure>,
    /// The first error of the host. The guest did not cause it and cannot handle it.
    pub host_error: Option<anyhow::Error>,
    pub deadline: Instant,
    /// Time at which the instance was created.
    pub instantiated_at: Instant,
    /// Whether the instance handled other messages before.
    warm: bool,
    pub logs: Logs,
    pub limiter: Limiter,
    /// The response of an HTTP worker.
    pub response: Option<HttpResponse>,
    /// Created on first use. Most Rust handlers never use it.
    wasi: Option<WasiCtx>,
    http: WasiHttpCtx,
    hooks: DenyOutgoingHttp,
    table: ResourceTable,
}

/// Used part of the limits of keyed state.
#[derive(Default)]
pub(super) struct StateUsage {
    /// Keys that the call read or changed.
    pub keys: HashSet<String>,
    pub bytes: usize,
}

impl WasiView for CallState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let logs = &self.logs;
        let ctx = self.wasi.get_or_insert_with(|| {
            let mut builder = WasiCtx::builder();
            builder.stdout(logs.clone()).stderr(logs.clone());
            builder.allow_tcp(false).allow_udp(false);
            builder.build()
        });
        WasiCtxView {
            ctx,
            table: &mut self.table,
        }
    }
}

impl WasiHttpView for CallState {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView {
            ctx: &mut self.http,
            hooks: &mut self.hooks,
            table: &mut self.table,
        }
    }
}

impl CallState {
    pub fn new(call: Call, deadline: Instant, in_batch: bool) -> Self {
        let limits = &call.worker.limits;
        let memory = usize::try_from(limits.memory)
            .unwrap_or(usize::MAX)
            .min(MEMORY_MAX);
        let mut table = ResourceTable::new();
        table.set_max_capacity(1_000);
        CallState {
            in_batch,
            outputs: Vec::new(),
            output_bytes: 0,
            state_usage: StateUsage::default(),
            cache: CacheWrites::default(),
            statements: 0,
            ran_sql: false,
            has_deferred: false,
            doomed: None,
            host_error: None,
            deadline,
            instantiated_at: Instant::now(),
            warm: false,
            logs: Logs::new(usize::try_from(limits.log_size).unwrap_or(usize::MAX)),
            limiter: Limiter::new(memory),
            response: None,
            wasi: None,
            http: WasiHttpCtx::new(),
            hooks: DenyOutgoingHttp,
            table,
            call,
        }
    }

    /// Prepares the next call of the same instance. The counters of the limits restart. The memory
    /// of the instance stays.
    pub fn reset(&mut self, call: Call, deadline: Instant) {
        self.logs
            .reset(usize::try_from(call.worker.limits.log_size).unwrap_or(usize::MAX));
        self.outputs.clear();
        self.output_bytes = 0;
        self.state_usage = StateUsage::default();
        self.cache = CacheWrites::default();
        self.statements = 0;
        (self.ran_sql, self.has_deferred) = (false, false);
        self.deadline = deadline;
        self.warm = true;
        self.call = call;
    }

    /// The record of the call. The caller adds the failure.
    pub fn record(&self, recorder: Recorder, logs: &str) -> Record {
        let call = &self.call;
        Record {
            format: RECORD_FORMAT,
            version: call.version,
            attempt: call.attempt,
            now: call.now,
            dialect: call.database.dialect(),
            payload_max: call.payload_max,
            messages: call
                .messages
                .iter()
                .map(|message| Message::clone(message))
                .collect(),
            steps: recorder.steps,
            truncated: recorder.truncated,
            inputs: recorder.inputs,
            warm: self.warm,
            out_of_memory: self.limiter.out_of_memory,
            logs: logs.to_owned(),
            failure: None,
        }
    }

    /// Whether the transaction of this call may write.
    pub fn may_write(&self) -> bool {
        self.call
            .request
            .as_ref()
            .is_none_or(|request| request.may_write)
    }

    /// The first message of the call, which is the only one for a handler.
    pub fn message(&self) -> Option<&Message> {
        self.call.messages.first().map(AsRef::as_ref)
    }
}

/// Denies outgoing HTTP requests. The outbox is the only output of a guest.
#[derive(Debug, Default)]
struct DenyOutgoingHttp;

impl WasiHttpHooks for DenyOutgoingHttp {
    fn send_request(
        &mut self,
        _: hyper::Request<WasiBody>,
        _: Option<RequestOptions>,
        _: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<
        dyn Future<
                Output = Result<
                    (
                        hyper::Response<WasiBody>,
                        Box<dyn Future<Output = Result<(), Error>> + Send>,
                    ),
                    Error,
                >,
            > + Send,
    > {
        Box::new(std::future::ready(Err(Error::HttpRequestDenied)))
    }
}
