//! Components that are expensive to compile: refused, limited and cancelled.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::database::Kind;
use support::eventually::eventually;
use support::guests;
use support::nats::NewMessage;
use support::world::{World, manifest, manifest_of};
use wasm_encoder::{
    Alias, ComponentAliasSection, ComponentExportKind, ComponentInstanceSection, ComponentSection,
    RawSection,
};

/// Section kinds of a component: a core module, and a nested component.
const CORE_MODULE: u8 = 1;
const COMPONENT: u8 = 4;

/// A component with more sections appended.
fn with_sections(component: &[u8], sections: &[&dyn ComponentSection]) -> Vec<u8> {
    let mut bytes = component.to_vec();
    for section in sections {
        section.append_to_component(&mut bytes);
    }
    bytes
}

/// A core module within the limits whose functions take seconds each to compile.
fn slow_module(functions: usize) -> Result<Vec<u8>> {
    let round =
        "(loop (local.set 1 (i64.add (local.get 1) (local.get 2))) (br_if 0 (local.get 0)))"
            .repeat(4_000);
    let function = format!("(func (param i32) (local i64 i64) {round})");
    Ok(wat::parse_str(format!(
        "(module {})",
        function.repeat(functions)
    ))?)
}

/// The test component plus such a module, which is compiled but never used.
fn slow_component(functions: usize) -> Result<Vec<u8>> {
    let module = slow_module(functions)?;
    Ok(with_sections(
        &std::fs::read(guests::component()?)?,
        &[&RawSection {
            id: CORE_MODULE,
            data: &module,
        }],
    ))
}

/// The test component plus a module whose functions take more than 1 GiB each to compile, even
/// with one thread.
fn large_component() -> Result<Vec<u8>> {
    let steps = (0..990).map(|n| {
        let sums = (n * 100..(n + 1) * 100).map(|k| {
            let local = |m: usize| 1 + (k * m) % 2_000;
            format!(
                "(local.set {} (i64.add (local.get {}) (local.get {})))",
                local(7),
                local(13),
                local(29)
            )
        });
        format!(
            "(loop {} (br_if 0 (local.get 0)))",
            sums.collect::<String>()
        )
    });
    let function = format!(
        "(func (param i32) {} {})",
        "(local i64)".repeat(2_000),
        steps.collect::<String>()
    );
    let module = wat::parse_str(format!("(module {})", function.repeat(4)))?;
    Ok(with_sections(
        &std::fs::read(guests::component()?)?,
        &[&RawSection {
            id: CORE_MODULE,
            data: &module,
        }],
    ))
}

/// Copies a text into its memory and returns its length.
const CALLEE: &str = r#"(component
    (core module $m
        (memory (export "memory") 1)
        (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))
        (func (export "length") (param i32 i32) (result i32) (local.get 1)))
    (core instance $i (instantiate $m))
    (func (export "length") (param "text" string) (result u32)
        (canon lift (core func $i "length") (memory (core memory $i "memory")) (realloc (core func $i "realloc")))))"#;

/// Passes a text from its memory at its start, and traps on a wrong result.
const CALLER: &str = r#"(component
    (import "length" (func $length (param "text" string) (result u32)))
    (core module $memory (memory (export "memory") 1) (data (i32.const 0) "hello"))
    (core instance $memory (instantiate $memory))
    (core func $lowered (canon lower (func $length) (memory (core memory $memory "memory"))))
    (core module $main
        (import "" "length" (func $length (param i32 i32) (result i32)))
        (func $begin
            (if (i32.ne (call $length (i32.const 0) (i32.const 5)) (i32.const 5)) (then unreachable)))
        (start $begin))
    (core instance (instantiate $main (with "" (instance (export "length" (func $lowered)))))))"#;

/// Two components that call each other across their memories.
fn pair() -> Result<Vec<u8>> {
    let (callee, caller) = (wat::parse_str(CALLEE)?, wat::parse_str(CALLER)?);
    compose(b"\0asm\x0d\0\x01\0", &callee, &caller)
}

/// A component with two nested components, where the first is an import of the second.
fn compose(outer: &[u8], callee: &[u8], caller: &[u8]) -> Result<Vec<u8>> {
    let types = wasmparser::Validator::new().validate_all(outer)?;
    let types = types.as_ref();
    let (component, instance, function) = (
        types.component_count(),
        types.component_instance_count(),
        types.component_function_count(),
    );
    let mut first = ComponentInstanceSection::new();
    first.instantiate(
        component,
        std::iter::empty::<(&str, ComponentExportKind, u32)>(),
    );
    let mut alias = ComponentAliasSection::new();
    alias.alias(Alias::InstanceExport {
        instance,
        kind: ComponentExportKind::Func,
        name: "length",
    });
    let mut second = ComponentInstanceSection::new();
    second.instantiate(
        component + 1,
        [("length", ComponentExportKind::Func, function)],
    );
    let (callee, caller) = (
        RawSection {
            id: COMPONENT,
            data: callee,
        },
        RawSection {
            id: COMPONENT,
            data: caller,
        },
    );
    Ok(with_sections(
        outer,
        &[&callee, &caller, &first, &alias, &second],
    ))
}

/// A compiler process, started the way a host does.
fn compiler(seconds: u64, bytes: u64) -> Result<Child> {
    start_compiler(seconds, bytes, &[])
}

fn start_compiler(seconds: u64, bytes: u64, arguments: &[&str]) -> Result<Child> {
    Command::new(guests::oncely()?)
        .args([
            "compile-component",
            "--time",
            &seconds.to_string(),
            "--memory",
            &bytes.to_string(),
        ])
        .args(arguments)
        .env_clear()
        .env("MIMALLOC_ARENA_RESERVE", "65536")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("start the compiler")
}

/// The first byte of the compiler's answer to a component, and the rest.
fn compile(wasm: &[u8]) -> Result<(u8, Vec<u8>)> {
    answer(compiler(60, 2 << 30)?, wasm)
}

/// Gives a component to the compiler. Returns the first byte of its answer, and the rest.
fn answer(mut child: Child, wasm: &[u8]) -> Result<(u8, Vec<u8>)> {
    let mut stdin = child.stdin.take().context("open the compiler's input")?;
    stdin.write_all(&(wasm.len() as u64).to_le_bytes())?;
    stdin.write_all(wasm)?;
    let mut answer = Vec::new();
    child
        .stdout
        .take()
        .context("open the compiler's output")?
        .read_to_end(&mut answer)?;
    ensure!(child.wait()?.success(), "the compiler failed");
    let first = *answer.first().context("read the compiler's answer")?;
    Ok((first, answer.split_off(1)))
}

#[test]
fn a_composed_component_compiles_and_an_invalid_one_is_refused() -> Result<()> {
    let (first, code) = compile(&pair()?)?;
    assert_eq!(first, b'+', "{}", String::from_utf8_lossy(&code));
    assert!(code.starts_with(b"\0\0\0\0\0\0\0\0\x7fELF"), "no functions");
    let invalid = wat::parse_str("(component (core module (func (result i32) i64.const 0)))")?;
    let (first, sentence) = compile(&invalid)?;
    let sentence = String::from_utf8(sentence)?;
    assert_eq!(first, b'-', "{sentence}");
    assert!(
        sentence.contains("type mismatch") && sentence.lines().count() < 5,
        "{sentence}"
    );
    Ok(())
}

#[test]
fn functions_of_an_earlier_compilation_are_used_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("functions");
    let compile = || -> Result<(Vec<u8>, Vec<u8>)> {
        let argument = path.display().to_string();
        let child = start_compiler(60, 2 << 30, &["--functions", &argument])?;
        let (first, output) = answer(child, &std::fs::read(guests::component()?)?)?;
        assert_eq!(first, b'+');
        let (length, rest) = output.split_first_chunk().context("read the length")?;
        let length = usize::try_from(u64::from_le_bytes(*length))?;
        let (functions, code) = rest.split_at_checked(length).context("split the output")?;
        Ok((functions.to_vec(), code.to_vec()))
    };
    let (functions, code) = compile()?;
    assert!(functions.len() > 10_000, "{}", functions.len());
    std::fs::write(&path, &functions)?;
    let (next, same) = compile()?;
    assert!(same == code);
    // The compiler does not recognise each function again. Without any, the file would double.
    assert!(
        next.len() < functions.len() * 9 / 5,
        "{} of {}",
        next.len(),
        functions.len()
    );

    // A damaged file costs time only.
    let mut damaged = functions;
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&path, damaged)?;
    let (again, same) = compile()?;
    assert!(!again.is_empty() && same == code);
    Ok(())
}

#[test]
fn the_compiler_ends_with_its_host_and_at_its_limits() -> Result<()> {
    let bomb = slow_component(40)?;
    let give = |child: &mut Child| -> Result<std::process::ChildStdin> {
        let mut stdin = child.stdin.take().context("open the compiler's input")?;
        stdin.write_all(&(bomb.len() as u64).to_le_bytes())?;
        stdin.write_all(&bomb)?;
        Ok(stdin)
    };

    // A stopping host closes the pipe.
    let mut orphan = compiler(600, 2 << 30)?;
    drop(give(&mut orphan)?);
    let begun = Instant::now();
    assert!(!orphan.wait()?.success());
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );

    // One second of CPU time.
    let mut limited = compiler(1, 2 << 30)?;
    let _stdin = give(&mut limited)?;
    let status = limited.wait()?;
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(24),
        "{status}"
    );
    Ok(())
}

/// A manifest for a worker `other` with these bytes as its component.
fn other_worker(world: &World, wasm: &[u8]) -> Result<PathBuf> {
    let component = world.folder.path().join("other.wasm");
    std::fs::write(&component, wasm).context("write a component")?;
    let manifest = manifest_of(&component, "subjects = [\"in.other\"]")
        .replace("name = \"test\"", "name = \"other\"");
    let manifest: String = manifest
        .lines()
        .filter(|line| !line.starts_with("migrations"))
        .map(|line| format!("{line}\n"))
        .collect();
    let path = world.folder.path().join("other.toml");
    std::fs::write(&path, manifest).context("write a manifest")?;
    Ok(path)
}

/// The compiler processes of the host.
fn compiling(world: &World) -> Result<Vec<u32>> {
    let host = world.host_pid().context("find the host process")?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let read =
            |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let is_ours = read("status")
            .lines()
            .any(|line| line == format!("PPid:\t{host}"));
        if is_ours && read("cmdline").contains("compile-component") {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Waits until the host compiles, or until it has stopped compiling.
async fn until_compiling(world: &World, wanted: bool) -> Result<Vec<u32>> {
    world
        .eventually(format!("the host compiles: {wanted}"), || async {
            let found = compiling(world)?;
            ensure!(found.is_empty() != wanted, "compiler processes: {found:?}");
            Ok(Some(found))
        })
        .await
}

/// Messages counted by the worker `test`.
fn messages(from: usize, count: usize) -> Vec<NewMessage> {
    (from..from + count)
        .map(|n| NewMessage::new("in.x", &format!("e{n}"), "insert", r#"{"n": 1}"#))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compile_bomb_is_refused_once_and_other_workers_continue() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("subjects = [\"in.x\"]")?).await?;
    world
        .host_env
        .push(("ONCELY_COMPILE_TIME".to_owned(), "8s".to_owned()));
    world.start_host().await?;
    other_worker(&world, &slow_component(40)?)?;

    let deploy = world.oncely(&["deploy", "other.toml"]);
    let beside = async {
        until_compiling(&world, true).await?;
        world.nats.publish_all(messages(0, 50)).await?;
        world.until("select count(*) from oncely.inbox", 50).await?;
        // All of them were handled during the compilation.
        assert_eq!(compiling(&world)?.len(), 1);
        Ok::<_, anyhow::Error>(())
    };
    let (refused, beside) = tokio::join!(deploy, beside);
    beside?;
    let said = refused
        .err()
        .context("the deployment succeeded")?
        .to_string();
    assert!(
        said.contains("takes more than 8s of processor time"),
        "{said}"
    );
    assert!(
        said.contains("hint: build it with optimisation") && said.contains("`compile_time`"),
        "{said}"
    );

    let begun = Instant::now();
    let again = world
        .oncely(&["deploy", "other.toml"])
        .await
        .err()
        .context("the deployment succeeded")?
        .to_string();
    assert!(
        again.contains("takes more than 8s of processor time (it was refused before)"),
        "{again}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "{:?}",
        begun.elapsed()
    );
    assert!(compiling(&world)?.is_empty());
    world.stop_host().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compiling_needs_memory_within_its_limit() -> Result<()> {
    let mut world = World::without_host(Kind::Sqlite, &manifest("")?).await?;
    world
        .host_env
        .push(("ONCELY_COMPILE_MEMORY".to_owned(), "1GiB".to_owned()));
    world.start_host().await?;
    other_worker(&world, &large_component()?)?;
    let said = world
        .oncely(&["deploy", "other.toml"])
        .await
        .err()
        .context("the deployment succeeded")?
        .to_string();
    assert!(
        said.contains("compiling the component takes more than 1"),
        "{said}"
    );
    assert!(said.contains("`compile_memory`"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compiling_ends_with_its_client_and_with_the_host() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("")?).await?;
    other_worker(&world, &slow_component(40)?)?;
    let deploy = || {
        Command::new(guests::oncely()?)
            .args(["deploy", "other.toml"])
            .current_dir(world.folder.path())
            .stderr(Stdio::null())
            .spawn()
            .context("deploy")
    };
    let mut client = deploy()?;
    until_compiling(&world, true).await?;
    client.kill().context("kill the client")?;
    client.wait()?;
    until_compiling(&world, false).await?;

    let mut client = deploy()?;
    let compilers = until_compiling(&world, true).await?;
    world.kill_host()?;
    client.wait()?;
    for pid in compilers {
        eventually(format!("process {pid} exits"), || async {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            let is_running = line.is_ok_and(|line| line.contains("compile-component"));
            Ok((!is_running).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_compilation_does_not_block_another_worker() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("subjects = [\"in.x\"]")?).await?;
    let other = slow_component(2)?;
    other_worker(&world, &other)?;
    world.oncely(&["deploy", "other.toml"]).await?;
    world.stop_host().await?;

    // The next start must compile only this component again.
    let digest = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&other));
    let compiled = world.folder.path().join(".oncely/components");
    let mut removed = 0;
    for entry in std::fs::read_dir(&compiled)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&digest) {
            std::fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    assert_eq!(removed, 1);
    world.nats.publish_all(messages(0, 20)).await?;
    world.spawn_host()?;
    until_compiling(&world, true).await?;
    world.until("select count(*) from oncely.inbox", 20).await?;
    let compilers = compiling(&world)?;
    assert_eq!(
        compilers.len(),
        1,
        "the compilation ended before the other worker started"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_composed_of_components_runs() -> Result<()> {
    let composed = compose(
        &std::fs::read(guests::component()?)?,
        &wat::parse_str(CALLEE)?,
        &wat::parse_str(CALLER)?,
    )?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("composed.wasm");
    std::fs::write(&path, composed).context("write a component")?;
    let world = World::start(Kind::Sqlite, &manifest_of(&path, "")).await?;
    world.nats.publish_all(messages(0, 3)).await?;
    world.quiet(3).await?;
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.dead_letter")
            .await?,
        0
    );
    Ok(())
}
