//! The structure of the sources: layers, owners of libraries, places of `unsafe`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use support::guests::repository;

/// All Rust sources below a folder, with their text.
fn sources(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in
            std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?
        {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path)?;
                found.push((path, text));
            }
        }
    }
    Ok(found)
}

/// The host's module of a file, such as `store` for `store/sqlite/tx.rs`.
fn module(host: &Path, path: &Path) -> String {
    let below = path.strip_prefix(host).unwrap_or(path);
    let first = below
        .components()
        .next()
        .map(|part| part.as_os_str().to_string_lossy().into_owned());
    first.unwrap_or_default().trim_end_matches(".rs").to_owned()
}

#[test]
fn each_outside_library_has_one_module() -> Result<()> {
    let host = repository().join("host/src");
    let owners = [
        ("wasmtime", &["guest"][..]),
        ("wasmparser", &["component"]),
        ("wasmtime_wasi", &["guest"]),
        ("wasmtime_wasi_http", &["guest"]),
        ("sqlx", &["store"]),
        ("pgwire_replication", &["store"]),
        ("async_nats", &["bus"]),
        ("prometheus_client", &["metrics"]),
        // Part of the interface of wasmtime-wasi-http.
        (
            "hyper",
            &[
                "alarms",
                "guest",
                "http_server",
                "https",
                "oidc",
                "registry",
                "traces",
            ],
        ),
        // Process limits: open files, and those of the compiler process. File systems.
        ("rustix", &["http_server", "guest", "doctor"]),
        ("tokio_rustls", &["bus", "https"]),
        ("nkeys", &["bus"]),
        ("moka", &["cache"]),
        ("redis", &["cache"]),
        ("jsonschema", &["config"]),
        ("rmcp", &["cli"]),
        ("jsonwebtoken", &["oidc"]),
        ("opentelemetry_proto", &["traces"]),
        ("prost", &["traces"]),
    ];
    for (path, text) in sources(&host)? {
        let module = module(&host, &path);
        for (library, owners) in owners {
            let names = format!("{library}::");
            assert!(
                owners.contains(&module.as_str()) || !text.contains(&names),
                "{} names {library}, which only {} may",
                path.display(),
                owners.join(" and ")
            );
        }
    }
    Ok(())
}

/// The modules of the host as listed in `lib.rs`, layer by layer from the top.
fn layers(host: &Path) -> Result<Vec<Vec<String>>> {
    let map = std::fs::read_to_string(host.join("lib.rs"))?;
    let layers = map.split("\n\n").map(|layer| {
        let names = layer
            .lines()
            .filter_map(|line| line.strip_prefix("pub mod ").or(line.strip_prefix("mod ")));
        names
            .map(|name| name.trim_end_matches(';').to_owned())
            .collect()
    });
    Ok(layers
        .filter(|layer: &Vec<String>| !layer.is_empty())
        .collect())
}

/// The names that follow `prefix` in a text, such as `store` for `crate::` in
/// `use crate::store::Tx`.
fn names_after<'t>(text: &'t str, prefix: &str) -> Vec<&'t str> {
    let starts = text
        .match_indices(prefix)
        .map(|(at, _)| text.split_at(at + prefix.len()).1);
    let name = |rest: &'t str| {
        rest.split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
            .unwrap_or_default()
    };
    starts.map(name).collect()
}

#[test]
fn a_module_imports_modules_of_lower_layers_only() -> Result<()> {
    let host = repository().join("host/src");
    let layers = layers(&host)?;
    assert!(layers.len() > 10, "the map of lib.rs is read: {layers:?}");
    let layer_of = |module: &str| {
        layers
            .iter()
            .position(|modules| modules.iter().any(|name| name == module))
    };
    let mut seen = BTreeSet::new();
    for (path, text) in sources(&host)? {
        let own = module(&host, &path);
        if ["main", "lib"].contains(&own.as_str()) {
            continue;
        }
        let layer =
            layer_of(&own).with_context(|| format!("lib.rs does not list the module `{own}`"))?;
        seen.insert(own.clone());
        assert!(
            !text.contains("use crate::{"),
            "{} imports several modules in one line",
            path.display()
        );
        for used in names_after(&text, "crate::") {
            let Some(other) = layer_of(used) else {
                continue;
            };
            assert!(
                other > layer || used == own,
                "{} uses crate::{used}, which is not in a lower layer",
                path.display()
            );
        }
    }
    assert_eq!(
        seen.len(),
        layers.iter().flatten().count(),
        "lib.rs lists a module without files"
    );
    Ok(())
}

/// The files of a module that each of its files imports from, by name without extension.
fn imports_within(folder: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let name = |path: &Path| {
        let below = path.strip_prefix(folder).unwrap_or(path);
        let first = below.components().next();
        first.map_or_else(String::new, |first| {
            let first = first.as_os_str().to_string_lossy();
            first.trim_end_matches(".rs").to_owned()
        })
    };
    let sources = sources(folder)?;
    let files: BTreeSet<String> = sources.iter().map(|(path, _)| name(path)).collect();
    let parent = folder.file_name().context("find the module's name")?;
    let absolute = format!("crate::{}::", parent.to_string_lossy());
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in &sources {
        let own = name(path);
        // The module's own file only declares and re-exports the others.
        if own == "mod" {
            continue;
        }
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        let used = names_after(text, &absolute)
            .into_iter()
            .chain(names_after(text, "super::"));
        let used = used.filter(|used| files.contains(*used) && *used != own);
        let entry = imports.entry(own.clone()).or_default();
        entry.extend(used.map(str::to_owned));
    }
    Ok(imports)
}

#[test]
fn no_file_of_guest_imports_itself_through_others() -> Result<()> {
    let mut imports = imports_within(&repository().join("host/src/guest"))?;
    assert!(
        imports.len() > 10 && imports["call"].contains("state"),
        "{imports:?}"
    );

    // Files that import nothing of the module are taken away until none is left.
    while !imports.is_empty() {
        let leaves: BTreeSet<String> = imports
            .iter()
            .filter(|(_, used)| used.is_empty())
            .map(|(file, _)| file.clone())
            .collect();
        assert!(
            !leaves.is_empty(),
            "files import each other in a circle: {imports:?}"
        );
        imports.retain(|file, _| !leaves.contains(file));
        for used in imports.values_mut() {
            used.retain(|file| !leaves.contains(file));
        }
    }
    Ok(())
}

#[test]
fn only_the_store_creates_a_settled_proof() -> Result<()> {
    let host = repository().join("host/src");
    let sources = sources(&host)?;
    let creators = sources
        .iter()
        .filter(|(_, text)| text.contains("Settled::seen_by_store("));
    let creators: BTreeSet<String> = creators.map(|(path, _)| module(&host, path)).collect();
    assert_eq!(creators, BTreeSet::from(["store".to_owned()]));
    Ok(())
}

#[test]
fn a_message_is_acknowledged_only_with_a_settled_proof() -> Result<()> {
    let host = repository().join("host/src");

    // One function sends the positive acknowledgement of a message.
    let sources = sources(&host)?;
    let acks: Vec<&Path> = sources
        .iter()
        .flat_map(|(path, text)| text.matches("AckKind::Ack)").map(move |_| path.as_path()))
        .collect();
    assert_eq!(acks, [host.join("bus/pull.rs")]);
    assert!(!sources.iter().any(|(_, text)| text.contains("+ACK")));

    // It takes the proof.
    let pull = std::fs::read_to_string(host.join("bus/pull.rs"))?;
    let (_, ack) = pull
        .split_once("pub async fn ack(self, _proof: &Settled)")
        .context("find the function that acknowledges")?;
    let (body, _) = ack.split_once("\n    }\n").context("find its end")?;
    assert!(body.contains("AckKind::Ack)"), "{body}");
    Ok(())
}

#[test]
fn unsafe_code_is_limited_to_engine_and_sqlite_authorizer() -> Result<()> {
    let host = repository().join("host/src");
    let mut allowing: Vec<PathBuf> = sources(&host)?
        .into_iter()
        .filter(|(_, text)| text.contains("allow(unsafe_code)"))
        .map(|(path, _)| path)
        .collect();
    allowing.sort();
    assert_eq!(
        allowing,
        [
            host.join("guest/engine.rs"),
            host.join("store/sqlite/authorizer.rs")
        ]
    );
    Ok(())
}

#[test]
fn only_tests_disable_the_statement_filter() -> Result<()> {
    let host = repository().join("host/src");
    for (path, text) in sources(&host)? {
        assert!(
            !text.contains(".without_filter("),
            "{} disables the statement filter",
            path.display()
        );
    }
    Ok(())
}

#[test]
fn every_file_starts_with_a_doc_comment() -> Result<()> {
    for folder in [
        "host/src",
        "client/src",
        "guest-sdk/src",
        "tests/it",
        "tests/chaos",
        "tests/support",
        "tests/guests/src",
        "tests/batch-guest/src",
        "examples/payments/src",
    ] {
        for (path, text) in sources(&repository().join(folder))? {
            assert!(
                text.starts_with("//!"),
                "{} does not start with a `//!` line",
                path.display()
            );
        }
    }
    Ok(())
}

#[test]
fn both_databases_have_the_same_migrations() -> Result<()> {
    let names = |database: &str| -> Result<Vec<String>> {
        let folder = repository().join("migrations").join(database);
        let mut names: Vec<String> = std::fs::read_dir(folder)?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        Ok(names)
    };
    assert_eq!(names("postgres")?, names("sqlite")?);
    Ok(())
}
// A mutant that no longer applies would make `make mutants` prove nothing.
#[test]
fn every_mutant_patch_applies() -> Result<()> {
    let copy = tempfile::tempdir()?;
    let host = repository().join("host/src");
    for (path, text) in sources(&host)? {
        let to = copy.path().join("host/src").join(path.strip_prefix(&host)?);
        std::fs::create_dir_all(to.parent().context("find the folder of a copy")?)?;
        std::fs::write(to, text)?;
    }
    let folder = repository().join("tests/mutants");
    let mut patches: Vec<PathBuf> = std::fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    // The one that the others need comes first.
    patches.sort_by_key(|path| (!path.ends_with("selector.patch"), path.clone()));
    assert!(
        patches.len() > 20,
        "{} patches in tests/mutants",
        patches.len()
    );
    for patch in patches {
        let applied = Command::new("git")
            .args(["apply", "-C1"])
            .arg(&patch)
            .current_dir(copy.path())
            .env(
                "GIT_CEILING_DIRECTORIES",
                copy.path()
                    .parent()
                    .context("find the folder of the copy")?,
            )
            .output()
            .context("run git")?;
        let error = String::from_utf8_lossy(&applied.stderr);
        assert!(
            applied.status.success(),
            "{} does not apply: {error}",
            patch.display()
        );
    }
    Ok(())
}
