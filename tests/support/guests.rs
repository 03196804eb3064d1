//! Test guest components, built once per test process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use oncely::cli::cargo::{Target, build_component};

/// The component of `tests/guests`, which contains every behaviour.
pub fn component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/guests")
}

/// The component of `tests/batch-guest`, which handles batches.
pub fn batch_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/batch-guest")
}

/// The component of `tests/http-guest`, which answers requests.
pub fn http_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/http-guest")
}

/// The component of `tests/messaging-guest`, which is made for wasmCloud.
pub fn messaging_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/messaging-guest")
}

/// The component of `tests/nats-guest`, which is made for wasmCloud's interfaces of NATS.
pub fn nats_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/nats-guest")
}

/// The component of `tests/async-guest`, whose handler is an async function.
pub fn async_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/async-guest")
}

/// The component of `tests/async-http-guest`, which answers requests as WASI 0.3 defines it.
pub fn async_http_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "tests/async-http-guest")
}

/// The component of `examples/ledger/api`.
pub fn ledger_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "examples/ledger/api")
}

/// The component of `examples/ledger/totals`.
pub fn totals_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    build_once(&BUILT, "examples/ledger/totals")
}

/// The component of `tests/python-http`, which targets plain `wasi:http/proxy` without Oncely's
/// SDK.
pub fn python_http_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let built = wasi_http_wit()
            .and_then(|wit| build_python("python-http", &wit, "wasi:http/proxy@0.2.12"));
        built.map_err(|error| format!("{error:#}"))
    });
    built.clone().map_err(anyhow::Error::msg)
}

/// The component of `tests/python-guest`: the behaviours of the conformance suite.
pub fn python_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        build_python("python-guest", &repository().join("wit"), "worker")
            .map_err(|error| format!("{error:#}"))
    });
    built.clone().map_err(anyhow::Error::msg)
}

/// The component of `tests/js-guest`: the behaviours of the conformance suite in JavaScript.
pub fn js_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    let built = BUILT.get_or_init(|| build_js("js-guest").map_err(|error| format!("{error:#}")));
    built.clone().map_err(anyhow::Error::msg)
}

/// The folder with the npm packages that build components of JavaScript.
pub fn npm_packages() -> PathBuf {
    repository().join("target/tools/npm")
}

/// The `PATH` of a shell in which the tools of this repository come first.
pub fn tools_path() -> String {
    let tools = repository().join("target/tools/bin");
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", tools.display())
}

/// Makes the npm packages and the package `oncely` available to the modules of a folder.
pub fn link_npm_packages(folder: &Path, sdk: &Path) -> Result<()> {
    use std::os::unix::fs::symlink;

    let modules = folder.join("node_modules");
    std::fs::create_dir(&modules).context("create node_modules")?;
    let installed = npm_packages().join("node_modules");
    let packages = std::fs::read_dir(installed)
        .context("list the npm packages; `make install-tools` installs them")?;
    for package in packages {
        let package = package.context("list the npm packages")?;
        symlink(package.path(), modules.join(package.file_name())).context("link a package")?;
    }
    symlink(sdk, modules.join("oncely")).context("link the SDK")
}

/// Builds the component of a folder in `tests` with the build script of the SDK.
fn build_js(folder: &str) -> Result<PathBuf> {
    let source = repository().join("tests").join(folder).join("app.js");
    let sdk = repository().join("guest-sdk/js/oncely");
    let out = target_dir()?.join(format!("{folder}.wasm"));
    if is_fresh(&out, &source, &sdk)? {
        return Ok(out);
    }
    let output = Command::new("node")
        .arg(sdk.join("build.js"))
        .arg(&source)
        .arg("-o")
        .arg(&out)
        .env("PATH", tools_path())
        // The script finds the packages from here.
        .current_dir(npm_packages())
        .output()
        .context("run node; `make install-tools` installs it")?;
    anyhow::ensure!(
        output.status.success(),
        "build a component of JavaScript: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(out)
}

/// The component of `tests/c-guest`: the behaviours of the conformance suite.
pub fn c_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        build_c("c-guest", "app.c", "worker").map_err(|error| format!("{error:#}"))
    });
    built.clone().map_err(anyhow::Error::msg)
}

/// The component of `tests/c-guest/batch.c`, which handles batches.
pub fn c_batch_component() -> Result<PathBuf> {
    build_c("c-batch-guest", "batch.c", "batch_worker")
}

/// The component of `tests/go-guest`: the behaviours of the conformance suite.
pub fn go_component() -> Result<PathBuf> {
    static BUILT: Built = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let built = target_dir().and_then(|folder| {
            let out = folder.join("go-guest.wasm");
            build_go(&repository().join("tests/go-guest"), &out).map(|()| out)
        });
        built.map_err(|error| format!("{error:#}"))
    });
    built.clone().map_err(anyhow::Error::msg)
}

/// The compiler of Go.
pub fn go() -> PathBuf {
    let tools = repository().join("target/tools/bin/go");
    if tools.exists() {
        tools
    } else {
        PathBuf::from("go")
    }
}

/// The value of `GOFLAGS` with which the Go module in a folder is built without a download: the
/// runtime of the bindings is in the crate of their generator. `module` is a file to write.
pub fn go_flags(folder: &Path, module: &Path) -> Result<String> {
    let text = std::fs::read_to_string(folder.join("go.mod")).context("read go.mod")?;
    // A new project has a copy of the SDK.
    let copy = folder.join("oncely");
    let sdk = if copy.exists() {
        copy
    } else {
        repository().join("guest-sdk/go/oncely")
    };
    let replaced: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("replace"))
        .collect();
    let text = format!(
        "{}\nreplace oncely => {}\nreplace go.bytecodealliance.org/pkg => {}\n",
        replaced.join("\n"),
        sdk.display(),
        package_folder("wit-bindgen-go")?.join("src/pkg").display()
    );
    std::fs::write(module, text).context("write go.mod")?;
    Ok(format!("-mod=mod -modfile={}", module.display()))
}

/// Builds the Go module in a folder, as a manifest does.
fn build_go(folder: &Path, out: &Path) -> Result<()> {
    let output = Command::new(go())
        .args(["build", "-buildmode=c-shared", "-ldflags=-checklinkname=0"])
        .arg("-o")
        .arg(out)
        .arg(".")
        .current_dir(folder)
        .env("GOOS", "wasip1")
        .env("GOARCH", "wasm")
        .env("GOFLAGS", go_flags(folder, &out.with_extension("mod"))?)
        .env("GOPROXY", "off")
        .output()
        .context("run go; `make install-tools` installs it")?;
    anyhow::ensure!(
        output.status.success(),
        "build a component with go: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Builds a file in `tests/c-guest` with the SDK, by the rules of the example. The host wraps the
/// core module.
fn build_c(name: &str, source: &str, world: &str) -> Result<PathBuf> {
    let out = target_dir()?.join(format!("{name}.wasm"));
    let sdk = repository().join("guest-sdk/c");
    let makefile =
        std::fs::read_to_string(repository().join("examples/c/Makefile")).context("read rules")?;
    let makefile = makefile
        .replace("greet.wasm", &out.to_string_lossy())
        .replace(" Makefile", "")
        .replace("SOURCES = app.c", &format!("SOURCES = {source}"))
        .replace("generated/worker", &format!("generated/{world}"))
        .replace("../../guest-sdk/c", &sdk.to_string_lossy());
    let rules = out.with_extension("mk");
    std::fs::write(&rules, makefile).context("write the rules")?;
    let output = Command::new("make")
        .arg("-f")
        .arg(&rules)
        .arg(match world {
            "batch_worker" => "CPPFLAGS=-DONCELY_BATCH",
            _ => "CPPFLAGS=",
        })
        .arg(&out)
        .current_dir(repository().join("tests/c-guest"))
        .env("PATH", tools_path())
        .output()
        .context("run make")?;
    anyhow::ensure!(
        output.status.success(),
        "build a component with zig; `make install-tools` installs it: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(out)
}

/// Whether a component is newer than its source and the files of its SDK.
fn is_fresh(out: &Path, source: &Path, sdk: &Path) -> Result<bool> {
    let made = |path: &Path| {
        std::fs::metadata(path)
            .and_then(|file| file.modified())
            .ok()
    };
    let mut sources = vec![source.to_owned()];
    for file in std::fs::read_dir(sdk).context("list the SDK")? {
        sources.push(file.context("list the SDK")?.path());
    }
    let newest = sources.iter().filter_map(|path| made(path)).max();
    Ok(made(out).is_some_and(|built| newest.is_some_and(|written| written < built)))
}

/// The program that makes components of Python.
pub fn componentize_py() -> PathBuf {
    let tools = repository().join("target/tools/bin/componentize-py");
    if tools.exists() {
        tools
    } else {
        PathBuf::from("componentize-py")
    }
}

/// Builds the component of a folder in `tests`, with the SDK on its path.
fn build_python(folder: &str, wit: &Path, world: &str) -> Result<PathBuf> {
    let source = repository().join("tests").join(folder);
    let sdk = repository().join("guest-sdk/python");
    let out = target_dir()?.join(format!("{folder}.wasm"));

    // Embedding the interpreter and compiling takes half a minute, so a fresh component is reused.
    if is_fresh(&out, &source.join("app.py"), &sdk.join("oncely"))? {
        return Ok(out);
    }
    let partial = out.with_extension("partial");
    let output = Command::new(componentize_py())
        .arg("-d")
        .arg(wit)
        .args(["-w", world, "componentize", "app", "-p", ".", "-p"])
        .arg(&sdk)
        .arg("-o")
        .arg(&partial)
        .current_dir(&source)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .context("run componentize-py; `make install-tools` installs it")?;
    anyhow::ensure!(
        output.status.success(),
        "build a component with componentize-py: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&partial, &out).context("move the component into place")?;
    Ok(out)
}

/// The folder of the `wasi:http` WIT files that wasmtime ships.
fn wasi_http_wit() -> Result<PathBuf> {
    Ok(package_folder("wasmtime-wasi-http")?.join("wit"))
}

/// The folder of a crate among the dependencies.
fn package_folder(name: &str) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(repository())
        .output()
        .context("run cargo metadata")?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("parse the output of cargo metadata")?;
    let packages = metadata["packages"]
        .as_array()
        .context("read the packages of cargo metadata")?;
    let package = packages.iter().find(|package| package["name"] == name);
    let manifest = package
        .and_then(|package| package["manifest_path"].as_str())
        .with_context(|| format!("find the crate {name}"))?;
    let folder = Path::new(manifest).parent().context("find its folder")?;
    Ok(folder.to_owned())
}

type Built = OnceLock<std::result::Result<PathBuf, String>>;

/// Builds the crate in `folder` of the repository, once per process.
fn build_once(once: &Built, folder: &str) -> Result<PathBuf> {
    let built = once.get_or_init(|| build(folder).map_err(|error| format!("{error:#}")));
    built.clone().map_err(anyhow::Error::msg)
}

fn build(folder: &str) -> Result<PathBuf> {
    let out = target_dir()?.join(format!("{}.wasm", folder.replace('/', "-")));
    build_with(folder, &out, None)?;
    Ok(out)
}

/// Builds the crate in `folder` with `toolchain`, or with the best one installed.
pub fn build_with(folder: &str, out: &Path, toolchain: Option<Target>) -> Result<()> {
    let mut lines = Vec::new();
    build_component(&repository().join(folder), out, toolchain, &mut |line| {
        lines.push(line.to_owned())
    })
    .with_context(|| format!("build the crate in {folder}:\n{}", lines.join("\n")))
}

/// The root folder of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
        .to_owned()
}

/// The folder with the built binaries; test executables are in `deps` below it.
pub fn target_dir() -> Result<PathBuf> {
    let test = std::env::current_exe().context("find the running program")?;
    let mut folder = test
        .parent()
        .context("find the folder of the running program")?;
    if folder.ends_with("deps") {
        folder = folder.parent().context("find the target folder")?;
    }
    Ok(folder.to_owned())
}

/// The `oncely` program under test.
pub fn oncely() -> Result<PathBuf> {
    let path = target_dir()?.join("oncely");
    anyhow::ensure!(
        path.exists(),
        "{} does not exist; run `cargo build` first (`make test` does)",
        path.display()
    );
    Ok(path)
}
