//! Runs the sessions shown in the documents and compares the output; parses every command line.
//!
//! Annotations, invisible to readers, stand in a line above a fenced block:
//! - `<!-- file: NAME -->`: the block is a file.
//! - `<!-- session: NAME -->`: lines with `$` are commands, and the others are their output.
//!
//! A `…` in the output matches any text, and lines may be omitted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use support::guests::{go_flags, link_npm_packages, oncely, repository, target_dir, tools_path};
use support::server::free_port;
use support::world::{PATIENCE, signal};

/// The last line of `oncely dev` at its start.
const READY: &str = "ready; stop with Ctrl-C";

/// Building a worker for the first time may include building a standard library.
const BUILD_PATIENCE: Duration = Duration::from_secs(600);

/// A fenced block with the annotation above it.
struct Block {
    annotation: Option<(String, String)>,
    language: String,
    text: String,
}

/// A command with the lines of its output that a document shows.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    command: String,
    output: Vec<String>,
}

/// The fenced blocks of a document.
fn blocks(markdown: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut annotation = None;
    let mut lines = markdown.lines();
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            let text: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push(Block {
                annotation: annotation.take(),
                language: language.to_owned(),
                text: text.join("\n") + "\n",
            });
        } else {
            let inner = line
                .strip_prefix("<!-- ")
                .and_then(|rest| rest.strip_suffix(" -->"));
            annotation = inner
                .and_then(|inner| inner.split_once(": "))
                .map(|(kind, name)| (kind.into(), name.into()));
        }
    }
    blocks
}

/// The blocks with an annotation of this kind whose name matches.
fn annotated<'b>(
    blocks: &'b [Block],
    kind: &str,
    fits: impl Fn(&str) -> bool,
) -> impl Iterator<Item = (&'b str, &'b Block)> {
    blocks
        .iter()
        .filter_map(move |block| match &block.annotation {
            Some((own, name)) if own == kind && fits(name) => Some((name.as_str(), block)),
            _ => None,
        })
}

/// The commands of a session, in order.
fn session(markdown: &str, name: &str) -> Vec<Shown> {
    let mut shown: Vec<Shown> = Vec::new();
    for (_, block) in annotated(&blocks(markdown), "session", |own| own == name) {
        for line in block.text.lines() {
            match (line.strip_prefix("$ "), shown.last_mut()) {
                (Some(command), _) => shown.push(Shown {
                    command: command.to_owned(),
                    output: Vec::new(),
                }),
                (None, Some(last)) => last.output.push(line.to_owned()),
                (None, None) => {}
            }
        }
    }
    shown
}

/// Whether an output line matches a shown line; `…` matches any text, and the width of white space
/// is ignored.
fn is_shown(shown: &str, line: &str) -> bool {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (shown, line) = (words(shown), words(line));
    let mut parts = shown.split('…').map(str::trim);
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    for part in &parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = rest.split_at(at + part.len()).1;
    }
    rest.is_empty() || parts.last().is_some_and(|last| last.is_empty())
}

/// Whether all shown lines are in the output, in their order.
fn all_shown(shown: &[String], printed: &str) -> bool {
    let mut printed = printed.lines();
    shown
        .iter()
        .all(|shown| printed.any(|line| is_shown(shown, line)))
}

/// A shell session in a folder with the program on its `PATH` and at most one running `oncely dev`.
struct Terminal {
    folder: PathBuf,
    path: String,
    dev: Option<Child>,
    /// The ingress address of hosts, in place of the documented one.
    http: String,
}

/// The ingress address in the documents.
const HTTP_SHOWN: &str = "127.0.0.1:7480";

impl Terminal {
    fn open(folder: &Path, tools: &Path) -> Result<Self> {
        let program = oncely()?;
        let path = std::env::var("PATH").unwrap_or_default();
        let program = program
            .parent()
            .context("find the folder of the program")?
            .display();
        let path = format!("{program}:{path}:{}", sqlite_shell(tools)?.display());
        let http = format!("127.0.0.1:{}", free_port()?);
        Ok(Terminal {
            folder: folder.to_owned(),
            path,
            dev: None,
            http,
        })
    }

    fn shell(&self, command: &str) -> Result<Command> {
        let mut shell = Command::new("bash");
        shell
            .args(["-c", command])
            .current_dir(&self.folder)
            .env("PATH", &self.path)
            // The sessions deploy their changes themselves.
            .env("ONCELY_NO_WATCH", "true")
            .env("NO_COLOR", "1");
        // The workers share a target folder with all other guests.
        let target = target_dir()?;
        shell.env(
            "CARGO_TARGET_DIR",
            target.parent().context("find the target folder")?,
        );
        shell
            .env_remove("ONCELY_HOST")
            .env_remove("ONCELY_TOKEN")
            .env("ONCELY_HTTP", &self.http);
        shell.stdin(Stdio::null());
        Ok(shell)
    }

    /// Runs a command and compares its output with the shown lines.
    fn run(&mut self, shown: &Shown) -> Result<()> {
        let here = |text: &String| text.replace(HTTP_SHOWN, &self.http);
        let shown = &Shown {
            command: here(&shown.command),
            output: shown.output.iter().map(here).collect(),
        };
        let is_refused = shown.output.iter().any(|line| line.starts_with("Error: "));
        if shown.command.starts_with("oncely dev") {
            return self.start_dev(shown);
        }

        // A read-only command may run before its result is there, so it is retried.
        let read_only = [
            "oncely status",
            "oncely dlq list",
            "oncely dlq show",
            "oncely workers",
            "sqlite3",
        ];
        let is_read_only = read_only
            .iter()
            .any(|command| shown.command.starts_with(command));
        let end = Instant::now()
            + if is_read_only {
                PATIENCE
            } else {
                Duration::ZERO
            };
        loop {
            let output = self
                .shell(&shown.command)?
                .output()
                .context("run a shell")?;
            let printed = [output.stdout, output.stderr].concat();
            let printed = String::from_utf8_lossy(&printed);
            if output.status.success() != is_refused && all_shown(&shown.output, &printed) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!(
                    "`{}` is shown with\n{}\nbut printed\n{printed}",
                    shown.command,
                    shown.output.join("\n")
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts `oncely dev` and waits until it is ready.
    fn start_dev(&mut self, shown: &Shown) -> Result<()> {
        let log = self.folder.join("dev.log");
        let file = std::fs::File::create(&log).context("create a log")?;
        let mut shell = self.shell(&format!("exec {}", shown.command))?;
        shell
            .stdout(file.try_clone().context("share the log")?)
            .stderr(file);
        let dev = self.dev.insert(shell.spawn().context("start a shell")?);
        let end = Instant::now() + BUILD_PATIENCE;
        loop {
            let printed = std::fs::read_to_string(&log).context("read the log")?;
            if printed.lines().any(|line| line == READY) {
                ensure!(
                    all_shown(&shown.output, &printed),
                    "`{}` printed\n{printed}",
                    shown.command
                );
                return Ok(());
            }
            let ended = dev.try_wait().context("poll `oncely dev`")?;
            ensure!(
                ended.is_none() && Instant::now() < end,
                "`{}` is not ready:\n{printed}",
                shown.command
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sends Ctrl-C to `oncely dev`.
    fn stop(&mut self) -> Result<()> {
        if let Some(mut dev) = self.dev.take() {
            signal(dev.id(), "INT")?;
            let status = dev.wait().context("wait for `oncely dev`")?;
            ensure!(status.success(), "`oncely dev` exited with {status}");
        }
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// A folder with a `sqlite3` command that uses Python's module, for machines without one.
fn sqlite_shell(tools: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let script = "#!/usr/bin/env python3
import sqlite3, sys
try:
    for row in sqlite3.connect(sys.argv[1], isolation_level=None).execute(sys.argv[2]):
        print(*row, sep='|')
except sqlite3.Error as error:
    sys.exit(f'Error: {error}')
";
    let path = tools.join("sqlite3");
    std::fs::write(&path, script).context("write the sqlite3 script")?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
        .context("make the script executable")?;
    Ok(tools.to_owned())
}

fn read(name: &str) -> Result<String> {
    std::fs::read_to_string(repository().join(name)).with_context(|| format!("read {name}"))
}

/// Runs a session of a document in `folder`.
fn run_session(document: &str, name: &str, folder: &Path, tools: &Path) -> Result<()> {
    let commands = session(&read(document)?, name);
    ensure!(commands.len() > 2, "{document} has no session `{name}`");
    let mut terminal = Terminal::open(folder, tools)?;
    for command in &commands {
        terminal
            .run(command)
            .with_context(|| format!("session {name}"))?;
    }
    terminal.stop()
}

/// Creates the first worker beside a clone, as its guide does, and returns its folder.
fn orders_worker(beside: &Path) -> Result<PathBuf> {
    std::os::unix::fs::symlink(repository(), beside.join("oncely"))?;
    let document = blocks(&read("docs/first-worker.md")?);
    let files: Vec<_> = annotated(&document, "file", |_| true).collect();
    let readme = blocks(&read("README.md")?);
    for (name, shown) in annotated(&readme, "file", |_| true) {
        let is_same = files
            .iter()
            .any(|(own, block)| *own == name && block.text == shown.text);
        ensure!(
            is_same,
            "README.md and docs/first-worker.md differ in {name}"
        );
    }
    for (name, block) in files {
        let path = beside.join(name);
        std::fs::create_dir_all(path.parent().context("find the parent folder")?)?;
        std::fs::write(path, &block.text)?;
    }

    // Use the same dependency versions as all other tests.
    std::fs::copy(
        repository().join("Cargo.lock"),
        beside.join("orders/Cargo.lock"),
    )?;
    Ok(beside.join("orders"))
}

#[test]
fn the_readme_payments_session_runs_as_shown() -> Result<()> {
    let clone = tempfile::tempdir()?;
    std::os::unix::fs::symlink(repository().join("examples"), clone.path().join("examples"))?;
    let tools = tempfile::tempdir()?;
    run_session("README.md", "payments", clone.path(), tools.path())
}

#[test]
fn the_ledger_guide_runs_as_shown() -> Result<()> {
    let clone = tempfile::tempdir()?;
    std::os::unix::fs::symlink(repository().join("examples"), clone.path().join("examples"))?;
    let tools = tempfile::tempdir()?;
    run_session("docs/ledger.md", "ledger", clone.path(), tools.path())
}

#[test]
fn the_first_worker_guide_runs_as_shown() -> Result<()> {
    let beside = tempfile::tempdir()?;
    let tools = tempfile::tempdir()?;
    run_session(
        "docs/first-worker.md",
        "orders",
        &orders_worker(beside.path())?,
        tools.path(),
    )
}

/// The handler and the tests of the guide to Python run together.
#[test]
fn the_python_guide_runs_as_shown() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let guide = std::fs::read_to_string(repository().join("docs/python.md"))?;
    let mut files = 0;
    for block in blocks(&guide) {
        let Some((kind, name)) = &block.annotation else {
            continue;
        };
        ensure!(kind == "file", "unexpected annotation {kind}");
        std::fs::write(folder.path().join(name), &block.text)?;
        files += 1;
    }
    ensure!(files == 2, "found {files} files");
    let migrations = folder.path().join("migrations");
    std::fs::create_dir(&migrations)?;
    std::fs::write(
        migrations.join("1.sql"),
        "create table orders (id text primary key, total text not null)",
    )?;
    let tested = Command::new("python3")
        .args(["-m", "unittest"])
        .current_dir(folder.path())
        .env("PYTHONPATH", repository().join("guest-sdk/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .context("run python3")?;
    let said = String::from_utf8_lossy(&tested.stderr);
    ensure!(
        tested.status.success() && said.contains("Ran 2 tests"),
        "{said}"
    );
    Ok(())
}

/// The handler and the tests of the guide to JavaScript fit their types, run together, and build.
#[test]
fn the_javascript_guide_runs_as_shown() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut files = 0;
    let guide = read("docs/javascript.md")?;
    for (name, block) in annotated(&blocks(&guide), "file", |_| true) {
        std::fs::write(folder.path().join(name), &block.text)?;
        files += 1;
    }
    ensure!(files == 2, "found {files} files");
    let migrations = folder.path().join("migrations");
    std::fs::create_dir(&migrations)?;
    std::fs::write(
        migrations.join("1.sql"),
        "create table orders (id text primary key, total text not null)",
    )?;
    let example = repository().join("examples/typescript");
    for name in ["package.json", "tsconfig.json"] {
        std::fs::copy(example.join(name), folder.path().join(name))?;
    }
    npm_test(folder.path())?;

    let built = Command::new("node")
        .arg(repository().join("guest-sdk/js/oncely/build.js"))
        .args(["app.ts", "-o", "orders.wasm"])
        .env("PATH", tools_path())
        .current_dir(folder.path())
        .output()
        .context("run node")?;
    ensure!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    Ok(())
}

/// Makes a project below `root`, with the two files of the guide to its language.
fn project_of_guide(root: &Path, language: &str) -> Result<PathBuf> {
    let made = Command::new(oncely()?)
        .args(["new", "orders", "--lang", language])
        .current_dir(root)
        .output()
        .context("run oncely new")?;
    ensure!(made.status.success(), "{made:?}");
    let folder = root.join("orders");
    let guide = blocks(&read(&format!("docs/{language}.md"))?);
    let files: Vec<_> = annotated(&guide, "file", |_| true).collect();
    ensure!(files.len() == 2, "found {} files", files.len());
    for (name, block) in files {
        std::fs::write(folder.join(name), &block.text)?;
    }
    Ok(folder)
}

/// Runs commands in a project with the tools of this repository. `$ONCELY` is the program.
fn run_in_project(folder: &Path, commands: &[&str], go_flags: &str) -> Result<()> {
    for command in commands {
        let output = Command::new("sh")
            .args(["-c", command])
            .current_dir(folder)
            .env("PATH", tools_path())
            .env("GOFLAGS", go_flags)
            .env("ONCELY", oncely()?)
            .output()
            .context("run a shell")?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success(), "`{command}`: {said}");
    }
    Ok(())
}

/// The handler and the tests of the guide to C run together, and the handler is built for the host.
#[test]
fn the_c_guide_runs_as_shown() -> Result<()> {
    let root = tempfile::tempdir()?;
    let folder = project_of_guide(root.path(), "c")?;
    std::fs::write(
        folder.join("migrations/0001_orders.sql"),
        "create table orders (id text primary key, total text not null)",
    )?;
    run_in_project(&folder, &["make test", "\"$ONCELY\" build"], "")
}

/// The handler and the tests of the guide to Go run together, and the handler is built for a host.
#[test]
fn the_go_guide_runs_as_shown() -> Result<()> {
    let root = tempfile::tempdir()?;
    let folder = project_of_guide(root.path(), "go")?;
    let flags = go_flags(&folder, &root.path().join("go.mod"))?;
    run_in_project(&folder, &["go test", "\"$ONCELY\" build"], &flags)
}

#[test]
fn the_typescript_example_passes_its_tests() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["app.ts", "app.test.ts", "package.json", "tsconfig.json"] {
        let file = repository().join("examples/typescript").join(name);
        std::fs::copy(file, folder.path().join(name))?;
    }
    npm_test(folder.path())
}

/// Checks the types of a project in TypeScript, and runs its two tests.
fn npm_test(folder: &Path) -> Result<()> {
    link_npm_packages(folder, &repository().join("guest-sdk/js/oncely"))?;
    let tested = Command::new("npm")
        .arg("test")
        .env("PATH", tools_path())
        .current_dir(folder)
        .output()
        .context("run npm")?;
    let said = String::from_utf8_lossy(&tested.stdout);
    ensure!(
        tested.status.success() && said.contains("pass 2"),
        "{said}{}",
        String::from_utf8_lossy(&tested.stderr)
    );
    Ok(())
}

#[test]
fn the_c_example_passes_its_tests() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["Makefile", "app.c", "test_app.c"] {
        std::fs::copy(
            repository().join("examples/c").join(name),
            folder.path().join(name),
        )?;
    }
    let output = Command::new("make")
        .arg(format!(
            "SDK={}",
            repository().join("guest-sdk/c").display()
        ))
        .arg("test")
        .current_dir(folder.path())
        .output()
        .context("run make")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    Ok(())
}

/// The package of C has no undefined behaviour that its tests can reach.
#[test]
fn the_c_package_passes_its_tests_with_sanitizers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let script = "cc -g -Wall -Wextra -Wpedantic -Werror -fsanitize=address,undefined \
        -I$SDK -o $OUT test_sdk.c $SDK/oncely/*.c -ldl && $OUT";
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(repository().join("tests/c-guest"))
        .env("SDK", repository().join("guest-sdk/c"))
        .env("OUT", folder.path().join("test_sdk"))
        .output()
        .context("run a shell")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    Ok(())
}

/// Waits until the host of a folder has no unpublished outputs.
fn until_outputs_are_published(folder: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let listed = Command::new(oncely()?)
            .args(["outbox", "list", "--unpublished", "--json"])
            .current_dir(folder)
            .output()?;
        let listed = String::from_utf8(listed.stdout)?;
        if listed.trim() == "[]" {
            return Ok(());
        }
        ensure!(Instant::now() < end, "outputs stay unpublished: {listed}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_on_call_session_runs_as_shown() -> Result<()> {
    let beside = tempfile::tempdir()?;
    let folder = orders_worker(beside.path())?;
    let manifest = folder.join("oncely.toml");
    let quick = "\n[worker.retry]\nattempts = 2\nbackoff = \"10ms\"\nbackoff_max = \"10ms\"\n";
    std::fs::write(&manifest, std::fs::read_to_string(&manifest)? + quick)?;
    let tools = tempfile::tempdir()?;

    // Two failing orders and a good one
    let mut terminal = Terminal::open(&folder, tools.path())?;
    let run = |terminal: &mut Terminal, command: &str| {
        terminal.run(&Shown {
            command: command.to_owned(),
            output: Vec::new(),
        })
    };
    run(&mut terminal, "oncely dev")?;

    // The first order is published before the change of the format, the others after it.
    let trace = "--header 'traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'";
    run(
        &mut terminal,
        r#"oncely publish orders.placed --id o-1 '{"id":"o-1","cents":1250}'"#,
    )?;
    run(
        &mut terminal,
        &format!(
            r#"oncely publish orders.placed --id o-2 '{{"order":"o-2","cents":1250}}' {trace}"#
        ),
    )?;
    run(
        &mut terminal,
        r#"oncely publish orders.placed --id o-3 '{"order":"o-3","cents":1250}'"#,
    )?;

    // The session
    let commands = session(&read("docs/dead-letters.md")?, "on-call");
    ensure!(
        commands.len() > 8,
        "docs/dead-letters.md has no session `on-call`"
    );
    for command in &commands {
        // Apply the edit that the text describes.
        let edit = match command.command.as_str() {
            "oncely deploy" => Some((
                "    id: String",
                "    #[serde(alias = \"order\")]\n    id: String",
            )),
            "oncely build" => Some((
                "    sql::execute",
                "    if order.cents == 0 { return Ok(()); }\n    sql::execute",
            )),
            _ => None,
        };
        if let Some((from, to)) = edit {
            let source = folder.join("src/lib.rs");
            let text = std::fs::read_to_string(&source)?;
            std::fs::write(&source, text.replacen(from, to, 1))?;
        }
        // A redrive has succeeded with its commit. Its outputs are published a moment later.
        if command.command.starts_with("oncely dlq verify") {
            until_outputs_are_published(&folder)?;
        }
        terminal.run(command)?;
    }
    terminal.stop()
}

/// All documents for users.
fn documents() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let folders = [
        "",
        "docs",
        "examples/payments",
        "examples/python",
        "examples/typescript",
        "examples/c",
    ];
    for folder in folders {
        for entry in std::fs::read_dir(repository().join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

#[test]
fn every_documented_command_line_parses() -> Result<()> {
    let program = oncely()?;
    let mut checked = 0;
    for path in documents()? {
        let text = std::fs::read_to_string(&path)?;
        for block in blocks(&text)
            .iter()
            .filter(|block| ["sh", "console"].contains(&block.language.as_str()))
        {
            for line in block
                .text
                .lines()
                .map(|line| line.strip_prefix("$ ").unwrap_or(line))
            {
                // Variable assignments may precede the command.
                let is_ours =
                    line.split_whitespace().find(|word| !word.contains('=')) == Some("oncely");
                if !is_ours {
                    continue;
                }
                let script = format!(
                    "oncely() {{ '{}' \"$@\" --help >/dev/null; }}; {line}",
                    program.display()
                );
                let output = Command::new("bash")
                    .args(["-c", &script])
                    .output()
                    .context("run a shell")?;
                let said = String::from_utf8_lossy(&output.stderr);
                ensure!(
                    output.status.success(),
                    "{}: `{line}`: {said}",
                    path.display()
                );
                checked += 1;
            }
        }
    }
    ensure!(checked > 20, "found only {checked} command lines");
    Ok(())
}

#[test]
fn shown_output_is_compared_word_by_word() {
    assert!(is_shown("a  b", " a b"));
    assert!(is_shown(
        "nats: nats://127.0.0.1:…",
        "   nats: nats://127.0.0.1:4222"
    ));
    assert!(is_shown("x … z", "x y y z"));
    assert!(!is_shown("x … z", "x y z more"));
    assert!(!is_shown("a", "a b"));
    let shown = [String::from("a"), String::from("c")];
    assert!(all_shown(&shown, "a\nb\nc") && !all_shown(&shown, "c\na"));
}

/// The folders to which paths in ARCHITECTURE.md and docs/internals are relative.
const ROOTS: [&str; 4] = ["host/src", "tests/it", "tests", ""];

/// The headings, paragraphs, list items and table rows of a document, each on one line.
fn items(markdown: &str) -> Vec<String> {
    let mut items: Vec<String> = Vec::new();
    let mut is_fenced = false;
    let mut can_continue = false;
    for line in markdown.lines().map(str::trim) {
        let is_fence = line.starts_with("```");
        is_fenced ^= is_fence;
        if is_fence || is_fenced || line.is_empty() {
            can_continue = false;
            continue;
        }

        let is_numbered = line
            .split_once(". ")
            .is_some_and(|(number, _)| number.chars().all(|c| c.is_ascii_digit()));
        let begins = is_numbered || ["- ", "|", "#"].iter().any(|sign| line.starts_with(*sign));
        match items.last_mut() {
            Some(item) if can_continue && !begins => {
                item.push(' ');
                item.push_str(line);
            }
            _ => items.push(line.to_owned()),
        }
        can_continue = true;
    }
    items
}

/// Whether code in a document is the path of a source file, or of a folder.
fn is_path(code: &str) -> bool {
    let endings = [".rs", ".lua", ".sql", ".wit", "/"];
    !code.contains(' ') && endings.iter().any(|ending| code.ends_with(*ending))
}

/// Whether code in a document can be the name of a function, a type or a constant.
fn is_name(code: &str) -> bool {
    code.starts_with(|c: char| c.is_alphabetic() || c == '_')
        && code
            .chars()
            .all(|c| c.is_alphanumeric() || c == '_' || c == ':')
}

/// The text of all files with this path; empty for a folder, `None` if nothing has this path.
fn named_text(path: &str) -> Result<Option<String>> {
    let mut text: Option<String> = None;
    for root in ROOTS {
        let file = repository().join(root).join(path);
        if file.is_dir() {
            text.get_or_insert_default();
        } else if file.is_file() {
            let own = std::fs::read_to_string(&file)
                .with_context(|| format!("read {}", file.display()))?;
            text.get_or_insert_default().push_str(&own);
        }
    }
    Ok(text)
}

/// Checks the code of an item. Each path must exist. Each name after a path must occur in a file of
/// the item. Returns the number of paths and names, and the errors.
fn check_item(item: &str) -> Result<(usize, Vec<String>)> {
    let code: Vec<&str> = item.split('`').skip(1).step_by(2).collect();
    let mut errors = Vec::new();
    let mut text = String::new();
    let paths: Vec<&str> = code.iter().copied().filter(|code| is_path(code)).collect();
    for path in &paths {
        match named_text(path)? {
            Some(own) => {
                text.push('\n');
                text.push_str(&own);
            }
            None => errors.push(format!("`{path}` does not exist")),
        }
    }

    let words: HashSet<&str> = text
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .collect();
    let after_path = code.iter().copied().skip_while(|code| !is_path(code));
    let names: Vec<&str> = after_path
        .filter(|code| !is_path(code) && is_name(code))
        .collect();
    for name in &names {
        if !name.split("::").all(|part| words.contains(part)) {
            errors.push(format!("`{name}` is not in {}", paths.join(", ")));
        }
    }

    let is_abbreviated = |code: &&&str| code.contains(['…', '*']);
    for abbreviated in code.iter().filter(is_abbreviated) {
        errors.push(format!("`{abbreviated}` is abbreviated"));
    }
    Ok((paths.len() + names.len(), errors))
}

#[test]
fn architecture_names_only_files_and_functions_that_exist() -> Result<()> {
    let mut documents = vec![repository().join("ARCHITECTURE.md")];
    for entry in std::fs::read_dir(repository().join("docs/internals"))? {
        documents.push(entry?.path());
    }

    let mut checked = 0;
    let mut wrong = Vec::new();
    for document in documents {
        let text = std::fs::read_to_string(&document)?;
        for item in items(&text) {
            let (names, errors) = check_item(&item)?;
            checked += names;
            let name = document.display();
            wrong.extend(errors.iter().map(|error| format!("{name}: {error}")));
        }
    }
    ensure!(
        wrong.is_empty(),
        "names that do not exist:\n{}",
        wrong.join("\n")
    );
    ensure!(checked > 500, "checked only {checked} names");
    Ok(())
}

#[test]
fn items_of_a_document_are_joined_to_one_line() {
    let text = "# a\n\nb\nc\n- d\n  e\n2. f\n| g |\n```\nh\n```\ni";
    assert_eq!(items(text), ["# a", "b c", "- d e", "2. f", "| g |", "i"]);
}
