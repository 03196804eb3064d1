//! What the sources must not contain: the floors of the house hold because these tests do.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use support::guests::repository;

/// All Rust sources below a folder, with their text.
fn sources(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
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

/// The module of the host a file belongs to, such as `store` for `store/sqlite/tx.rs`.
fn room(host: &Path, path: &Path) -> String {
    let below = path.strip_prefix(host).unwrap_or(path);
    let first = below.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
    first.unwrap_or_default().trim_end_matches(".rs").to_owned()
}

#[test]
fn each_outside_library_has_one_room() -> Result<()> {
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
        // What wasmtime-wasi-http takes and gives.
        ("hyper", &["webhook", "guest", "http_server"]),
        // Limits of processes: open files, and those of the process that compiles.
        ("rustix", &["http_server", "guest"]),
        ("tokio_rustls", &["webhook", "bus"]),
        ("nkeys", &["bus"]),
        ("moka", &["cache"]),
        ("redis", &["cache"]),
    ];
    for (path, text) in sources(&host)? {
        let room = room(&host, &path);
        for (library, owners) in owners {
            let names = format!("{library}::");
            assert!(
                owners.contains(&room.as_str()) || !text.contains(&names),
                "{} names {library}, which only {} may",
                path.display(),
                owners.join(" and ")
            );
        }
    }
    Ok(())
}

#[test]
fn imports_run_downwards_only() -> Result<()> {
    const FLOORS: &[&[&str]] = &[
        &["main", "lib"],
        &["cli"],
        &["api"],
        &["host", "deploy", "reconcile", "replay", "watch"],
        &["worker", "lane", "ingress"],
        &["relay", "webhook", "cache_feed"],
        &["delivery"],
        &["guest", "store", "bus", "cache", "http_server", "crate_build"],
        &[
            "message",
            "output_ids",
            "request",
            "sql",
            "state",
            "verdict",
            "dead_letter",
            "redrive",
            "manifest",
            "config",
            "retry",
            "subject",
            "units",
            "toml_text",
            "base64_text",
            "hint",
            "breaker",
            "metrics",
            "alarm",
            "health",
            "failure_group",
            "cached",
            "invalidation",
            "component",
            "fault",
            "drain",
        ],
    ];
    let floor = |room: &str| FLOORS.iter().position(|rooms| rooms.contains(&room));
    let host = repository().join("host/src");
    for (path, text) in sources(&host)? {
        let room = room(&host, &path);
        let own = floor(&room).with_context(|| format!("the room `{room}` stands on no floor; add it to the map"))?;
        for (_, rest) in text.match_indices("crate::").map(|(at, found)| text.split_at(at + found.len())) {
            let used: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(other) = floor(&used) else { continue };
            let allowed = other > own || used == room || (other == own && own != 7);
            assert!(allowed, "{} uses crate::{used}, which is not below it", path.display());
        }
    }
    Ok(())
}

#[test]
fn only_the_store_makes_the_proof_and_only_the_bus_takes_it() -> Result<()> {
    let host = repository().join("host/src");
    for (path, text) in sources(&host)? {
        let room = room(&host, &path);
        let makes = text.contains("Settled::seen_by_store");
        assert!(!makes || room == "store", "{} makes a proof of settlement", path.display());
        let acks = text.contains(".acker.ack(");
        assert!(!acks || room == "bus", "{} acknowledges by itself", path.display());
    }
    Ok(())
}

#[test]
fn unsafe_code_stands_where_a_component_is_loaded_and_where_sqlite_is_walled_and_nowhere_else() -> Result<()> {
    let host = repository().join("host/src");
    let mut allowing: Vec<PathBuf> = sources(&host)?
        .into_iter()
        .filter(|(_, text)| text.contains("allow(unsafe_code)"))
        .map(|(path, _)| path)
        .collect();
    allowing.sort();
    assert_eq!(allowing, [host.join("guest/engine.rs"), host.join("store/sqlite/authorizer.rs")]);
    Ok(())
}

#[test]
fn only_tests_leave_the_filter_out() -> Result<()> {
    let host = repository().join("host/src");
    for (path, text) in sources(&host)? {
        assert!(!text.contains(".without_filter("), "{} leaves the statement filter out", path.display());
    }
    Ok(())
}

#[test]
fn every_file_says_what_it_is_for() -> Result<()> {
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
            assert!(text.starts_with("//!"), "{} does not open with a `//!` line", path.display());
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
