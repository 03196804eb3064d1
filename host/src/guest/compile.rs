//! Compiling in a process of its own, with limits, one component at a time.
//!
//! A component is code of a stranger, and a compiler is large: it may take minutes and gigabytes over a few kilobytes, and
//! it may panic. In a process of its own it can be limited and ended. That process is this program with the command
//! `compile-component`. It is given the component on its standard input and answers on its standard output; it ends when
//! the input is closed, as it is when the host ends, and is killed when its host no longer waits for it.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::engine;
use crate::config::CompileSettings;
use crate::model::hint::{WithHint, hints};
use crate::model::units;

/// The command of this program that compiles.
pub const COMMAND: &str = "compile-component";

/// How much longer than its processor time a compilation may take by the clock: other processes want the processor, too.
const WALL_TIME_FACTOR: u32 = 5;

/// Variables of the process that keep its part of the address space small and the same on every machine: two threads
/// that compile, one for all else, and an allocator that reserves 64 MiB at a time.
const COMPILER_ENV: [(&str, &str); 3] = [
    ("RAYON_NUM_THREADS", "2"),
    ("TOKIO_WORKER_THREADS", "1"),
    ("MIMALLOC_ARENA_RESERVE", "65536"),
];

/// How many bytes of machine code are read from the process at most.
const CODE_MAX: u64 = 1 << 30;

/// How many bytes of its standard error are read.
const STDERR_MAX: u64 = 16 << 10;

/// How many refusals are remembered.
const REFUSALS_MAX: usize = 1000;

/// The first byte of an answer: machine code follows, or a sentence.
const COMPILED: u8 = b'+';
const INVALID: u8 = b'-';
const PANICKED: u8 = b'!';

/// SHA-256 of a component.
pub type ComponentDigest = [u8; 32];

/// Starts the processes that compile, one after another. Cheap to clone.
#[derive(Clone)]
pub(super) struct Compiler {
    settings: Arc<CompileSettings>,
    permits: Arc<Semaphore>,
    refusals: Arc<Mutex<Refusals>>,
}

impl Compiler {
    pub fn new(settings: CompileSettings) -> Self {
        Compiler {
            settings: Arc::new(settings),
            permits: Arc::new(Semaphore::new(1)),
            refusals: Arc::default(),
        }
    }

    /// Waits until no other component is compiled. Whoever waits was first is next.
    pub async fn acquire(&self) -> Result<SemaphorePermit<'_>> {
        self.permits
            .acquire()
            .await
            .context("wait for the compiler")
    }

    /// The refusal of this component, if it was refused before.
    pub fn check_refusals(&self, digest: &ComponentDigest) -> Result<()> {
        let refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        match refusals.by_digest.get(digest) {
            Some(refusal) => Err(refusal.error()),
            None => Ok(()),
        }
    }

    /// Remembers that a component is refused, so that it costs no time again.
    pub fn refuse(&self, digest: ComponentDigest, error: anyhow::Error) -> anyhow::Error {
        tracing::warn!(
            digest = hex::encode(digest),
            error = format!("{error:#}"),
            "component refused"
        );
        let refusal = Refusal {
            message: format!("{error:#}"),
            hints: hints(&error).join("; "),
        };
        self.refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remember(digest, refusal);
        error
    }

    /// Compiles a component; the caller has the turn. When the future is dropped the process is killed.
    ///
    /// # Errors
    /// [`CompileError::Refused`] if the component is to blame; it would fail again.
    pub async fn compile(&self, wasm: &Bytes) -> Result<Vec<u8>, CompileError> {
        let limit = self.settings.time.saturating_mul(WALL_TIME_FACTOR);
        match tokio::time::timeout(limit, self.run(wasm)).await {
            Ok(answer) => self.parse_output(answer?),
            Err(_) => Err(CompileError::Other(
                anyhow!("compiling the component was not done after {}", units::format_duration(limit))
                    .hint("try again when this machine has less to do, or give the host a larger `compile_time`"),
            )),
        }
    }

    async fn run(&self, wasm: &Bytes) -> Result<CompilerOutput> {
        let settings = &self.settings;
        let mut child = Command::new(&settings.program)
            .arg0("oncely")
            .args([
                COMMAND,
                "--time",
                &settings.time.as_secs().max(1).to_string(),
            ])
            .args(["--memory", &settings.memory.to_string()])
            // Passwords of the host are none of its business.
            .env_clear()
            .envs(COMPILER_ENV)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| {
                format!(
                    "start {} to compile a component",
                    settings.program.display()
                )
            })?;
        let mut stdin = child
            .stdin
            .take()
            .context("write to the compiling process")?;
        let stdout = child
            .stdout
            .take()
            .context("read from the compiling process")?;
        let stderr = child
            .stderr
            .take()
            .context("read from the compiling process")?;
        let write = async {
            // Its end may come before it has read everything; its status says why.
            let _ = stdin.write_all(&(wasm.len() as u64).to_le_bytes()).await;
            let _ = stdin.write_all(wasm).await;
            let _ = stdin.flush().await;
        };
        let ((), output, stderr) = tokio::join!(
            write,
            read_limited(stdout, CODE_MAX),
            read_limited(stderr, STDERR_MAX)
        );
        let status = child
            .wait()
            .await
            .context("wait for the compiling process")?;
        drop(stdin);
        let stderr = String::from_utf8_lossy(&stderr?).into_owned();
        Ok(CompilerOutput {
            status,
            output: output?,
            stderr,
        })
    }

    /// What an answer means.
    fn parse_output(&self, answer: CompilerOutput) -> Result<Vec<u8>, CompileError> {
        let CompilerOutput {
            status,
            mut output,
            stderr,
        } = answer;
        let text = |output: &[u8]| {
            String::from_utf8_lossy(output.get(1..).unwrap_or_default()).into_owned()
        };
        let is_success = status.success();
        if is_success && output.first() != Some(&COMPILED) && is_out_of_memory(&text(&output)) {
            return Err(self.out_of_memory());
        }
        match output.first() {
            Some(&COMPILED) if is_success => {
                output.remove(0);
                Ok(output)
            }
            Some(&INVALID) if is_success => Err(CompileError::Refused(
                anyhow!(text(&output))
                    .context("the component cannot be compiled")
                    .hint("build it again, with a release of its tool that makes components for WASI 0.2"),
            )),
            Some(&PANICKED) if is_success => Err(CompileError::Refused(compiler_crash(&text(&output)))),
            _ => Err(self.exit_failure(status, &stderr)),
        }
    }

    fn out_of_memory(&self) -> CompileError {
        let memory = units::format_size(self.settings.memory);
        CompileError::Refused(
            anyhow!("compiling the component takes more than {memory} of memory").hint(
                "build it with optimisation and split large functions, or give the host a larger `compile_memory`",
            ),
        )
    }

    /// Why the process ended without an answer.
    fn exit_failure(&self, status: ExitStatus, stderr: &str) -> CompileError {
        let is_signal = |signal: rustix::process::Signal| status.signal() == Some(signal.as_raw());
        if is_signal(rustix::process::Signal::XCPU) {
            let time = units::format_duration(self.settings.time);
            return CompileError::Refused(anyhow!("compiling the component takes more than {time} of processor time").hint(
                "build it with optimisation and split large functions, or give the host a larger `compile_time`",
            ));
        }
        if is_out_of_memory(stderr) {
            return self.out_of_memory();
        }
        let first_line = stderr
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();
        // Killed by hand or by a machine that is short of memory: another time it may go well.
        if is_signal(rustix::process::Signal::KILL) || is_signal(rustix::process::Signal::TERM) {
            return CompileError::Other(anyhow!(
                "the process that compiled the component was killed ({status})"
            ));
        }
        match status.signal() {
            Some(_) => CompileError::Refused(compiler_crash(&format!("{status} {first_line}"))),
            None => CompileError::Other(anyhow!(
                "the process that compiles components failed ({status}): {first_line}"
            )),
        }
    }
}

/// Whether its standard error says that it got no more memory.
fn is_out_of_memory(stderr: &str) -> bool {
    [
        "memory allocation of",
        "annot allocate memory",
        "Resource temporarily unavailable",
    ]
    .iter()
    .any(|words| stderr.contains(words))
}

/// The component meets a fault of the compiler.
fn compiler_crash(detail: &str) -> anyhow::Error {
    anyhow!(detail.trim().to_owned())
        .context("the compiler fails on this component")
        .hint("build it with another release of its tool, and report the component as a fault of Oncely")
}

/// Why a component was not compiled.
pub(super) enum CompileError {
    /// The component is to blame.
    Refused(anyhow::Error),
    /// Something else; it may go well another time.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for CompileError {
    fn from(error: anyhow::Error) -> Self {
        CompileError::Other(error)
    }
}

struct CompilerOutput {
    status: ExitStatus,
    output: Vec<u8>,
    stderr: String,
}

/// Reads up to `most` bytes, and the rest without keeping it.
async fn read_limited(mut pipe: impl AsyncRead + Unpin, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    (&mut pipe)
        .take(most)
        .read_to_end(&mut bytes)
        .await
        .context("read from the compiling process")?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink())
        .await
        .context("read from the compiling process")?;
    Ok(bytes)
}

/// Components that were refused, the last of them.
#[derive(Default)]
struct Refusals {
    by_digest: HashMap<ComponentDigest, Refusal>,
    oldest_first: VecDeque<ComponentDigest>,
}

struct Refusal {
    message: String,
    hints: String,
}

impl Refusals {
    fn remember(&mut self, digest: ComponentDigest, refusal: Refusal) {
        if self.by_digest.insert(digest, refusal).is_none() {
            self.oldest_first.push_back(digest);
        }
        if self.oldest_first.len() > REFUSALS_MAX
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.by_digest.remove(&oldest);
        }
    }
}

impl Refusal {
    fn error(&self) -> anyhow::Error {
        let error = anyhow!("{} (it was refused before)", self.message);
        if self.hints.is_empty() {
            error
        } else {
            error.hint(self.hints.clone())
        }
    }
}

/// The other side: compiles the component on standard input within limits, and answers on standard output.
///
/// # Errors
/// When the limits cannot be set or the pipes break. That a component is not valid is an answer, not an error.
pub fn compile_component(time: Duration, memory: u64) -> Result<()> {
    set_limits(time, memory)?;
    let wasm = read_component()?;
    exit_when_stdin_closes()?;
    let (first, rest) = match compile_in_process(&wasm) {
        Ok(Ok(code)) => (COMPILED, code),
        Ok(Err(invalid)) => (INVALID, invalid.into_bytes()),
        Err(panicked) => (PANICKED, panicked.into_bytes()),
    };
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(&[first])
        .and_then(|()| stdout.write_all(&rest))
        .context("write the answer")?;
    stdout.flush().context("write the answer")
}

fn set_limits(time: Duration, memory: u64) -> Result<()> {
    let limits = [
        (Resource::As, memory),
        (Resource::Cpu, time.as_secs().max(1)),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
    ];
    for (resource, most) in limits {
        // At both limits of its time at once, a process is killed with the signal of the upper one, which says nothing.
        let maximum = if resource == Resource::Cpu {
            most.saturating_add(1)
        } else {
            most
        };
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(maximum),
        };
        setrlimit(resource, limit).with_context(|| format!("limit {resource:?} to {most}"))?;
    }
    // Messages come first. Where that is not allowed it is compiled all the same.
    let _ = rustix::process::nice(10);
    Ok(())
}

/// A component behind its length in eight bytes, little-endian.
fn read_component() -> Result<Vec<u8>> {
    let mut stdin = std::io::stdin().lock();
    let mut length = [0; 8];
    stdin
        .read_exact(&mut length)
        .context("read the length of the component")?;
    let length = u64::from_le_bytes(length);
    let mut wasm = Vec::new();
    stdin
        .take(length)
        .read_to_end(&mut wasm)
        .context("read the component")?;
    if wasm.len() as u64 != length {
        bail!("the component ends after {} of {length} bytes", wasm.len());
    }
    Ok(wasm)
}

/// Ends this process when standard input is closed: the host has ended.
fn exit_when_stdin_closes() -> Result<()> {
    let wait = || {
        let _ = std::io::stdin().lock().read(&mut [0]);
        std::process::exit(1);
    };
    std::thread::Builder::new()
        .name("host".to_owned())
        .spawn(wait)
        .context("watch the host")?;
    Ok(())
}

/// Machine code; or why the component is not valid; or the panic of the compiler.
fn compile_in_process(wasm: &[u8]) -> Result<Result<Vec<u8>, String>, String> {
    panic::set_hook(Box::new(|_| {}));
    let compiled = panic::catch_unwind(AssertUnwindSafe(|| engine::precompile(wasm)));
    match compiled {
        Ok(Ok(code)) => Ok(Ok(code)),
        Ok(Err(error)) => Ok(Err(format!("{error:#}"))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(text
                .unwrap_or("a panic")
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler() -> Compiler {
        Compiler::new(CompileSettings::default())
    }

    fn ended(raw_status: i32, stderr: &str) -> (bool, String) {
        match compiler().exit_failure(ExitStatus::from_raw(raw_status), stderr) {
            CompileError::Refused(error) => (true, format!("{error:#}")),
            CompileError::Other(error) => (false, format!("{error:#}")),
        }
    }

    #[test]
    fn compile_refuses_a_component_for_time_memory_or_a_crash() {
        let (cpu, abort, killed, exit_1) = (24, 6, 9, 1 << 8);
        assert_eq!(
            ended(cpu, ""),
            (
                true,
                "compiling the component takes more than 2m of processor time".to_owned()
            )
        );
        let (refused, said) = ended(abort, "memory allocation of 123 bytes failed\n");
        assert!(
            refused && said.starts_with("compiling the component takes more than 2"),
            "{said}"
        );
        let (refused, said) = ended(abort, "\nthread 'main' has overflowed its stack\n");
        assert!(
            refused && said.starts_with("the compiler fails on this component: "),
            "{said}"
        );
        assert!(!ended(killed, "").0);
        assert_eq!(
            ended(exit_1, "error: x"),
            (false, {
                let status = ExitStatus::from_raw(exit_1);
                format!("the process that compiles components failed ({status}): error: x")
            })
        );
    }

    #[test]
    fn compiler_output_is_code_or_a_refusal() {
        let parse = |output: &[u8]| {
            let status = ExitStatus::from_raw(0);
            compiler().parse_output(CompilerOutput {
                status,
                output: output.to_vec(),
                stderr: String::new(),
            })
        };
        assert_eq!(parse(b"+code").ok(), Some(b"code".to_vec()));
        let Err(CompileError::Refused(error)) = parse(b"-type mismatch") else {
            panic!("not refused")
        };
        assert_eq!(
            format!("{error:#}"),
            "the component cannot be compiled: type mismatch"
        );
        let Err(CompileError::Refused(error)) = parse(b"!multiple memories") else {
            panic!("not refused")
        };
        assert_eq!(
            format!("{error:#}"),
            "the compiler fails on this component: multiple memories"
        );
        assert!(matches!(parse(b""), Err(CompileError::Other(_))));
    }

    #[test]
    fn refusals_keep_their_hints_and_the_oldest_are_evicted() {
        let compiler = compiler();
        let digest = |number: usize| {
            let mut digest = ComponentDigest::default();
            digest[..8].copy_from_slice(&number.to_le_bytes());
            digest
        };
        for number in 0..=REFUSALS_MAX {
            let _ = compiler.refuse(digest(number), anyhow!("too much").hint("less"));
        }
        compiler.check_refusals(&digest(0)).unwrap();
        let error = compiler.check_refusals(&digest(REFUSALS_MAX)).unwrap_err();
        assert_eq!(error.to_string(), "too much (it was refused before)");
        assert_eq!(hints(&error), ["less"]);
    }
}
