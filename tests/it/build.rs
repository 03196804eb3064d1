//! `oncely build` finds everything that `oncely deploy` would refuse, without a host.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use support::guests;
use support::world::manifest_of;

/// Compiler terms and internals of Oncely that an author of a worker need not understand.
const JARGON: [&str; 9] = [
    "backtrace",
    "panicked",
    "wasmtime",
    "wasmparser",
    "cranelift",
    "magic",
    "leb128",
    ".rs:",
    "unwrap",
];

/// The standard error of `oncely build` for a manifest, and whether it succeeded.
fn build(folder: &Path, manifest: &str) -> Result<(bool, String)> {
    std::fs::write(folder.join("oncely.toml"), manifest).context("write a manifest")?;
    let output = Command::new(guests::oncely()?)
        .args(["build", "."])
        .current_dir(folder)
        .env("NO_COLOR", "1")
        .env("RUST_BACKTRACE", "1")
        .output()
        .context("run `oncely build`")?;
    Ok((output.status.success(), String::from_utf8(output.stderr)?))
}

/// A manifest with this component, and the component's file.
fn with_component(folder: &Path, bytes: &[u8]) -> Result<String> {
    let path = folder.join("given.wasm");
    std::fs::write(&path, bytes).context("write a component")?;
    Ok(manifest_of(&path, ""))
}

/// The error of a refused build; it is short and plain and has a hint.
fn refusal(folder: &Path, manifest: &str) -> Result<String> {
    let (built, said) = build(folder, manifest)?;
    ensure!(!built, "the build succeeded:\n{manifest}");
    ensure!(said.lines().count() <= 5, "too long:\n{said}");
    ensure!(
        said.starts_with("error: ") && said.contains("\nhint: "),
        "no hint:\n{said}"
    );
    for word in JARGON {
        ensure!(!said.contains(word), "the error contains `{word}`:\n{said}");
    }
    Ok(said)
}

#[test]
fn build_accepts_a_deployable_component() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for component in [guests::component()?, guests::batch_component()?] {
        let (built, said) = build(folder.path(), &manifest_of(&component, ""))?;
        ensure!(built, "{said}");
    }
    Ok(())
}

#[test]
fn files_that_are_no_component_are_named_in_the_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let good = std::fs::read(guests::component()?)?;
    let wasi_3 = r#"(component
        (import "wasi:clocks/monotonic-clock@0.3.0-rc-2026-03-15" (instance))
        (instance $none) (export "wasi:http/handler@0.3.0" (instance $none)))"#;
    let core_module = r#"(module (import "wasi_snapshot_preview1" "fd_write" (func)))"#;
    let cases: [(&[u8], &str); 7] = [
        (b"", "the file is empty"),
        (b"PK\x03\x04and so on", "the file is a zip archive"),
        (b"(component)", "the file is the text form of a component"),
        (&good[..good.len() / 2], "the file is truncated"),
        (
            &wat::parse_str(core_module)?,
            "the file is a core module, not a component (built for WASI 0.1",
        ),
        (
            &wat::parse_str(wasi_3)?,
            "the component is built for a release candidate of WASI 0.3",
        ),
        (
            &wat::parse_str("(component)")?,
            "the component exports no handler",
        ),
    ];
    for (bytes, sentence) in cases {
        let said = refusal(folder, &with_component(folder, bytes)?)?;
        assert!(said.contains(sentence), "{said}");
        assert!(
            said.starts_with("error: the component of worker test, "),
            "{said}"
        );
    }

    let said = refusal(folder, &manifest_of(folder, ""))?;
    assert!(
        said.contains("is a folder, not a WebAssembly component"),
        "{said}"
    );

    std::fs::File::create(folder.join("large.wasm"))?.set_len((64 << 20) + 1)?;
    let said = refusal(folder, &manifest_of(&folder.join("large.wasm"), ""))?;
    assert!(
        said.contains("the file has 67108865 bytes; a component may have 64.0 MiB"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_component_that_does_not_fit_its_manifest_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();

    let said = refusal(folder, &manifest_of(&guests::http_component()?, ""))?;
    assert!(
        said.contains(
            "the component of worker test answers requests, and the manifest gives it a stream"
        ),
        "{said}"
    );

    let importing = r#"(component
        (import "acme:ledger/book@1.0.0" (instance))
        (instance $none) (export "oncely:worker/handler@0.1.0" (instance $none)))"#;
    let said = refusal(
        folder,
        &with_component(folder, &wat::parse_str(importing)?)?,
    )?;
    assert!(
        said.contains("imports `acme:ledger/book@1.0.0`, which hosts do not provide"),
        "{said}"
    );

    let bomb = format!(
        r#"(component (core module (func (param i32) {} {}))
            (instance $none) (export "oncely:worker/handler@0.1.0" (instance $none)))"#,
        "(local i64)".repeat(2_000),
        "(block (br_if 0 (local.get 0)) (local.set 1 (i64.const 1)))".repeat(5_000)
    );
    let said = refusal(folder, &with_component(folder, &wat::parse_str(&bomb)?)?)?;
    assert!(
        said.contains("the component exceeds a compiler limit"),
        "{said}"
    );

    let mut damaged = std::fs::read(guests::component()?)?;
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0xff);
    let said = refusal(folder, &with_component(folder, &damaged)?)?;
    assert!(said.contains("the component is damaged"), "{said}");
    Ok(())
}

#[test]
fn migrations_are_read_for_each_database_they_are_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let migrations = |path: &str| -> Result<String> {
        let own = guests::repository()
            .join("tests/guests/migrations")
            .display()
            .to_string();
        Ok(manifest_of(&guests::component()?, "").replace(&own, path))
    };
    let said = refusal(folder, &migrations("absent")?)?;
    assert!(
        said.contains("the migrations folder of worker `test`"),
        "{said}"
    );

    std::fs::create_dir_all(folder.join("both/postgres"))?;
    std::fs::write(folder.join("both/1.sql"), "create table t (x int)")?;
    let said = refusal(folder, &migrations("both")?)?;
    assert!(
        said.contains("contains both *.sql files and a subfolder for one database"),
        "{said}"
    );

    std::fs::create_dir_all(folder.join("one/postgres"))?;
    std::fs::write(folder.join("one/postgres/1.sql"), "create table t (x int)")?;
    let (built, said) = build(folder, &migrations("one")?)?;
    ensure!(built, "{said}");

    std::fs::write(folder.join("one/postgres/2.sql"), b"-- \xff")?;
    let (built, said) = build(folder, &migrations("one")?)?;
    ensure!(!built && said.contains("2.sql"), "{said}");
    Ok(())
}

#[test]
fn env_selects_the_environment_for_build_test_and_dev() -> Result<()> {
    let folder = tempfile::tempdir().context("create a folder")?;
    let component = guests::component()?;
    let text = format!(
        "{}\n[[env.production.worker]]\nname = \"test\"\ncomponent = {:?}\n",
        manifest_of(Path::new("missing.wasm"), ""),
        component.display().to_string()
    );
    std::fs::write(folder.path().join("oncely.toml"), text).context("write a manifest")?;
    let run = |args: &[&str], variable: &str| -> Result<(bool, String)> {
        let output = Command::new(guests::oncely()?)
            .args(args)
            .current_dir(folder.path())
            .env("NO_COLOR", "1")
            .env("ONCELY_ENV", variable)
            .output()
            .context("run `oncely`")?;
        Ok((output.status.success(), String::from_utf8(output.stderr)?))
    };

    // An empty variable counts as unset, and the flag has precedence.
    let (built, said) = run(&["build"], "")?;
    ensure!(!built && said.contains("missing.wasm"), "{said}");
    for (args, variable) in [
        (&["build"][..], "production"),
        (&["build", "--env", "production"], ""),
        (&["build", "--env", "production"], "staging"),
    ] {
        let (built, said) = run(args, variable)?;
        ensure!(built, "{args:?} with {variable:?}: {said}");
    }
    for command in ["build", "test", "dev"] {
        let (succeeded, said) = run(&[command], "staging")?;
        ensure!(
            !succeeded
                && said.contains("there is no environment `staging`")
                && said.contains("hint: the environments are: production"),
            "{command}: {said}"
        );
    }
    Ok(())
}
