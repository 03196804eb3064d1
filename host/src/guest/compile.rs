//! Compiles components in a separate process, with limits, one at a time.
//!
//! A component is untrusted code, and a compiler is large. It can need minutes and gigabytes for a
//! few kilobytes of input, and it can panic. A separate process can be limited and killed.
//!
//! That process is this program with the command `compile-component`. It reads the component from
//! standard input and writes the machine code to standard output. It exits when its input is
//! closed, which also happens when the host ends. The host kills it when the result is no longer
//! needed.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::{Semaphore, SemaphorePermit};
use wasmtime::CacheStore;

use super::code::{self, write_file};
use super::function_cache::FunctionCache;
use crate::config::CompileSettings;
use crate::model::hint::{WithHint, hints};
use crate::model::units;

/// The command of this program that runs the compiler.
pub const COMMAND: &str = "compile-component";

/// Limit of the elapsed time of a compilation, as a multiple of its processor time. The machine has
/// other work, too.
const WALL_TIME_FACTOR: u32 = 5;

/// Environment of the compiler process. It keeps the address space small and equal on every
/// machine: two compiler threads, one runtime thread, and an allocator that reserves 64 MiB at a
/// time, without huge pages, which the system would clear to use a part of them.
const COMPILER_ENV: [(&str, &str); 4] = [
    ("RAYON_NUM_THREADS", "2"),
    ("TOKIO_WORKER_THREADS", "1"),
    ("MIMALLOC_ARENA_RESERVE", "65536"),
    ("MIMALLOC_ALLOW_THP", "0"),
];

/// Maximum size of the machine code, in bytes.
const CODE_MAX: u64 = 1 << 30;

/// The usual size of machine code, as a multiple of the size of its component.
const CODE_PER_WASM: usize = 4;

/// The size of the pipe for the machine code, in bytes: the most that every user may have on Linux.
const PIPE_SIZE: usize = 1 << 20;

/// Maximum number of bytes read from standard error.
const STDERR_MAX: u64 = 16 << 10;

/// Maximum number of cached refusals.
const REFUSALS_MAX: usize = 1000;

/// First byte of the output: an error text follows, or machine code. Before the machine code are
/// the functions for the next compilation, and before them their length in eight bytes,
/// little-endian.
const COMPILED: u8 = b'+';
const INVALID: u8 = b'-';
const PANICKED: u8 = b'!';

/// SHA-256 of a component.
pub type ComponentDigest = [u8; 32];

/// Starts the compiler processes, one after the other. Cheap to clone.
#[derive(Clone)]
pub(super) struct Compiler {
    settings: Arc<CompileSettings>,
    /// The file with functions for the next compilation.
    functions: Option<PathBuf>,
    permits: Arc<Semaphore>,
    refusals: Arc<Mutex<Refusals>>,
}

impl Compiler {
    /// A compiler that may keep functions in the folder `cache`.
    pub fn new(settings: CompileSettings, cache: &Path) -> Self {
        Compiler {
            functions: settings.keeps_functions.then(|| cache.join("functions")),
            settings: Arc::new(settings),
            permits: Arc::new(Semaphore::new(1)),
            refusals: Arc::default(),
        }
    }

    /// Waits until no other component is being compiled. Waiters are served in the order of their
    /// arrival.
    ///
    /// # Errors
    /// The semaphore is closed, which never happens while the host runs.
    pub async fn acquire(&self) -> Result<SemaphorePermit<'_>> {
        self.permits
            .acquire()
            .await
            .context("wait for the compiler")
    }

    /// Checks the cached refusals.
    ///
    /// # Errors
    /// The component was refused before. The error repeats the message and the hints of that
    /// refusal.
    pub fn check_refusals(&self, digest: &ComponentDigest) -> Result<()> {
        let refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        match refusals.by_digest.get(digest) {
            Some(refusal) => Err(refusal.error()),
            None => Ok(()),
        }
    }

    /// Caches the refusal of a component, so that the next upload fails without compiling it again.
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

    /// Compiles a component. The caller holds the permit of [`Compiler::acquire`]. Dropping the
    /// future kills the process.
    ///
    /// # Errors
    /// - [`CompileError::Refused`] if the component is the cause and would fail again.
    /// - [`CompileError::Other`] for every other failure.
    pub async fn compile(&self, wasm: &Bytes) -> Result<Bytes, CompileError> {
        let limit = self.settings.time.saturating_mul(WALL_TIME_FACTOR);
        match tokio::time::timeout(limit, self.run(wasm)).await {
            Ok(output) => self.parse_output(output?),
            Err(_) => Err(CompileError::Other(
                anyhow!(
                    "compiling the component did not finish within {}",
                    units::format_duration(limit)
                )
                .hint("try again when this machine is less busy, or set a larger `compile_time`"),
            )),
        }
    }

    async fn run(&self, wasm: &Bytes) -> Result<CompilerOutput> {
        // Start the process.
        let settings = &self.settings;
        let mut child = Command::new(&settings.program)
            .arg0("oncely")
            .args([
                COMMAND,
                "--time",
                &settings.time.as_secs().max(1).to_string(),
            ])
            .args(["--memory", &settings.memory.to_string()])
            .args(
                self.functions
                    .iter()
                    .flat_map(|path| [OsStr::new("--functions"), path.as_ref()]),
            )
            // The environment of the host holds passwords.
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

        // Pass the component and read the output.
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
        // Machine code has many times the size of a pipe. A smaller pipe works as well.
        let _ = rustix::pipe::fcntl_setpipe_size(&stdout, PIPE_SIZE);
        let write = async {
            // The process may end before it has read everything. Its status has the reason.
            let _ = stdin.write_all(&(wasm.len() as u64).to_le_bytes()).await;
            let _ = stdin.write_all(wasm).await;
            let _ = stdin.flush().await;
        };
        let ((), output, stderr) = tokio::join!(
            write,
            read_limited(stdout, CODE_MAX, wasm.len() * CODE_PER_WASM),
            read_limited(stderr, STDERR_MAX, 0)
        );

        // Wait for the exit status.
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

    /// Converts the output of the process into machine code or an error.
    fn parse_output(&self, output: CompilerOutput) -> Result<Bytes, CompileError> {
        let CompilerOutput {
            status,
            output,
            stderr,
        } = output;
        let text = |output: &[u8]| {
            String::from_utf8_lossy(output.get(1..).unwrap_or_default()).into_owned()
        };
        let is_success = status.success();
        if is_success && output.first() != Some(&COMPILED) && is_out_of_memory(&text(&output)) {
            return Err(self.out_of_memory());
        }
        match output.first() {
            Some(&COMPILED) if is_success => {
                let (functions, code) = split_output(output.get(1..).unwrap_or_default())
                    .context("the output of the compiler is cut off")?;
                self.keep_functions(functions);
                let start = output.len() - code.len();
                Ok(Bytes::from(output).slice(start..))
            }
            Some(&INVALID) if is_success => Err(CompileError::Refused(
                anyhow!(text(&output))
                    .context("the component cannot be compiled")
                    .hint("build it again with a toolchain that makes components for WASI 0.2"),
            )),
            Some(&PANICKED) if is_success => {
                Err(CompileError::Refused(compiler_crash(&text(&output))))
            }
            _ => Err(self.exit_failure(status, &stderr)),
        }
    }

    /// Keeps functions for the next compilation. An error costs time only.
    fn keep_functions(&self, functions: &[u8]) {
        let Some(path) = &self.functions else { return };
        if !functions.is_empty()
            && let Err(error) = write_file(path, &[functions])
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "compiled functions are not kept for the next compilation"
            );
        }
    }

    fn out_of_memory(&self) -> CompileError {
        let memory = units::format_size(self.settings.memory);
        CompileError::Refused(
            anyhow!("compiling the component takes more than {memory} of memory").hint(
                "build it with optimisation and split large functions, or set a larger \
                 `compile_memory`",
            ),
        )
    }

    /// The reason why the process ended without output.
    fn exit_failure(&self, status: ExitStatus, stderr: &str) -> CompileError {
        let is_signal = |signal: rustix::process::Signal| status.signal() == Some(signal.as_raw());
        if is_signal(rustix::process::Signal::XCPU) {
            let time = units::format_duration(self.settings.time);
            return CompileError::Refused(
                anyhow!("compiling the component takes more than {time} of processor time").hint(
                    "build it with optimisation and split large functions, or set a larger \
                     `compile_time`",
                ),
            );
        }
        if is_out_of_memory(stderr) {
            return self.out_of_memory();
        }
        let first_line = stderr
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();

        // An operator or a machine that is short of memory killed it. Another try may succeed.
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

/// Splits the output after its first byte into functions and machine code.
fn split_output(output: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = output.split_first_chunk()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// Whether a text is an out-of-memory error of the allocator or the operating system.
fn is_out_of_memory(stderr: &str) -> bool {
    [
        "memory allocation of",
        "annot allocate memory",
        "Resource temporarily unavailable",
    ]
    .iter()
    .any(|words| stderr.contains(words))
}

/// The error for a component that crashes the compiler.
fn compiler_crash(detail: &str) -> anyhow::Error {
    anyhow!(detail.trim().to_owned())
        .context("the compiler fails on this component")
        .hint(
            "build it with another release of its toolchain, and report the component as a bug \
             in Oncely",
        )
}

/// The reason why a component was not compiled.
pub(super) enum CompileError {
    /// The component is the cause.
    Refused(anyhow::Error),
    /// Another cause. Another try may succeed.
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

/// Reads up to `most` bytes and discards the rest.
async fn read_limited(
    mut pipe: impl AsyncRead + Unpin,
    most: u64,
    usual: usize,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usual);
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

/// The last refused components.
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

/// The process side: compiles the component on standard input within limits, and writes the result
/// to standard output.
///
/// # Errors
/// The limits cannot be set, or a pipe breaks. An invalid component is a regular result.
pub fn compile_component(time: Duration, memory: u64, functions: Option<&Path>) -> Result<()> {
    set_limits(time, memory)?;
    let wasm = read_component()?;
    exit_when_stdin_closes()?;
    let functions = functions.map(|path| Arc::new(FunctionCache::read(path)));
    let output = match compile_in_process(&wasm, functions.clone()) {
        Ok(Ok(code)) => {
            let functions = functions.and_then(|functions| functions.to_file());
            let functions = functions.unwrap_or_default();
            let length = (functions.len() as u64).to_le_bytes();
            vec![vec![COMPILED], length.to_vec(), functions, code]
        }
        Ok(Err(invalid)) => vec![vec![INVALID], invalid.into_bytes()],
        Err(panicked) => vec![vec![PANICKED], panicked.into_bytes()],
    };
    let mut stdout = std::io::stdout().lock();
    for part in output {
        stdout.write_all(&part).context("write the result")?;
    }
    stdout.flush().context("write the result")
}

fn set_limits(time: Duration, memory: u64) -> Result<()> {
    let limits = [
        (Resource::As, memory),
        (Resource::Cpu, time.as_secs().max(1)),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
    ];
    for (resource, most) in limits {
        // When the soft and the hard limit are equal, the kernel sends SIGKILL instead of SIGXCPU,
        // which hides the reason.
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

    // Message handling has priority. Where lowering the priority is not permitted, the compilation
    // still runs.
    let _ = rustix::process::nice(10);
    Ok(())
}

/// Reads a component. Its length comes first, in eight bytes, little-endian.
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

/// Exits this process when standard input is closed: the host has ended.
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

/// Returns machine code, or the reason why the component is invalid, or the panic of the compiler.
fn compile_in_process(
    wasm: &[u8],
    functions: Option<Arc<FunctionCache>>,
) -> Result<Result<Vec<u8>, String>, String> {
    panic::set_hook(Box::new(|_| {}));
    let functions = functions.map(|functions| functions as Arc<dyn CacheStore>);
    let compiled = panic::catch_unwind(AssertUnwindSafe(|| code::precompile(wasm, functions)));
    match compiled {
        Ok(Ok(code)) => Ok(Ok(code)),
        Ok(Err(error)) => Ok(Err(format!("{error:#}"))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(text
                .unwrap_or("panic")
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
        Compiler::new(CompileSettings::default(), Path::new("."))
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
        assert_eq!(
            parse(b"+\x02\0\0\0\0\0\0\0fncode").ok(),
            Some(Bytes::from_static(b"code"))
        );
        for cut in [&b"+"[..], b"+\x02\0\0", b"+\x02\0\0\0\0\0\0\0f"] {
            assert!(matches!(parse(cut), Err(CompileError::Other(_))));
        }
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
