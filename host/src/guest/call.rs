//! One call of a guest: its instance, its limits, its deadline, and what became of it.

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

/// How long a call may overrun its time before the host stops waiting for it. Guest code is stopped at the deadline
/// itself; this is for a host call, such as a statement that the database is just ending for the same reason.
const GRACE: Duration = Duration::from_millis(500);

/// How many bytes one host call may lift out of a guest's memory.
const HOST_CALL_BYTES: usize = 32 << 20;

/// Everything one call is given.
pub struct Call {
    /// One for a handler, one or more for a batch handler.
    pub messages: Vec<Arc<Message>>,
    pub worker: Arc<Worker>,
    pub version: u32,
    /// 1 for the first; the highest of the messages.
    pub attempt: u32,
    /// The time this attempt began, as the guest sees it.
    pub now: Timestamp,
    /// The largest payload the broker takes, headers included, in bytes.
    pub payload_max: usize,
    pub database: Arc<dyn Database>,
    pub cache: Arc<dyn CacheReader>,
    /// State as the item before left it; comes back in the [`CallOutcome`].
    pub state: BatchState,
    /// What an HTTP worker is to answer; it has one message all the same, which stands for the request.
    pub request: Option<RequestCall>,
    /// Records what the guest asks and sees; or has its answers from a record.
    pub recorder: Recorder,
}

/// What a call came to.
pub struct CallOutcome {
    /// An answer for each message; the outer error when the call failed as a whole.
    pub result: Result<Vec<HandlerResult>, CallFailure>,
    /// What an HTTP worker answered.
    pub response: Option<HttpResponse>,
    pub outputs: Vec<Output>,
    pub state: BatchState,
    /// What it left for the cache.
    pub cache: CacheWrites,
    /// Whether it ran any SQL: if not, it can be dropped from its batch without a trace.
    pub ran_sql: bool,
    pub logs: String,
    /// What is known of a call that failed, for each message but for its own failure.
    pub record: Option<Box<Record>>,
    /// What became of a replay.
    pub replay_progress: Option<ReplayProgress>,
    /// The instance, when all went well: it may be called again.
    pub warm: Option<WarmInstance>,
}

/// How far a replay went.
pub struct ReplayProgress {
    /// How many things the guest asked that the record has, too.
    pub steps: usize,
    /// Why it ended before the guest did.
    pub ended: Option<PlaybackEnd>,
    /// What the record has and the guest did not ask any more.
    pub next: Option<HostCall>,
}

/// What a handler said about one message.
pub type HandlerResult = Result<(), CallFailure>;

/// An instance that has handled a message in good order.
pub struct WarmInstance {
    store: Store<CallState>,
    instance: Instance,
}

/// Why a call failed, as far as the guest is to blame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallFailure {
    pub kind: FailureKind,
    pub code: Option<String>,
    /// For a person.
    pub message: String,
    /// Where it trapped: names of the component's functions, innermost first.
    pub frames: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    Retry,
    /// It trapped, by its own doing wherever it runs: to be tried again like `Retry`.
    Trap,
    RetryAfter(Duration),
    Reject,
    /// It sent something it may not send.
    OutputRefused,
    /// Another transaction stood in its way; not its fault, not an attempt.
    Conflict,
}

impl CallFailure {
    /// The same, with the source file of a Rust panic, which it says on its standard error, as the innermost place: the
    /// function itself has often become part of another.
    fn with_panic_location(mut self, logs: &str) -> Self {
        if self.code.as_deref() == Some("trap")
            && let Some(panic) = panic_message(logs)
        {
            self.message = match self.message.split_once(UNREACHABLE) {
                Some((_, place)) => format!("{PANIC_PREFIX}{panic}{place}"),
                None => format!("{}; it said: {panic}", self.message),
            };
        }
        let said = logs
            .lines()
            .rev()
            .find_map(|line| line.split_once(" panicked at "));
        if let (Some((_, place)), false) = (said, self.frames.is_empty()) {
            let file = place.split(':').next().unwrap_or_default();
            // What stands before that is this machine's.
            let parts: Vec<&str> = file.rsplit('/').take(3).collect();
            let file: Vec<&str> = parts.into_iter().rev().collect();
            self.frames
                .insert(0, format!("panic in {}", file.join("/")));
        }
        self
    }

    pub fn new(kind: FailureKind, code: &str, message: impl Into<String>) -> Self {
        CallFailure {
            kind,
            code: Some(code.to_owned()),
            message: message.into(),
            frames: Vec::new(),
        }
    }
}

/// The host's side of one running instance.
pub(super) struct CallState {
    pub call: Call,
    /// Whether a batch handler runs, also when it is given but one message.
    pub in_batch: bool,
    pub outputs: Vec<Output>,
    pub output_bytes: usize,
    pub state_usage: StateUsage,
    pub cache: CacheWrites,
    pub statements: u32,
    /// The first thing that dooms this delivery, whatever the handler returns.
    pub doomed: Option<CallFailure>,
    /// The first error of the host: nothing the guest did, and nothing it may decide about.
    pub host_error: Option<anyhow::Error>,
    pub deadline: Instant,
    /// When the instance was made.
    pub instantiated_at: Instant,
    /// Whether it handled other messages before.
    warm: bool,
    pub logs: Logs,
    pub limiter: Limiter,
    /// What an HTTP worker answered.
    response: Option<HttpResponse>,
    /// Made when first asked for: most Rust handlers never do.
    wasi: Option<WasiCtx>,
    http: WasiHttpCtx,
    hooks: DenyOutgoingHttp,
    table: ResourceTable,
}

/// What a call has used of the limits of keyed state.
#[derive(Default)]
pub(super) struct StateUsage {
    /// The keys it read or changed.
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
    /// Runs the handler once: in the instance `warm`, or else in a fresh one. The outer error is the host's: no attempt
    /// is spent.
    pub async fn call(
        &self,
        call: Call,
        warm: Option<WarmInstance>,
    ) -> anyhow::Result<CallOutcome> {
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
        let running = self.run(&mut store, &mut instance, messages);
        let finished = tokio::time::timeout_at((deadline + GRACE).into(), running).await;
        let state = store.data_mut();
        if let Some(error) = state.host_error.take() {
            return Err(error);
        }
        let result = match finished {
            Ok(Ok(answers)) => check_result_count(state.call.messages.len(), answers),
            Ok(Err(error)) if error.is::<wasmtime::PoolConcurrencyLimitError>() => {
                return Err(anyhow::Error::from(error)).context("find room for one more instance");
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
            // Lets others run: a busy guest shares its thread with everything else of the host.
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

    /// Makes ready for the next call of the same instance: what counts against the limits of one call begins anew, what
    /// the instance holds stays.
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

    /// What is known of the call, to be completed with the failure.
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

    /// What the view of HTTP is made of.
    pub fn http_parts(&mut self) -> (&mut WasiHttpCtx, &mut DenyOutgoingHttp, &mut ResourceTable) {
        (&mut self.http, &mut self.hooks, &mut self.table)
    }

    /// Whether this call's transaction may write.
    pub fn may_write(&self) -> bool {
        self.call
            .request
            .as_ref()
            .is_none_or(|request| request.may_write)
    }

    /// The first message of the call, which for a handler is the only one.
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

/// What the handler itself said.
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

/// An answer for each message, or else no answer at all.
fn check_result_count(
    messages: usize,
    answers: Vec<HandlerResult>,
) -> Result<Vec<HandlerResult>, CallFailure> {
    if answers.len() == messages {
        return Ok(answers);
    }
    let why = format!(
        "the batch handler was given {messages} messages and answered for {}",
        answers.len()
    );
    Err(CallFailure::new(
        FailureKind::Retry,
        "wrong-result-count",
        why,
    ))
}

/// A doomed delivery fails whatever the handler made of the error it was given. After a statement that failed the
/// handler may still say that trying again is of no use, or when it is.
fn doomed_failure(
    result: Result<Vec<HandlerResult>, CallFailure>,
    doom: CallFailure,
) -> CallFailure {
    // In company nobody knows whose statement it was.
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

/// What a trap says of the handler.
fn trap_failure(error: &wasmtime::Error, state: &CallState) -> CallFailure {
    if state.limiter.refused_memory {
        let limit = bytesize::ByteSize(state.limiter.memory_limit() as u64)
            .display()
            .iec();
        return CallFailure::new(
            FailureKind::Trap,
            "out-of-memory",
            format!(
                "the handler asked for more memory than its limit of {limit} (`memory` under [worker.limits])"
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
        // An exit, or a host call that broke a limit; perhaps the machine.
        None => CallFailure::new(
            FailureKind::Retry,
            "trap",
            format!("the handler trapped{place}: {}", error.root_cause()),
        ),
    };
    CallFailure { frames, ..failure }
}

/// The message for a handler that ended itself without one.
const UNREACHABLE: &str = "the handler panicked or reached code that cannot be reached";

/// How much of a panic message is kept, in characters.
const PANIC_MESSAGE_MAX: usize = 500;

/// What a handler that ended itself said last: the message of a Rust or Go panic, or the exception of another language.
fn panic_message(logs: &str) -> Option<String> {
    // What a handler logs is one line each; a panic that the SDK logs has its line breaks as `\\n`.
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

/// How many frames of a trap are remembered, those of the language's own panics included.
const FRAMES_MAX: usize = 32;

/// The functions of the component that were running, innermost first, as far as it has their names, as people write them.
fn frames(error: &wasmtime::Error) -> Vec<String> {
    let trace = error.downcast_ref::<wasmtime::WasmBacktrace>();
    let frames = trace
        .map(wasmtime::WasmBacktrace::frames)
        .unwrap_or_default();
    let names = frames.iter().filter_map(|frame| frame.func_name());
    // The short form leaves out what differs from build to build.
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
            words("critical panic: panicked at src/panic.rs:7:5:\\ntold to panic\n"),
            "told to panic"
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
