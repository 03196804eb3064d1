//! Failures of a call: returned by the handler, or caused by a trap, a timeout or a limit.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wasmtime::Trap;

use super::bindings::oncely::worker::types as wit;
use super::limiter::Limiter;
use crate::model::failure_code::FailureCode;
use crate::model::verdict::PANIC_PREFIX;

/// The result of a handler for one message.
pub type HandlerResult = Result<(), CallFailure>;

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
    pub(super) fn with_panic_location(mut self, logs: &str) -> Self {
        if self.code.as_deref() == Some(FailureCode::Trap.as_str())
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
    pub fn new(kind: FailureKind, code: FailureCode, message: impl Into<String>) -> Self {
        CallFailure {
            kind,
            code: Some(code.as_str().to_owned()),
            message: message.into(),
            frames: Vec::new(),
        }
    }
}

/// Converts a failure that the handler returned. Long texts are clipped.
pub(super) fn failure_from_wit(failure: wit::Failure) -> CallFailure {
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

/// Converts the error text of a handler that has no kinds of failures: the message is retried.
pub(super) fn failure_from_text(message: String) -> CallFailure {
    failure_from_wit(wit::Failure {
        kind: wit::FailureKind::Retry,
        code: None,
        message,
    })
}

/// Checks that a batch handler returned one result for each message.
pub(super) fn check_result_count(
    messages: usize,
    results: Vec<HandlerResult>,
) -> Result<Vec<HandlerResult>, CallFailure> {
    if results.len() == messages {
        return Ok(results);
    }
    let why = format!(
        "the batch handler received {messages} messages and returned {} results",
        results.len()
    );
    Err(CallFailure::new(
        FailureKind::Retry,
        FailureCode::WrongResultCount,
        why,
    ))
}

/// The failure of a doomed delivery, regardless of the handler result. After a failed statement the
/// handler may still choose to reject the message or to delay the retry.
pub(super) fn doomed_failure(
    result: Result<Vec<HandlerResult>, CallFailure>,
    doom: CallFailure,
) -> CallFailure {
    // In a batch it is unknown which message ran the failed statement.
    let own = result
        .ok()
        .filter(|results| results.len() == 1)
        .and_then(|results| results.into_iter().next());
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

pub(super) fn timeout_failure(time: Duration) -> CallFailure {
    CallFailure::new(
        FailureKind::Retry,
        FailureCode::Timeout,
        format!("the handler ran longer than its limit of {time:?} (`time` under [worker.limits])"),
    )
}

/// Converts a trap into a failure.
pub(super) fn trap_failure(
    error: &wasmtime::Error,
    limiter: &Limiter,
    time: Duration,
) -> CallFailure {
    if limiter.refused_memory {
        let limit = bytesize::ByteSize(limiter.memory_limit() as u64)
            .display()
            .iec();
        return CallFailure::new(
            FailureKind::Trap,
            FailureCode::OutOfMemory,
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
        Some(Trap::Interrupt) => timeout_failure(time),
        Some(Trap::StackOverflow) => CallFailure::new(
            FailureKind::Trap,
            FailureCode::StackOverflow,
            format!("the handler recursed too deep{place}"),
        ),
        Some(Trap::UnreachableCodeReached) => CallFailure::new(
            FailureKind::Trap,
            FailureCode::Trap,
            format!("{UNREACHABLE}{place}"),
        ),
        Some(trap) => CallFailure::new(
            FailureKind::Trap,
            FailureCode::Trap,
            format!("the handler trapped{place}: {trap}"),
        ),
        // An exit, a host call that exceeded a limit, or a failure of the machine.
        None => CallFailure::new(
            FailureKind::Retry,
            FailureCode::Trap,
            format!("the handler trapped{place}: {}", error.root_cause()),
        ),
    };
    CallFailure { frames, ..failure }
}

/// The message for a trap without a panic message.
const UNREACHABLE: &str = "the handler panicked or reached code that cannot be reached";

/// Maximum length of a panic message, in characters.
const PANIC_MESSAGE_MAX: usize = 500;

/// The panic of componentize-py's runtime after an exception, whose traceback it prints before.
const PYTHON_PANIC: &str = "Python function threw an unexpected exception";

/// The last output of an instance in JavaScript after an exception, which the SDK prints before.
const JAVASCRIPT_TRAP: &str = "the exception above ended the instance";

/// The last output of StarlingMonkey, the engine of componentize-js, after an exception.
const JAVASCRIPT_ABORT: &str = "Redirecting call to abort() to mozalloc_abort";

/// The output of StarlingMonkey when the handler waits and nothing can happen any more.
const JAVASCRIPT_STUCK: &str = "event loop error, but no exception is pending";

/// Finds the exception in the output of an instance in JavaScript. Its message may have several
/// lines.
fn javascript_exception(lines: &[&str]) -> Option<String> {
    if let Some(end) = lines
        .iter()
        .rposition(|line| line.contains(JAVASCRIPT_TRAP))
    {
        let begin = lines
            .get(..end)?
            .iter()
            .rposition(|line| line.starts_with("Uncaught "))?;
        let is_message =
            |line: &&&str| !line.starts_with("    at ") && !line.starts_with("Caused by: ");
        let message: Vec<&str> = lines
            .get(begin..end)?
            .iter()
            .take_while(is_message)
            .map(|line| line.trim())
            .collect();
        return Some(message.join(" "));
    }

    if lines.iter().any(|line| line.contains(JAVASCRIPT_STUCK)) {
        return Some("the handler awaits a promise that nothing settles".to_owned());
    }

    // A handler without the SDK
    lines.iter().rfind(|line| line.contains(JAVASCRIPT_ABORT))?;
    let stack = lines.iter().rposition(|line| line.trim() == "Stack:")?;
    let message = lines.get(stack.checked_sub(1)?)?.trim();
    (!message.is_empty()).then(|| message.to_owned())
}

/// Finds the panic message in the log output: of a Rust or Go panic, the exception of another
/// language, or a failed assertion of C.
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
        .and_then(after)
        .filter(|message| !message.starts_with(PYTHON_PANIC));
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
    let assertion = || {
        let mut newest = lines.iter().rev();
        newest
            .find(|line| begins(line, "Assertion failed: "))
            .copied()
    };
    let message = javascript_exception(&lines)
        .or_else(|| {
            let found = rust
                .or_else(go)
                .or_else(python)
                .or_else(assertion)
                .or_else(other);
            found.map(str::to_owned)
        })
        .filter(|message| !message.trim().is_empty())?;
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
        let runtime = format!(
            "{python}\nthread '<unnamed>' panicked at runtime/src/lib.rs:1:2:\n{PYTHON_PANIC}\nnote: run with `X`\n"
        );
        assert_eq!(words(&runtime), "ValueError: no");
        assert_eq!(
            words("Uncaught TypeError: x is undefined\n    at handle (app.js:3)\n"),
            "Uncaught TypeError: x is undefined"
        );
        let sdk = "Traceback (most recent call last):\nUncaught ZodError: two issues:\n  the id\n    at parse (app.ts:3)\n\
            Caused by: Error: no\n\"the exception above ended the instance\"\n\
            Redirecting call to abort() to mozalloc_abort\n";
        assert_eq!(words(sdk), "Uncaught ZodError: two issues: the id");
        let engine = "x\ncan't access property \"a\" of null\nStack:\n  handle@app.js:3:1\n\n\
            Redirecting call to abort() to mozalloc_abort\n";
        assert_eq!(words(engine), "can't access property \"a\" of null");
        let stuck = "Error while (call) event loop error, but no exception is pending. Aborting\n";
        assert_eq!(
            words(stuck),
            "the handler awaits a promise that nothing settles"
        );
        assert_eq!(
            words("panic: runtime error: index out of range [3]\n\ngoroutine 1 [running]:\n"),
            "runtime error: index out of range [3]"
        );
        assert_eq!(
            words("x\nAssertion failed: cents > 0 (app.c: charge: 7)\n"),
            "Assertion failed: cents > 0 (app.c: charge: 7)"
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
