//! The committed bindings of the guest SDK match the WIT, so a worker's build runs no generator.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use support::guests::repository;
use wit_bindgen_core::{Files, WorldGenerator, wit_parser::Resolve};
use wit_bindgen_rust::{Opts, WithOption};

/// Set by `make bindings` to write the files instead of comparing them.
const WRITE: &str = "ONCELY_WRITE_BINDINGS";

#[test]
fn sdk_bindings_match_the_wit() -> Result<()> {
    check(
        "worker",
        Opts {
            generate_all: true,
            ..options("bindings", "export_worker")
        },
    )?;
    let shared = ["types", "outbox", "state", "sql", "cache", "invocation"];
    let mut with: Vec<(String, WithOption)> = shared
        .iter()
        .map(|interface| {
            let path = format!("crate::bindings::oncely::worker::{interface}");
            (
                format!("oncely:worker/{interface}@0.1.0"),
                WithOption::Path(path),
            )
        })
        .collect();
    for (interface, path) in [
        (
            "wasi:logging/logging@0.1.0-draft",
            "crate::bindings::wasi::logging::logging",
        ),
        (
            "wasi:config/store@0.2.0-rc.1",
            "crate::bindings::wasi::config::store",
        ),
    ] {
        with.push((interface.to_owned(), WithOption::Path(path.to_owned())));
    }
    check(
        "batch-worker",
        Opts {
            with,
            ..options("batch_bindings", "export_batch_worker")
        },
    )
}

fn options(module: &str, export_macro: &str) -> Opts {
    Opts {
        format: true,
        additional_derive_attributes: vec!["PartialEq".to_owned()],
        pub_export_macro: true,
        export_macro_name: Some(export_macro.to_owned()),
        default_bindings_module: Some(format!("oncely_guest::{module}")),
        ..Opts::default()
    }
}

/// Compares the bindings of a world of `wit/` with the committed file.
fn check(world: &str, options: Opts) -> Result<()> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve
        .push_dir(repository().join("wit"))
        .context("read wit/")?;
    let id = resolve.select_world(&[package], Some(world))?;
    let mut files = Files::default();
    options.build().generate(&mut resolve, id, &mut files)?;
    let (_, generated) = files.iter().next().context("find the generated file")?;
    let headline = format!(
        "//! The bindings of the world `{world}` of `wit/`: `make bindings` writes this file.\n\n"
    );
    let generated = [headline.as_bytes(), generated].concat();

    let path = repository()
        .join("guest-sdk/src/generated")
        .join(format!("{}.rs", world.replace('-', "_")));
    if std::env::var_os(WRITE).is_some() {
        return Ok(std::fs::write(path, generated)?);
    }
    ensure!(
        same(&path, &generated)?,
        "{} does not match wit/: run `make bindings`",
        path.display()
    );
    Ok(())
}

fn same(path: &Path, generated: &[u8]) -> Result<bool> {
    Ok(std::fs::read(path).with_context(|| format!("read {}", path.display()))? == generated)
}

/// Toolchains link these packages whole into every worker. A partial copy does not merge with the
/// whole.
#[test]
fn wit_contains_no_package_that_toolchains_link() -> Result<()> {
    let linked = [
        "cli",
        "clocks",
        "filesystem",
        "http",
        "io",
        "random",
        "sockets",
    ];
    for folder in std::fs::read_dir(repository().join("wit/deps"))? {
        for file in std::fs::read_dir(folder?.path())? {
            let path = file?.path();
            let text = std::fs::read_to_string(&path)?;
            for package in linked {
                ensure!(
                    !text.contains(&format!("package wasi:{package}")),
                    "{} is a copy of a linked package",
                    path.display()
                );
            }
        }
    }
    Ok(())
}
