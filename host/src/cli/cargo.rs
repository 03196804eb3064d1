//! Builds a Rust crate into a component, with a WebAssembly toolchain of this machine.
//!
//! There are three, best first:
//!
//! - `wasm32-wasip2` of rustup builds a component.
//! - `wasm32-unknown-unknown` of rustup builds a core module, which is wrapped here.
//! - With only the source of the standard library, that library is compiled as well, once. Debian
//!   has it in `rustc-web`, `cargo-web` and `rust-web-src`.

use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde_json::Value;

use super::encode::encode_component;
use crate::model::hint::WithHint;

/// Compiles the crate in `crate_dir` to a component and writes it to `out`.
///
/// The crate is a library with `crate-type = ["cdylib"]`. Without `target`, the best installed
/// toolchain builds it. The output of cargo is passed to `progress` line by line. All build
/// products are in `oncely-guests` under the target folder of the crate, apart from native builds.
/// So a second build of an unchanged crate takes hardly longer than a call of cargo.
///
/// # Errors
/// No toolchain for WebAssembly is installed, the crate does not compile or is not a `cdylib`, or
/// its exports do not form a component. The hint lists the other installed toolchains.
pub fn build_component(
    crate_dir: &Path,
    out: &Path,
    target: Option<Target>,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let crate_dir = crate_dir
        .canonicalize()
        .with_context(|| format!("find the crate in {}", crate_dir.display()))?;
    let manifest = crate_dir.join("Cargo.toml");
    if !manifest.is_file() {
        bail!("there is no Cargo.toml in {}", crate_dir.display());
    }
    let toolchain = Toolchain::find(&crate_dir, target)?;
    let component = compile(&toolchain, &manifest, progress)
        .or_else(|error| with_alternatives_hint(error, &toolchain, &crate_dir))?;
    write_if_changed(out, &component)
}

/// The bytes of the component that a toolchain builds from a crate.
fn compile(
    toolchain: &Toolchain,
    manifest: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<u8>> {
    let target_dir = target_dir(toolchain, manifest)?;
    let artifact = run_cargo(toolchain, manifest, &target_dir, progress)?;
    let wasm = std::fs::read(&artifact).with_context(|| format!("read {}", artifact.display()))?;
    match toolchain.target {
        Target::Wasip2 => Ok(wasm),
        Target::Unknown | Target::StdFromSource => {
            encode_component(&wasm).context("is oncely_guest::handler! called?")
        }
    }
}

/// Adds a hint with the other installed toolchains: a failed build may be the fault of the
/// toolchain.
fn with_alternatives_hint<T>(
    error: anyhow::Error,
    failed: &Toolchain,
    crate_dir: &Path,
) -> Result<T> {
    let others: Vec<String> = Target::installed(crate_dir)
        .into_iter()
        .filter(|target| *target != failed.target)
        .map(|target| format!("`{TOOLCHAIN_VARIABLE}={target} oncely build`"))
        .collect();
    let error = Err(error.context(format!("build with the toolchain {}", failed.target)));
    match others.as_slice() {
        [] => error.hint(format!(
            "if the toolchain is at fault, install another: {}",
            failed.target.alternative_install_command()
        )),
        _ => error.hint(format!(
            "if the toolchain is at fault, others are installed: {}",
            others.join(", ")
        )),
    }
}

/// The environment variable that selects a toolchain, for every command that builds crates.
pub const TOOLCHAIN_VARIABLE: &str = "ONCELY_TOOLCHAIN";

/// A cargo and a rustc that can build for a WebAssembly target.
#[derive(Debug)]
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    target: Target,
}

/// A toolchain for WebAssembly, by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// The target wasm32-wasip2, as rustup installs it.
    #[value(name = "wasm32-wasip2")]
    Wasip2,
    /// The target wasm32-unknown-unknown, as rustup installs it.
    #[value(name = "wasm32-unknown-unknown")]
    Unknown,
    /// The target wasm32-unknown-unknown, with a standard library compiled from source.
    #[value(name = "std-from-source")]
    StdFromSource,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Wasip2 => "wasm32-wasip2",
            Target::Unknown => "wasm32-unknown-unknown",
            Target::StdFromSource => "std-from-source",
        })
    }
}

impl Target {
    const BEST_FIRST: [Target; 3] = [Target::Wasip2, Target::Unknown, Target::StdFromSource];

    /// The toolchains that can build the crate on this machine, best first.
    pub fn installed(crate_dir: &Path) -> Vec<Target> {
        Self::BEST_FIRST
            .into_iter()
            .filter(|target| Toolchain::installed(*target, crate_dir).is_some())
            .collect()
    }

    fn triple(self) -> &'static str {
        match self {
            Target::Wasip2 => "wasm32-wasip2",
            Target::Unknown | Target::StdFromSource => "wasm32-unknown-unknown",
        }
    }

    /// The command that installs the toolchain.
    pub fn install_command(self) -> &'static str {
        match self {
            Target::Wasip2 => "rustup target add wasm32-wasip2",
            Target::Unknown => "rustup target add wasm32-unknown-unknown",
            Target::StdFromSource => "apt-get install rustc-web cargo-web rust-web-src lld",
        }
    }

    /// The command that installs another toolchain.
    fn alternative_install_command(self) -> &'static str {
        match self {
            Target::Wasip2 => Target::Unknown.install_command(),
            Target::Unknown | Target::StdFromSource => Target::Wasip2.install_command(),
        }
    }
}

impl Toolchain {
    /// The requested toolchain, or else the best that is installed.
    fn find(crate_dir: &Path, wanted: Option<Target>) -> Result<Self> {
        if let Some(target) = wanted {
            return Self::installed(target, crate_dir)
                .ok_or_else(|| anyhow!("the toolchain {target} is not installed"))
                .hint(target.install_command());
        }
        let found = Target::BEST_FIRST
            .into_iter()
            .find_map(|target| Self::installed(target, crate_dir));
        found
            .ok_or_else(|| anyhow!("no Rust toolchain for WebAssembly is installed"))
            .hint(format!(
                "{}; or without rustup: {}",
                Target::Wasip2.install_command(),
                Target::StdFromSource.install_command()
            ))
    }

    /// The installed toolchain for a target: the cargo on the PATH before the distribution's.
    fn installed(target: Target, crate_dir: &Path) -> Option<Self> {
        let places = [("cargo", "rustc"), ("/usr/bin/cargo", "/usr/bin/rustc")];
        let toolchains = places.map(|(cargo, rustc)| Self {
            cargo: cargo.into(),
            rustc: rustc.into(),
            target,
        });
        toolchains
            .into_iter()
            .find(|toolchain| toolchain.is_installed(crate_dir))
    }

    fn is_installed(&self, crate_dir: &Path) -> bool {
        let triple = self.target.triple();
        match self.target {
            Target::Wasip2 | Target::Unknown => self
                .rustc_output(crate_dir, &["--print", "target-libdir", "--target", triple])
                .is_some_and(|libdir| Path::new(&libdir).is_dir()),
            Target::StdFromSource => self
                .rustc_output(crate_dir, &["--print", "sysroot"])
                .is_some_and(|sysroot| {
                    Path::new(&sysroot)
                        .join("lib/rustlib/src/rust/library/std")
                        .is_dir()
                        && wasm_linker().is_some()
                }),
        }
    }

    /// The output of rustc, run in the folder of the crate so that its `rust-toolchain.toml`
    /// applies.
    fn rustc_output(&self, crate_dir: &Path, args: &[&str]) -> Option<String> {
        let output = clean_command(&self.rustc)
            .args(args)
            .current_dir(crate_dir)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A folder of its own: two compiler versions would invalidate each other's artifacts.
    fn target_subdir(&self, folder: &Path) -> PathBuf {
        match self.target {
            Target::Wasip2 | Target::Unknown => folder.to_owned(),
            Target::StdFromSource => folder.join("std-from-source"),
        }
    }

    /// The cargo command of this toolchain, set up for the target.
    fn cargo(&self) -> Command {
        let mut cargo = clean_command(&self.cargo);
        if self.rustc.is_absolute() {
            cargo.env("RUSTC", &self.rustc);
        }
        if self.target == Target::StdFromSource {
            // Stable compilers build the standard library only with this variable.
            cargo.env("RUSTC_BOOTSTRAP", "1");
            if let Some(linker) = wasm_linker() {
                cargo.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
            }
        }
        cargo
    }
}

/// LLD, the linker for WebAssembly: from the PATH, or the one that rustup installs beside each
/// compiler.
///
/// The compiler of Debian names a linker that Debian does not install with it.
fn wasm_linker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = ["rust-lld", "wasm-ld"]
        .into_iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |folder| folder.join(name)))
        .find(|file| file.is_file());
    on_path.or_else(|| {
        let output = clean_command(Path::new("rustc"))
            .args(["--print", "target-libdir"])
            .output()
            .ok()?;
        let libdir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        Some(libdir.parent()?.join("bin/rust-lld")).filter(|file| file.is_file())
    })
}

/// A command without the variables that an outer `cargo run` or `cargo test` sets for its own
/// crate.
fn clean_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if is_outer_cargo_variable(&name) {
            command.env_remove(name);
        }
    }
    command
}

fn is_outer_cargo_variable(name: &OsString) -> bool {
    let name = name.to_string_lossy();
    let exact = [
        "CARGO",
        "CARGO_MAKEFLAGS",
        "MAKEFLAGS",
        "MFLAGS",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTC_BOOTSTRAP",
    ];
    let prefixes = [
        "CARGO_ENCODED_",
        "CARGO_MANIFEST_",
        "CARGO_PKG_",
        "CARGO_PROFILE_",
        "CARGO_BUILD_",
    ];
    exact.contains(&name.as_ref()) || prefixes.iter().any(|family| name.starts_with(family))
}

/// `oncely-guests` under the target folder that cargo would use for this crate.
fn target_dir(toolchain: &Toolchain, manifest: &Path) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        let dir = std::path::absolute(dir).context("find the folder in CARGO_TARGET_DIR")?;
        return Ok(toolchain.target_subdir(&dir.join("oncely-guests")));
    }
    let output = toolchain
        .cargo()
        .args([
            "metadata",
            "--no-deps",
            "--format-version=1",
            "--manifest-path",
        ])
        .arg(manifest)
        .output()
        .context("run cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo cannot read {}:\n{}",
            manifest.display(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("parse the output of cargo metadata")?;
    let dir = metadata
        .get("target_directory")
        .and_then(Value::as_str)
        .context("find target_directory in cargo metadata")?;
    Ok(toolchain.target_subdir(&Path::new(dir).join("oncely-guests")))
}

/// Builds the crate, and returns the path of its `.wasm`.
fn run_cargo(
    toolchain: &Toolchain,
    manifest: &Path,
    target_dir: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    let mut cargo = toolchain.cargo();
    cargo.args([
        "build",
        "--lib",
        "--release",
        "--message-format=json-render-diagnostics",
        "--color=never",
    ]);
    cargo.args(["--target", toolchain.target.triple()]);
    cargo
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(target_dir);
    // Components are stored in the database and compiled by every host, so small ones are better.
    cargo.args([
        "--config",
        "profile.release.opt-level='s'",
        "--config",
        "profile.release.lto=true",
    ]);
    cargo.args([
        "--config",
        "profile.release.codegen-units=1",
        "--config",
        "profile.release.panic='abort'",
    ]);
    if toolchain.target == Target::StdFromSource {
        cargo.arg("-Zbuild-std=std,panic_abort");
    }
    let mut child = cargo
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", toolchain.cargo.display()))?;
    let stdout = child
        .stdout
        .take()
        .context("take cargo's standard output")?;
    let stderr = child.stderr.take().context("take cargo's standard error")?;

    // Both pipes are read concurrently: cargo would block on a full one.
    let messages = std::thread::spawn(move || read_all(stdout));
    forward_lines(stderr, progress)?;
    let messages = messages
        .join()
        .map_err(|_| anyhow!("the output of cargo was not read"))??;
    let status = child.wait().context("wait for cargo")?;
    if !status.success() {
        bail!(
            "cargo cannot build {}; see its messages above",
            manifest.display()
        );
    }
    find_artifact(&messages, manifest)
}

fn read_all(mut pipe: impl Read) -> Result<String> {
    let mut text = String::new();
    pipe.read_to_string(&mut text)
        .context("read the output of cargo")?;
    Ok(text)
}

/// Passes every line to `progress`.
fn forward_lines(stderr: ChildStderr, progress: &mut dyn FnMut(&str)) -> Result<()> {
    for line in BufReader::new(stderr).lines() {
        let line = line.context("read cargo's messages")?;
        if !line.trim().is_empty() {
            progress(line.trim_end());
        }
    }
    Ok(())
}

/// The `.wasm` of this crate among the artifacts that cargo reports. Those of its dependencies are
/// ignored.
fn find_artifact(messages: &str, manifest: &Path) -> Result<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| text(message, "reason") == Some("compiler-artifact"))
        .filter(|message| {
            text(message, "manifest_path").is_some_and(|path| Path::new(path) == manifest)
        })
        .filter_map(|message| {
            let files = message.get("filenames")?.as_array()?;
            files
                .iter()
                .filter_map(Value::as_str)
                .find(|file| file.ends_with(".wasm"))
                .map(PathBuf::from)
        })
        .next_back()
        .with_context(|| {
            format!(
                "{} builds no WebAssembly\n\
                 hint: add these lines to it:\n[lib]\ncrate-type = [\"cdylib\"]",
                manifest.display()
            )
        })
}

fn text<'v>(value: &'v Value, field: &str) -> Option<&'v str> {
    value.get(field).and_then(Value::as_str)
}

/// Writes `bytes` to `path` in one step. A file with this content already is left unchanged.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let draft = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&draft, bytes).with_context(|| format!("write {}", draft.display()))?;
    std::fs::rename(&draft, path).with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_artifact_ignores_dependencies() {
        let messages = [
            r#"{"reason":"compiler-artifact","manifest_path":"/w/dep/Cargo.toml","filenames":["/t/dep.wasm"]}"#,
            "not json",
            r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","filenames":["/t/a.d","/t/a.wasm"]}"#,
            r#"{"reason":"build-finished","success":true}"#,
        ]
        .join("\n");
        assert_eq!(
            find_artifact(&messages, Path::new("/w/a/Cargo.toml")).unwrap(),
            Path::new("/t/a.wasm")
        );
    }

    #[test]
    fn find_artifact_error_shows_the_missing_crate_type() {
        let error = find_artifact("", Path::new("/w/a/Cargo.toml")).unwrap_err();
        assert!(
            error.to_string().contains("crate-type = [\"cdylib\"]"),
            "{error}"
        );
    }

    #[test]
    fn variables_of_an_outer_cargo_are_removed() {
        for leak in [
            "CARGO",
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_PKG_NAME",
            "CARGO_MANIFEST_DIR",
        ] {
            assert!(is_outer_cargo_variable(&leak.into()), "{leak}");
        }
        for wanted in [
            "CARGO_HOME",
            "CARGO_TARGET_DIR",
            "CARGO_NET_OFFLINE",
            "PATH",
            "RUSTUP_TOOLCHAIN",
        ] {
            assert!(!is_outer_cargo_variable(&wanted.into()), "{wanted}");
        }
    }
}
