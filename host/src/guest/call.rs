//! One call of a guest: its instance, its limits, its deadline and its outcome.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use wasmtime::component::{Instance, ResourceTable};
use wasmtime::{Store, Trap, UpdateDeadline};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::WasiHttpCtx;

use super::bindings::oncely::worker::types as wit;
use super::component::{Entry, Guest};
use super::http::{self, DenyOutgoingHttp, RequestCall};
use super::imports::{CacheReader, Database};
use super::limiter::Limiter;
use super::logs::Logs;
use super::record::{HostCall, RECORD_FORMAT, Record};
use super::recorder::{PlaybackEnd, Recorder};
use crate::config::manifest::Worker;
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::model::request::HttpResponse;
use crate::model::verdict::PANIC_PREFIX;

/// How long a call may overrun its deadline before the host stops waiting for it. Guest code is
/// stopped at the deadline. The grace period is for a host call, such as a statement that the
/// database ends at the same deadline.
const GRACE: Duration = Duration::from_millis(500);

/// Maximum number of bytes that one host call may copy out of guest memory.
const HOST_CALL_BYTES: usize = 32 << 20;

/// The inputs of one call.
pub struct Call {
    /// One message for a handler, one or more for a batch handler.
    pub messages: Vec<Arc<Message>>,
    /// The worker, with its limits and its configuration.
    pub worker: Arc<Worker>,
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
    /// The cache that the guest reads. Its writes are returned in the [`CallOutcome`].
    pub cache: Arc<dyn CacheReader>,
    /// State after the previous item. The [`CallOutcome`] returns it.
    pub state: BatchState,
    /// The request for an HTTP worker. Its single message stands for the request.
    pub request: Option<RequestCall>,
    /// Records the host calls, or plays them back from a record.
    pub recorder: Recorder,
}

/// The outcome of a call.
pub struct CallOutcome {
    /// One result for each message. The outer error means that the call failed as a whole.
    pub result: Result<Vec<HandlerResult>, CallFailure>,
    /// The response of an HTTP worker.
    pub response: Option<HttpResponse>,
    /// Outputs in the order in which the guest sent them.
    pub outputs: Vec<Output>,
    /// State after this call, for the next item.
    pub state: BatchState,
    /// Cache writes of the call.
    pub cache: CacheWrites,
    /// Whether the call ran any SQL. A call without SQL leaves the transaction unchanged, so it can
    /// be dropped from its batch.
    pub ran_sql: bool,
    /// Log output of the guest, one line per entry, truncated at `log_size` of the worker's limits.
    pub logs: String,
    /// The record of a failed call, without the failure of the single message.
    pub record: Option<Box<Record>>,
    /// The progress of a replay.
    pub replay_progress: Option<ReplayProgress>,
    /// The instance, if all messages succeeded. It can be called again.
    pub warm: Option<WarmInstance>,
}

/// How far a replay went.
pub struct ReplayProgress {
    /// Number of calls that equal those of the record.
    pub steps: usize,
    /// The reason why the playback ended before the guest returned.
    pub ended: Option<PlaybackEnd>,
    /// The first recorded call that the guest did not make.
    pub next: Option<HostCall>,
}

/// The result of a handler for one message.
pub type HandlerResult = Result<(), CallFailure>;

/// An instance that has handled a message without a failure.
pub struct WarmInstance {
    store: Store<CallState>,
    instance: Instance,
}

/// The failure of a call that was caused by the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallFailure {
    /// How the failure is handled, for example whether it is retried.
    pub kind: FailureKind,
    /// The handler's own code, or a code of the host such as `trap` or `timeout`.
    pub code: Option<String>,
    /// Readable text for operators.
    pub message: String,
    /// Names of the functions that were running at the trap, innermost first.
    pub frames: Vec<String>,
}

/// How a failed call is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// Retried after the backoff of the worker's retry policy.
    Retry,
    /// A trap caused by the guest on every host. Retried like `Retry`.
    Trap,
    /// Retried after this long or later, as the handler requested.
    RetryAfter(Duration),
    /// Dead-lettered at once, as the handler requested.
    Reject,
    /// The guest sent an output that its manifest or its limits do not permit.
    OutputRefused,
    /// A conflict with another transaction. It does not count as an attempt.
    Conflict,
}

impl CallFailure {
    /// Adds the panic message and its source file from the log output of a trapped guest. The file
    /// becomes the innermost frame, because the panicking function is often inlined.
    fn with_panic_location(mut self, logs: &str) -> Self {
        if self.code.as_deref() == Some("trap")
            && let Some(panic) = panic_message(logs)
        {
            self.message = match self.message.split_once(UNREACHABLE) {
                Some((_, place)) => format!("{PANIC_PREFIX}{panic}{place}"),
                None => format!("{}; last output: {panic}", self.message),
            };
        }
        let said = logs
            .lines()
            .rev()
            .find_map(|line| line.split_once(" panicked at "));
        if let (Some((_, place)), false) = (said, self.frames.is_empty()) {
            let file = place.split(':').next().unwrap_or_default();
            // The leading folders differ between build machines.
            let parts: Vec<&str> = file.rsplit('/').take(3).collect();
            let file: Vec<&str> = parts.into_iter().rev().collect();
            self.frames
                .insert(0, format!("panic in {}", file.join("/")));
        }
        self
    }

    /// A failure with a code and a readable message, without frames.
    pub fn new(kind: FailureKind, code: &str, message: impl Into<String>) -> Self {
        CallFailure {
            kind,
            code: Some(code.to_owned()),
            message: message.into(),
            frames: Vec::new(),
        }
    }
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
    response: Option<HttpResponse>,
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

impl Guest {
    /// Runs the handler once, in the instance `warm` or in a fresh one.
    ///
    /// # Errors
    /// A failure of the host. No attempt is counted.
    pub async fn call(
        &self,
        call: Call,
        warm: Option<WarmInstance>,
    ) -> anyhow::Result<CallOutcome> {
        // Prepare the instance.
        let time = call.worker.limits.time;
        let deadline = Instant::now() + time;
        let messages = call
            .messages
            .iter()
            .map(|message| wit_message(message))
            .collect();
        let (mut store, mut instance) = match warm {
            Some(mut warm) => {
                warm.store.data_mut().reset(call, deadline);
                (warm.store, Some(warm.instance))
            }
            None => (self.store(call, deadline), None),
        };
        store.set_epoch_deadline(1);

        // Run the handler until it returns or its time is over.
        let running = self.run(&mut store, &mut instance, messages);
        let finished = tokio::time::timeout_at((deadline + GRACE).into(), running).await;

        // Determine the result.
        let state = store.data_mut();
        if let Some(error) = state.host_error.take() {
            return Err(error);
        }
        let result = match finished {
            Ok(Ok(answers)) => check_result_count(state.call.messages.len(), answers),
            Ok(Err(error)) if error.is::<wasmtime::PoolConcurrencyLimitError>() => {
                return Err(anyhow::Error::from(error)).context("allocate one more instance");
            }
            Ok(Err(error)) => Err(trap_failure(&error, state)),
            Err(_) => Err(timeout_failure(time)),
        };
        let result = match state.doomed.take() {
            Some(doom) => Err(doomed_failure(result, doom)),
            None => result,
        };
        let logs = state.logs.take();
        let result = result.map_err(|failure| failure.with_panic_location(&logs));
        let all_succeeded = result
            .as_ref()
            .is_ok_and(|answers| answers.iter().all(Result::is_ok));

        // Complete the record or the replay.
        let recorder = std::mem::take(&mut state.call.recorder);
        let (record, replay_progress) = match (recorder.is_playback(), all_succeeded) {
            (true, _) => (None, Some(recorder.into_progress())),
            (false, true) => (None, None),
            (false, false) => (Some(Box::new(state.record(recorder, &logs))), None),
        };
        Ok(CallOutcome {
            result,
            response: state.response.take(),
            outputs: std::mem::take(&mut state.outputs),
            cache: std::mem::take(&mut state.cache),
            state: std::mem::take(&mut state.call.state),
            ran_sql: state.statements > 0,
            logs,
            record,
            replay_progress,
            warm: instance
                .filter(|_| all_succeeded)
                .map(|instance| WarmInstance { store, instance }),
        })
    }

    async fn run(
        &self,
        store: &mut Store<CallState>,
        instance: &mut Option<Instance>,
        mut messages: Vec<wit::Message>,
    ) -> wasmtime::Result<Vec<HandlerResult>> {
        let instance = match instance {
            Some(instance) => instance,
            None => instance.insert(self.pre.instantiate_async(&mut *store).await?),
        };
        let answers = match &self.entry {
            Entry::Http(indices) => {
                let (result, response) = http::serve(store, instance, indices).await?;
                store.data_mut().response = response;
                return Ok(vec![result]);
            }
            Entry::Handler(indices) => {
                let message = messages
                    .pop()
                    .ok_or_else(|| wasmtime::Error::msg("a call needs a message"))?;
                vec![
                    indices
                        .load(&mut *store, &*instance)?
                        .call_handle(&mut *store, &message)
                        .await?,
                ]
            }
            Entry::BatchHandler(indices) => {
                indices
                    .load(&mut *store, &*instance)?
                    .call_handle_batch(&mut *store, &messages)
                    .await?
            }
        };
        Ok(answers
            .into_iter()
            .map(|answer| answer.map_err(failure_from_wit))
            .collect())
    }

    fn store(&self, call: Call, deadline: Instant) -> Store<CallState> {
        let mut store = Store::new(
            self.engine.engine(),
            CallState::new(call, deadline, self.is_batch_handler()),
        );
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(HOST_CALL_BYTES);
        store.epoch_deadline_callback(|context| {
            if Instant::now() >= context.data().deadline {
                return Err(wasmtime::Error::from(Trap::Interrupt));
            }
            // Yields to other tasks. A busy guest shares its thread with the rest of the host.
            Ok(UpdateDeadline::YieldCustom(
                1,
                Box::pin(tokio::task::yield_now()),
            ))
        });
        store
    }
}

impl CallState {
    fn new(call: Call, deadline: Instant, in_batch: bool) -> Self {
        let limits = &call.worker.limits;
        let memory = usize::try_from(limits.memory)
            .unwrap_or(usize::MAX)
            .min(super::engine::MEMORY_MAX);
        let mut table = ResourceTable::new();
        table.set_max_capacity(1_000);
        CallState {
            in_batch,
            outputs: Vec::new(),
            output_bytes: 0,
            state_usage: StateUsage::default(),
            cache: CacheWrites::default(),
            statements: 0,
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
    fn reset(&mut self, call: Call, deadline: Instant) {
        self.logs
            .reset(usize::try_from(call.worker.limits.log_size).unwrap_or(usize::MAX));
        self.outputs.clear();
        self.output_bytes = 0;
        self.state_usage = StateUsage::default();
        self.cache = CacheWrites::default();
        self.statements = 0;
        self.deadline = deadline;
        self.warm = true;
        self.call = call;
    }

    /// The record of the call. The caller adds the failure.
    fn record(&self, recorder: Recorder, logs: &str) -> Record {
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

    /// The fields that an HTTP view borrows.
    pub fn http_parts(&mut self) -> (&mut WasiHttpCtx, &mut DenyOutgoingHttp, &mut ResourceTable) {
        (&mut self.http, &mut self.hooks, &mut self.table)
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

fn wit_message(message: &Message) -> wit::Message {
    wit::Message {
        id: message.event_id.clone(),
        subject: message.subject.clone(),
        headers: message.headers.clone(),
        body: message.body.to_vec(),
        origin: message.origin.as_ref().map(|origin| wit::Origin {
            stream: origin.stream.clone(),
            sequence: origin.sequence,
            stored_at: u64::try_from(origin.stored_at.as_microsecond()).unwrap_or_default(),
        }),
    }
}

/// Converts a failure that the handler returned. Long texts are clipped.
fn failure_from_wit(failure: wit::Failure) -> CallFailure {
    let kind = match failure.kind {
        wit::FailureKind::Retry => FailureKind::Retry,
        wit::FailureKind::RetryAfter(after) => {
            FailureKind::RetryAfter(Duration::from_millis(after))
        }
        wit::FailureKind::Reject => FailureKind::Reject,
    };
    let clip = |text: String, limit: usize| {
        text.chars()
            .filter(|c| *c != '\0')
            .take(limit)
            .collect::<String>()
    };
    let (code, message) = (
        failure.code.map(|code| clip(code, 64)),
        clip(failure.message, 4_000),
    );
    CallFailure {
        kind,
        code,
        message,
        frames: Vec::new(),
    }
}

/// Checks that a batch handler returned one result for each message.
fn check_result_count(
    messages: usize,
    answers: Vec<HandlerResult>,
) -> Result<Vec<HandlerResult>, CallFailure> {
    if answers.len() == messages {
        return Ok(answers);
    }
    let why = format!(
        "the batch handler received {messages} messages and returned {} results",
        answers.len()
    );
    Err(CallFailure::new(
        FailureKind::Retry,
        "wrong-result-count",
        why,
    ))
}

/// The failure of a doomed delivery, regardless of the handler result. After a failed statement the
/// handler may still choose to reject the message or to delay the retry.
fn doomed_failure(
    result: Result<Vec<HandlerResult>, CallFailure>,
    doom: CallFailure,
) -> CallFailure {
    // In a batch it is unknown which message ran the failed statement.
    let own = result
        .ok()
        .filter(|answers| answers.len() == 1)
        .and_then(|answers| answers.into_iter().next());
    match own {
        Some(Err(own))
            if doom.kind == FailureKind::Retry
                && matches!(own.kind, FailureKind::Reject | FailureKind::RetryAfter(_)) =>
        {
            own
        }
        _ => doom,
    }
}

fn timeout_failure(time: Duration) -> CallFailure {
    CallFailure::new(
        FailureKind::Retry,
        "timeout",
        format!("the handler ran longer than its limit of {time:?} (`time` under [worker.limits])"),
    )
}

/// Converts a trap into a failure.
fn trap_failure(error: &wasmtime::Error, state: &CallState) -> CallFailure {
    if state.limiter.refused_memory {
        let limit = bytesize::ByteSize(state.limiter.memory_limit() as u64)
            .display()
            .iec();
        return CallFailure::new(
            FailureKind::Trap,
            "out-of-memory",
            format!(
                "the handler requested more memory than its limit of {limit} (`memory` under \
                 [worker.limits])"
            ),
        );
    }
    let frames = frames(error);
    let place = frames
        .first()
        .map(|name| format!(" in {name}"))
        .unwrap_or_default();
    let failure = match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => timeout_failure(state.call.worker.limits.time),
        Some(Trap::StackOverflow) => CallFailure::new(
            FailureKind::Trap,
            "stack-overflow",
            format!("the handler recursed too deep{place}"),
        ),
        Some(Trap::UnreachableCodeReached) => {
            CallFailure::new(FailureKind::Trap, "trap", format!("{UNREACHABLE}{place}"))
        }
        Some(trap) => CallFailure::new(
            FailureKind::Trap,
            "trap",
            format!("the handler trapped{place}: {trap}"),
        ),
        // An exit, a host call that exceeded a limit, or a failure of the machine.
        None => CallFailure::new(
            FailureKind::Retry,
            "trap",
            format!("the handler trapped{place}: {}", error.root_cause()),
        ),
    };
    CallFailure { frames, ..failure }
}

/// The message for a trap without a panic message.
const UNREACHABLE: &str = "the handler panicked or reached code that cannot be reached";

/// Maximum length of a panic message, in characters.
const PANIC_MESSAGE_MAX: usize = 500;

/// Finds the panic message in the log output: of a Rust or Go panic, or the exception of another
/// language.
fn panic_message(logs: &str) -> Option<String> {
    // A log entry of a handler is one line. A panic that the SDK logs has its line breaks escaped.
    let logs = logs.replace("\\n", "\n");
    let lines: Vec<&str> = logs.lines().collect();
    let said = |at: usize| {
        lines
            .get(at)
            .map(|line| line.trim())
            .filter(|line| !line.is_empty())
    };
    let begins = |line: &&str, what: &str| line.trim_start().starts_with(what);
    let after = |at: usize| lines.len().checked_sub(at).map(|_| at + 1).and_then(said);
    let rust = lines
        .iter()
        .rposition(|line| line.contains(" panicked at "))
        .and_then(after);
    let go = || {
        lines
            .iter()
            .rev()
            .find_map(|line| line.trim().strip_prefix("panic: "))
    };
    let python = || {
        let at = lines
            .iter()
            .rposition(|line| begins(line, "Traceback (most recent call last):"))?;
        lines
            .get(at + 1..)?
            .iter()
            .rev()
            .find(|line| !line.trim().is_empty() && !line.starts_with(' '))
            .copied()
    };
    let other = || {
        let is_error = |line: &&&str| {
            let name = line
                .split(':')
                .next()
                .unwrap_or_default()
                .trim_start_matches("Uncaught ");
            line.contains(": ")
                && (name.ends_with("Error") || name.ends_with("Exception"))
                && !name.contains(' ')
        };
        lines.iter().rev().find(is_error).copied()
    };
    let message = rust.or_else(go).or_else(python).or_else(other)?;
    Some(message.trim().chars().take(PANIC_MESSAGE_MAX).collect())
}

/// Maximum number of stored frames of a trap. It includes the frames of the panic machinery.
const FRAMES_MAX: usize = 32;

/// Demangled names of the running functions, innermost first, as far as the component has names.
fn frames(error: &wasmtime::Error) -> Vec<String> {
    let trace = error.downcast_ref::<wasmtime::WasmBacktrace>();
    let frames = trace
        .map(wasmtime::WasmBacktrace::frames)
        .unwrap_or_default();
    let names = frames.iter().filter_map(|frame| frame.func_name());
    // The alternate form omits the hash, which differs between builds.
    names
        .take(FRAMES_MAX)
        .map(|name| format!("{:#}", rustc_demangle::demangle(name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_message_is_found_in_every_language() {
        let words = |logs: &str| panic_message(logs).unwrap_or_default();
        assert_eq!(
            words("critical panic: panicked at src/panic.rs:7:5:\\nrequested panic\n"),
            "requested panic"
        );
        let rust = "charging\n\nthread '<unnamed>' panicked at src/lib.rs:7:9:\nthe amount is negative\nnote: run with `X`\n";
        assert_eq!(words(rust), "the amount is negative");
        let python = "x\nTraceback (most recent call last):\n  File \"app.py\", line 3, in handle\n    raise ValueError(\"no\")\n\
            ValueError: no\n";
        assert_eq!(words(python), "ValueError: no");
        assert_eq!(
            words("Uncaught TypeError: x is undefined\n    at handle (app.js:3)\n"),
            "Uncaught TypeError: x is undefined"
        );
        assert_eq!(
            words("panic: runtime error: index out of range [3]\n\ngoroutine 1 [running]:\n"),
            "runtime error: index out of range [3]"
        );
        for none in [
            "",
            "charging card 7\n",
            "an Error happened: no\n",
            "thread 'x' panicked at src/lib.rs:7:9:",
        ] {
            assert_eq!(panic_message(none), None, "{none}");
        }
    }
}
