//! The committed bindings of the guest SDKs match the WIT, so a worker's build runs no generator.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use support::guests::repository;
use wit_bindgen_core::{Files, WorldGenerator, wit_parser::Resolve};
use wit_bindgen_rust::{Opts, WithOption};

use wasmparser::{Parser, Payload};

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

#[test]
fn bindings_of_c_match_the_wit() -> Result<()> {
    check_c("worker")?;
    check_c("batch-worker")
}

/// Compares the bindings of a world in C with the committed files. Both worlds have the same names
/// in C, so that the SDK is written once.
fn check_c(world: &str) -> Result<()> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve
        .push_dir(repository().join("wit"))
        .context("read wit/")?;
    let id = resolve.select_world(&[package], Some(world))?;
    let options = wit_bindgen_c::Opts {
        rename_world: Some("bindings".to_owned()),
        ..wit_bindgen_c::Opts::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, id, &mut files)?;

    let folder = repository()
        .join("guest-sdk/c/oncely/generated")
        .join(world.replace('-', "_"));
    for (name, contents) in files.iter() {
        let (name, contents) = match name.strip_suffix(".o") {
            Some(name) => (format!("{name}.c"), component_type(contents)?.into_bytes()),
            None => (name.to_owned(), contents.to_vec()),
        };
        check_file(&folder.join(&name), &contents)?;
    }
    Ok(())
}

#[test]
fn bindings_of_go_match_the_wit() -> Result<()> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve
        .push_dir(repository().join("wit"))
        .context("read wit/")?;
    let id = resolve.select_world(&[package], Some("worker"))?;
    let options = wit_bindgen_go::Opts {
        // The result must not depend on an installed gofmt.
        format: wit_bindgen_go::Format::False,
        pkg_name: Some("oncely/internal/generated".to_owned()),
        ..wit_bindgen_go::Opts::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, id, &mut files)?;
    let folder = repository().join("guest-sdk/go/oncely/internal/generated");
    for (name, contents) in files.iter() {
        check_file(&folder.join(name), contents)?;
    }

    // The module of the runtime has the version that the generator expects.
    let module = std::fs::read_to_string(repository().join("guest-sdk/go/oncely/go.mod"))?;
    let runtime = wit_bindgen_go::remote_pkg_version();
    ensure!(
        module.contains(&runtime),
        "go.mod does not require {runtime}"
    );
    Ok(())
}

/// Compares a committed file with the generated one, or writes it.
fn check_file(path: &Path, generated: &[u8]) -> Result<()> {
    if std::env::var_os(WRITE).is_some() {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        return Ok(std::fs::write(path, generated)?);
    }
    ensure!(
        same(path, generated)?,
        "{} does not match wit/: run `make bindings`",
        path.display()
    );
    Ok(())
}

/// An object file of the generator as C: the custom section with the types of the world, and the
/// symbol that the bindings refer to.
fn component_type(object: &[u8]) -> Result<String> {
    let mut source = "// The types of the world: `make bindings` writes this file.\n\n".to_owned();
    for payload in Parser::new(0).parse_all(object) {
        let Payload::CustomSection(section) = payload? else {
            continue;
        };
        if !section.name().starts_with("component-type") {
            continue;
        }
        let name = section.name();
        writeln!(
            source,
            r#"__asm__(".section \".custom_section.{name}\",\"\",@\n""#
        )?;
        for bytes in section.data().chunks(20) {
            let bytes: Vec<String> = bytes.iter().map(u8::to_string).collect();
            writeln!(source, r#"        ".byte {}\n""#, bytes.join(","))?;
        }
        writeln!(source, "        \".text\\n\");\n")?;
    }
    source.push_str("void __component_type_object_force_link_bindings(void);\n");
    source.push_str("void __component_type_object_force_link_bindings(void) {}\n");
    Ok(source)
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
