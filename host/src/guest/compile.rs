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
const PATIENCE: u32 = 5;

/// Variables of the process that keep its part of the address space small and the same on every machine: two threads
/// that compile, one for all else, and an allocator that reserves 64 MiB at a time.
const SMALL: [(&str, &str); 3] =
    [("RAYON_NUM_THREADS", "2"), ("TOKIO_WORKER_THREADS", "1"), ("MIMALLOC_ARENA_RESERVE", "65536")];

/// How many bytes of machine code are read from the process at most.
const CODE_MAX: u64 = 1 << 30;

/// How many bytes of complaints are read from it.
const COMPLAINTS_MAX: u64 = 16 << 10;

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
    turn: Arc<Semaphore>,
    refusals: Arc<Mutex<Refusals>>,
}

impl Compiler {
    pub fn new(settings: CompileSettings) -> Self {
        Compiler { settings: Arc::new(settings), turn: Arc::new(Semaphore::new(1)), refusals: Arc::default() }
    }

    /// Waits until no other component is compiled. Whoever waits was first is next.
    pub async fn turn(&self) -> Result<SemaphorePermit<'_>> {
        self.turn.acquire().await.context("wait for the compiler")
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
        tracing::warn!(digest = hex::encode(digest), error = format!("{error:#}"), "component refused");
        let refusal = Refusal { sentence: format!("{error:#}"), hints: hints(&error).join("; ") };
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner).remember(digest, refusal);
        error
    }

    /// Compiles a component; the caller has the turn. When the future is dropped the process is killed.
    ///
    /// # Errors
    /// [`Failed::Refused`] if the component is to blame; it would fail again.
    pub async fn compile(&self, wasm: &Bytes) -> Result<Vec<u8>, Failed> {
        let limit = self.settings.time.saturating_mul(PATIENCE);
        match tokio::time::timeout(limit, self.run(wasm)).await {
            Ok(answer) => self.judge(answer?),
            Err(_) => Err(Failed::Other(
                anyhow!("compiling the component was not done after {}", units::show_duration(limit))
                    .hint("try again when this machine has less to do, or give the host a larger `compile_time`"),
            )),
        }
    }

    async fn run(&self, wasm: &Bytes) -> Result<Answer> {
        let settings = &self.settings;
        let mut child = Command::new(&settings.program)
            .arg0("oncely")
            .args([COMMAND, "--time", &settings.time.as_secs().max(1).to_string()])
            .args(["--memory", &settings.memory.to_string()])
            // Passwords of the host are none of its business.
            .env_clear()
            .envs(SMALL)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {} to compile a component", settings.program.display()))?;
        let mut stdin = child.stdin.take().context("write to the compiling process")?;
        let stdout = child.stdout.take().context("read from the compiling process")?;
        let stderr = child.stderr.take().context("read from the compiling process")?;
        let give = async {
            // Its end may come before it has read everything; its status says why.
            let _ = stdin.write_all(&(wasm.len() as u64).to_le_bytes()).await;
            let _ = stdin.write_all(wasm).await;
            let _ = stdin.flush().await;
        };
        let ((), output, complaints) = tokio::join!(give, read(stdout, CODE_MAX), read(stderr, COMPLAINTS_MAX));
        let status = child.wait().await.context("wait for the compiling process")?;
        drop(stdin);
        let complaints = String::from_utf8_lossy(&complaints?).into_owned();
        Ok(Answer { status, output: output?, complaints })
    }

    /// What an answer means.
    fn judge(&self, answer: Answer) -> Result<Vec<u8>, Failed> {
        let Answer { status, mut output, complaints } = answer;
        let text = |output: &[u8]| String::from_utf8_lossy(output.get(1..).unwrap_or_default()).into_owned();
        let is_done = status.success();
        if is_done && output.first() != Some(&COMPILED) && is_short_of_memory(&text(&output)) {
            return Err(self.out_of_memory());
        }
        match output.first() {
            Some(&COMPILED) if is_done => {
                output.remove(0);
                Ok(output)
            }
            Some(&INVALID) if is_done => Err(Failed::Refused(
                anyhow!(text(&output))
                    .context("the component cannot be compiled")
                    .hint("build it again, with a release of its tool that makes components for WASI 0.2"),
            )),
            Some(&PANICKED) if is_done => Err(Failed::Refused(compiler_fault(&text(&output)))),
            _ => Err(self.ended(status, &complaints)),
        }
    }

    fn out_of_memory(&self) -> Failed {
        let memory = units::show_size(self.settings.memory);
        Failed::Refused(
            anyhow!("compiling the component takes more than {memory} of memory").hint(
                "build it with optimisation and split large functions, or give the host a larger `compile_memory`",
            ),
        )
    }

    /// Why the process ended without an answer.
    fn ended(&self, status: ExitStatus, complaints: &str) -> Failed {
        let is_signal = |signal: rustix::process::Signal| status.signal() == Some(signal.as_raw());
        if is_signal(rustix::process::Signal::XCPU) {
            let time = units::show_duration(self.settings.time);
            return Failed::Refused(anyhow!("compiling the component takes more than {time} of processor time").hint(
                "build it with optimisation and split large functions, or give the host a larger `compile_time`",
            ));
        }
        if is_short_of_memory(complaints) {
            return self.out_of_memory();
        }
        let complaint = complaints.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        // Killed by hand or by a machine that is short of memory: another time it may go well.
        if is_signal(rustix::process::Signal::KILL) || is_signal(rustix::process::Signal::TERM) {
            return Failed::Other(anyhow!("the process that compiled the component was killed ({status})"));
        }
        match status.signal() {
            Some(_) => Failed::Refused(compiler_fault(&format!("{status} {complaint}"))),
            None => Failed::Other(anyhow!("the process that compiles components failed ({status}): {complaint}")),
        }
    }
}

/// Whether a complaint of the process is that it got no more memory.
fn is_short_of_memory(complaint: &str) -> bool {
    ["memory allocation of", "annot allocate memory", "Resource temporarily unavailable"]
        .iter()
        .any(|words| complaint.contains(words))
}

/// The component meets a fault of the compiler.
fn compiler_fault(detail: &str) -> anyhow::Error {
    anyhow!(detail.trim().to_owned())
        .context("the compiler fails on this component")
        .hint("build it with another release of its tool, and report the component as a fault of Oncely")
}

/// Why a component was not compiled.
pub(super) enum Failed {
    /// The component is to blame.
    Refused(anyhow::Error),
    /// Something else; it may go well another time.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Failed::Other(error)
    }
}

struct Answer {
    status: ExitStatus,
    output: Vec<u8>,
    complaints: String,
}

/// Reads up to `most` bytes, and the rest without keeping it.
async fn read(mut pipe: impl AsyncRead + Unpin, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    (&mut pipe).take(most).read_to_end(&mut bytes).await.context("read from the compiling process")?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await.context("read from the compiling process")?;
    Ok(bytes)
}

/// Components that were refused, the last of them.
#[derive(Default)]
struct Refusals {
    by_digest: HashMap<ComponentDigest, Refusal>,
    oldest_first: VecDeque<ComponentDigest>,
}

struct Refusal {
    sentence: String,
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
        let error = anyhow!("{} (it was refused before)", self.sentence);
        if self.hints.is_empty() { error } else { error.hint(self.hints.clone()) }
    }
}

/// The other side: compiles the component on standard input within limits, and answers on standard output.
///
/// # Errors
/// When the limits cannot be set or the pipes break. That a component is not valid is an answer, not an error.
pub fn compile_component(time: Duration, memory: u64) -> Result<()> {
    limit(time, memory)?;
    let wasm = component_from_stdin()?;
    end_with_stdin()?;
    let (first, rest) = match compile_here(&wasm) {
        Ok(Ok(code)) => (COMPILED, code),
        Ok(Err(invalid)) => (INVALID, invalid.into_bytes()),
        Err(panicked) => (PANICKED, panicked.into_bytes()),
    };
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&[first]).and_then(|()| stdout.write_all(&rest)).context("write the answer")?;
    stdout.flush().context("write the answer")
}

fn limit(time: Duration, memory: u64) -> Result<()> {
    let limits =
        [(Resource::As, memory), (Resource::Cpu, time.as_secs().max(1)), (Resource::Core, 0), (Resource::Fsize, 0)];
    for (resource, most) in limits {
        // At both limits of its time at once, a process is killed with the signal of the upper one, which says nothing.
        let maximum = if resource == Resource::Cpu { most.saturating_add(1) } else { most };
        let limit = Rlimit { current: Some(most), maximum: Some(maximum) };
        setrlimit(resource, limit).with_context(|| format!("limit {resource:?} to {most}"))?;
    }
    // Messages come first. Where that is not allowed it is compiled all the same.
    let _ = rustix::process::nice(10);
    Ok(())
}

/// A component behind its length in eight bytes, little-endian.
fn component_from_stdin() -> Result<Vec<u8>> {
    let mut stdin = std::io::stdin().lock();
    let mut length = [0; 8];
    stdin.read_exact(&mut length).context("read the length of the component")?;
    let length = u64::from_le_bytes(length);
    let mut wasm = Vec::new();
    stdin.take(length).read_to_end(&mut wasm).context("read the component")?;
    if wasm.len() as u64 != length {
        bail!("the component ends after {} of {length} bytes", wasm.len());
    }
    Ok(wasm)
}

/// Ends this process when standard input is closed: the host has ended.
fn end_with_stdin() -> Result<()> {
    let wait = || {
        let _ = std::io::stdin().lock().read(&mut [0]);
        std::process::exit(1);
    };
    std::thread::Builder::new().name("host".to_owned()).spawn(wait).context("watch the host")?;
    Ok(())
}

/// Machine code; or why the component is not valid; or the panic of the compiler.
fn compile_here(wasm: &[u8]) -> Result<Result<Vec<u8>, String>, String> {
    panic::set_hook(Box::new(|_| {}));
    let compiled = panic::catch_unwind(AssertUnwindSafe(|| engine::precompile(wasm)));
    match compiled {
        Ok(Ok(code)) => Ok(Ok(code)),
        Ok(Err(error)) => Ok(Err(format!("{error:#}"))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(text.unwrap_or("a panic").lines().next().unwrap_or_default().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler() -> Compiler {
        Compiler::new(CompileSettings::default())
    }

    fn ended(raw_status: i32, complaints: &str) -> (bool, String) {
        match compiler().ended(ExitStatus::from_raw(raw_status), complaints) {
            Failed::Refused(error) => (true, format!("{error:#}")),
            Failed::Other(error) => (false, format!("{error:#}")),
        }
    }

    #[test]
    fn a_component_is_to_blame_for_its_time_its_memory_and_a_crash_of_the_compiler_alone() {
        let (cpu, abort, killed, exit_1) = (24, 6, 9, 1 << 8);
        assert_eq!(ended(cpu, ""), (true, "compiling the component takes more than 2m of processor time".to_owned()));
        let (refused, said) = ended(abort, "memory allocation of 123 bytes failed\n");
        assert!(refused && said.starts_with("compiling the component takes more than 2"), "{said}");
        let (refused, said) = ended(abort, "\nthread 'main' has overflowed its stack\n");
        assert!(refused && said.starts_with("the compiler fails on this component: "), "{said}");
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
    fn an_answer_is_code_or_a_refusal() {
        let judge = |output: &[u8]| {
            let status = ExitStatus::from_raw(0);
            compiler().judge(Answer { status, output: output.to_vec(), complaints: String::new() })
        };
        assert_eq!(judge(b"+code").ok(), Some(b"code".to_vec()));
        let Err(Failed::Refused(error)) = judge(b"-type mismatch") else { panic!("not refused") };
        assert_eq!(format!("{error:#}"), "the component cannot be compiled: type mismatch");
        let Err(Failed::Refused(error)) = judge(b"!multiple memories") else { panic!("not refused") };
        assert_eq!(format!("{error:#}"), "the compiler fails on this component: multiple memories");
        assert!(matches!(judge(b""), Err(Failed::Other(_))));
    }

    #[test]
    fn refusals_are_remembered_with_their_hints_and_the_oldest_forgotten() {
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
