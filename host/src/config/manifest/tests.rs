//! Tests of the manifest's keys, defaults and errors.

use std::time::Duration;

use bytes::Bytes;

use super::cloud_events::CLOUD_EVENTS_KEYS;
use super::parse::{ALARM_KEYS, LIMITS_KEYS, MANIFEST_KEYS, RETRY_KEYS, STREAM_KEYS, WORKER_KEYS};
use super::routes::ROUTE_KEYS;
use super::schemas::SCHEMA_KEYS;
use super::*;
use crate::model::hint::hints;
use crate::model::retry::OnDeterministicFailure;
use crate::model::sql::Dialect;

pub(super) const FULL: &str = r#"
[[stream]]
name = "PAYMENTS"
subjects = ["payments.>"]
max_age = "7d"

[[worker]]
name = "settle"
crate = "."
stream = "PAYMENTS"
subjects = ["payments.requested"]
outputs = ["payments.settled", "x.>"]
migrations = "migrations"
ordering_key = "header:Account"
on_failure = "hold"
state_keys = ["account/{header:Account}"]
isolation = "batch"
concurrency = 8
batch = 16
ack_wait = "45s"
[worker.retry]
attempts = 7
backoff = "2s"
backoff_max = "1m"
deterministic_failures = "retry"
[worker.limits]
time = "3s"
memory = "32MiB"
outputs = 3
output_size = "2kB"
outputs_size = "4KiB"
sql_statements = 5
sql_rows = 6
sql_size = "7"
response_size = "10B"
state_size = "8B"
state_entries = 11
state_entries_size = "12B"
log_size = "9B"
[worker.alarm]
dead_letters = 10
dead_letter_age = "11h"
unhandled_age = "12m"
unpublished_age = "13s"
parked = 14
id_taken = 16
new_failures = 0
clear_after = "15s"
[worker.config]
currency = "EUR"

[[worker]]
name = "other"
component = "x.wasm"
build = "make x.wasm"
stream = "ELSEWHERE"
"#;

fn full() -> Manifest {
    Manifest::parse(FULL, "app/oncely.toml").unwrap()
}

fn worker() -> Worker {
    full().workers[0].worker.clone()
}

#[test]
fn every_key_of_a_manifest_is_read() {
    let manifest = full();
    assert_eq!(
        manifest.streams[0].max_age,
        Some(Duration::from_secs(604_800))
    );
    assert_eq!(manifest.workers[0].source, Source::Crate("app/.".into()));
    assert_eq!(
        manifest.workers[0].migrations,
        Some("app/migrations".into())
    );
    let expected = Worker {
        name: "settle".into(),
        component: None,
        stream: Some("PAYMENTS".into()),
        routes: Vec::new(),
        subjects: vec!["payments.requested".into()],
        outputs: vec!["payments.settled".into(), "x.>".into()],
        ordering_key: Some(OrderingKey::Header("Account".into())),
        on_failure: OnFailure::Hold,
        state_keys: vec![StateKey::try_from("account/{header:Account}".to_owned()).unwrap()],
        isolation: Isolation::Batch,
        concurrency: 8,
        batch: 16,
        ack_wait: Duration::from_secs(45),
        retry: RetryPolicy {
            attempts: 7,
            backoff: Duration::from_secs(2),
            backoff_max: Duration::from_secs(60),
            deterministic_failures: OnDeterministicFailure::Retry,
        },
        limits: Limits {
            time: Duration::from_secs(3),
            memory: 32 << 20,
            outputs: 3,
            output_size: 2000,
            outputs_size: 4096,
            sql_statements: 5,
            sql_rows: 6,
            sql_size: 7,
            response_size: 10,
            state_size: 8,
            state_entries: 11,
            state_entries_size: 12,
            log_size: 9,
        },
        alarm: Thresholds {
            dead_letters: 10,
            dead_letter_age: Duration::from_secs(11 * 60 * 60),
            unhandled_age: Duration::from_secs(12 * 60),
            unpublished_age: Duration::from_secs(13),
            parked: 14,
            id_taken: 16,
            new_failures: 0,
            clear_after: Duration::from_secs(15),
        },
        config: [("currency".to_owned(), ConfigValue::Text("EUR".to_owned()))].into(),
        schemas: Vec::new(),
        cloudevents: None,
    };
    assert_eq!(manifest.workers[0].worker, expected);
    assert_eq!(expected.durable(), "oncely-settle");
    assert_eq!(
        expected.limits.sql(),
        crate::model::sql::SqlLimits { rows: 6, bytes: 7 }
    );
}

#[test]
fn a_worker_handles_messages_or_requests() {
    let routes = |text: &str| {
        let worker = format!("[[worker]]\nname = \"a\"\ncomponent = \"a.wasm\"\n{text}");
        Manifest::parse(&worker, "oncely.toml").map(|manifest| manifest.workers[0].worker.clone())
    };
    let worker = routes(
        "[[worker.route]]\npath = \"/a/{id}\"\nmethods = [\"POST\"]\nidempotency_key = \"optional\"\nwindow = \"48h\"\n\
         clients_retry_for = \"36h\"\nwait = \"2s\"\nstore_failures = \"all\"\nbody_size = \"2KiB\"\ncache = \"10s\"\n\
         cache_stale = \"1m\"\ncache_tags = [\"a:{id}\"]\ncache_scope = \"shared\"\n\
         [[worker.route]]\npath = \"/b\"",
    )
    .unwrap();
    assert_eq!((worker.stream, worker.concurrency), (None, 16));
    let expected = Route {
        path: "/a/{id}".to_owned(),
        methods: vec!["POST".to_owned()],
        idempotency_key: KeyRule::Optional,
        window: Duration::from_secs(48 * 60 * 60),
        wait: Duration::from_secs(2),
        store_failures: StoreFailures::All,
        body_size: 2048,
        cache: Some(CachePolicy {
            ttl: Duration::from_secs(10),
            stale: Duration::from_secs(60),
            tags: vec!["a:{id}".to_owned()],
            cache_scope: CacheScope::Shared,
        }),
    };
    assert_eq!(worker.routes[0], expected);
    assert!(worker.routes[1].requires_key("POST") && !worker.routes[1].requires_key("PUT"));
    for (text, why) in [
        ("", "needs a `stream` or a route"),
        (
            "stream = \"S\"\n[[worker.route]]\npath = \"/a\"",
            "`stream` is for workers that handle messages",
        ),
        (
            "ack_wait = \"3s\"\n[[worker.route]]\npath = \"/a\"",
            "`ack_wait` is for workers that handle messages",
        ),
        (
            "[[worker.route]]\npath = \"/a\"\ncache_stale = \"1m\"",
            "has no effect without `cache`",
        ),
        (
            "[[worker.route]]\npath = \"a\"",
            "does not begin with a slash",
        ),
        ("[[worker.route]]\npath = \"/a/{\"", "`/a/{`"),
        (
            "[[worker.route]]\npath = \"/publish/x\"",
            "publishing to a subject",
        ),
        (
            "[[worker.route]]\npath = \"/a\"\nwindow = \"1h\"\nclients_retry_for = \"2h\"",
            "shorter than `clients_retry_for` (2h",
        ),
        (
            "[[worker.route]]\npath = \"/a\"\n[[worker.route]]\npath = \"/a\"",
            "two routes for the same method",
        ),
        (
            "[[worker.route]]\npath = \"/a\"\nmethods = [\"post\"]",
            "`post`",
        ),
    ] {
        let refused = format!("{:#}", routes(text).unwrap_err());
        assert!(refused.contains(why), "{text}: {refused}");
    }
}

#[test]
fn omitted_keys_get_their_defaults() {
    let other = full().workers[1].clone();
    let build = Some("make x.wasm".to_owned());
    assert_eq!(
        other.source,
        Source::Component {
            path: "app/x.wasm".into(),
            build
        }
    );
    assert_eq!((other.worker.concurrency, other.worker.batch), (4, 100));
    assert_eq!(other.worker.ack_wait, Duration::from_secs(10));
    assert_eq!(other.worker.retry, RetryPolicy::default());
    assert_eq!(other.worker.limits, Limits::default());
    assert_eq!(other.worker.alarm, Thresholds::default());
    assert_eq!(
        (other.worker.on_failure, other.worker.isolation),
        (OnFailure::Skip, Isolation::Message)
    );
    assert!(other.worker.subjects.is_empty() && other.worker.outputs.is_empty());
}

#[test]
fn a_component_in_a_registry_has_a_reference() {
    let parse = |lines: &str| {
        let text = format!("[[worker]]\nname = \"a\"\nstream = \"S\"\n{lines}");
        let manifest = Manifest::parse(&text, "oncely.toml");
        manifest.map(|manifest| manifest.workers[0].source.clone())
    };
    let reference = "oci://registry.example.com/team/worker:1.2";
    let source = parse(&format!("component = \"{reference}\"")).unwrap();
    assert!(matches!(&source, Source::Oci(found) if found.to_string() == reference));

    for (lines, what, hint) in [
        (
            "component = \"oci://registry.example.com/team/worker\"",
            "4: `component` `oci://registry.example.com/team/worker` has neither",
            "component = \"oci://registry.example.com/team/worker:1.2\"",
        ),
        (
            "component = \"oci://registry.example.com/a:1\"\nbuild = \"make\"",
            "5: `build` is for a file",
            "component = \"worker.wasm\"",
        ),
    ] {
        let error = parse(lines).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert!(
            hints(&error).join("; ").contains(hint),
            "{:?}",
            hints(&error)
        );
    }
}

#[test]
fn worker_json_round_trips_and_older_json_gets_new_defaults() {
    let json = serde_json::to_string(&worker()).unwrap();
    assert_eq!(serde_json::from_str::<Worker>(&json).unwrap(), worker());
    let older = r#"{"name":"a","stream":"S","concurrency":1,"batch":1,"ack_wait":"30s","limits":{"time":"1s"}}"#;
    let read: Worker = serde_json::from_str(older).unwrap();
    assert_eq!(
        read.limits,
        Limits {
            time: Duration::from_secs(1),
            ..Limits::default()
        }
    );
}

/// The error and hint for the manifest [`FULL`] with one line replaced.
fn refusal(line: &str, replacement: &str) -> (String, String) {
    assert!(FULL.contains(line), "{line}");
    let error = Manifest::parse(&FULL.replacen(line, replacement, 1), "oncely.toml").unwrap_err();
    (error.to_string(), hints(&error).join("; "))
}

#[test]
fn each_manifest_error_names_its_line_and_a_fix() {
    let cases = [
        (
            "max_age",
            "max_aeg",
            "5: [[stream]] has no key `max_aeg`",
            "did you mean: max_age = \"7d\"",
        ),
        (
            "[worker.limits]",
            "[worker.limit]",
            "26: [[worker]] has no key `limit`",
            "did you mean: [worker.limits]",
        ),
        (
            "ack_wait",
            "zebra",
            "20: [[worker]] has no key `zebra`",
            "remove it; the keys here are: name, crate",
        ),
        (
            "attempts = 7",
            "attempts = \"7\"",
            "22: `attempts` in [worker.retry] must be a whole number",
            "for example: attempts = 5",
        ),
        (
            "attempts = 7",
            "attempts = 0",
            "22: `attempts` in [worker.retry] must be between 1 and 1000",
            "attempts = 5",
        ),
        (
            "\"45s\"",
            "\"45 parsecs\"",
            "20: `ack_wait` in [[worker]] is invalid: `45 parsecs` is not a",
            "ack_wait = \"10s\"",
        ),
        (
            "\"hold\"",
            "\"wait\"",
            "15: `on_failure` in [[worker]] is invalid: `wait` is not one of: skip, hold",
            "on_failure = \"hold\"",
        ),
        (
            "state_keys = [\"account/{header:Account}\"]",
            "state_keys = [\"account/{key}\"]",
            "16: `state_keys` in [[worker]] is invalid",
            "state_keys = [\"account/{header:Account}\"]",
        ),
        (
            "ordering_key = \"header:Account\"",
            "",
            "15: `on_failure` is `hold`, but without an ordering key no message waits for another",
            "ordering_key = \"header:Account\"",
        ),
        (
            "\"45s\"",
            "45",
            "20: `ack_wait` in [[worker]] must be a duration in quotes",
            "ack_wait = \"10s\"",
        ),
        (
            "\"32MiB\"",
            "\"1KiB\"",
            "28: `memory` in [worker.limits] must be between 1 MiB and 4 GiB",
            "memory = \"64MiB\"",
        ),
        (
            "name = \"settle\"",
            "name = \"Settle!\"",
            "8: `name` in [[worker]] is invalid: `Settle!` is not 1 to 63 characters of a-z, 0-9 and -",
            "name = \"settle\"",
        ),
        (
            "name = \"settle\"",
            "",
            "7: [[worker]] needs `name`",
            "add the line: name = \"settle\"",
        ),
        (
            "name = \"other\"",
            "name = \"settle\"",
            "53: there are two workers named `settle`",
            "name = \"settle-2\"",
        ),
        (
            "crate = \".\"",
            "",
            "7: [[worker]] needs `crate` or `component`",
            "crate = \".\"",
        ),
        (
            "crate = \".\"",
            "crate = \".\"\ncomponent = \"a\"",
            "10: [[worker]] has both `crate` and `component`",
            "keep `crate`",
        ),
        (
            "crate = \".\"",
            "crate = \".\"\nbuild = \"a\"",
            "10: `build` is only for a `component`",
            "component = \"worker.wasm\"",
        ),
        (
            "stream = \"PAYMENTS\"",
            "stream = \"payments\"",
            "10: no [[stream]] is named `payments`",
            "stream = \"PAYMENTS\"",
        ),
        (
            "stream = \"PAYMENTS\"",
            "stream = \"ONCELY_REDRIVE\"",
            "10: `stream` in [[worker]] is invalid: `ONCELY_REDRIVE` is reserved for the host",
            "stream = \"PAYMENTS\"",
        ),
        (
            "stream = \"PAYMENTS\"",
            "",
            "7: [[worker]] needs a `stream` or a route",
            "stream = \"PAYMENTS\"",
        ),
        (
            "\"payments.requested\"",
            "\"orders.*\"",
            "11: the stream `PAYMENTS` does not capture the subject `orders.*`",
            "subjects = [\"payments.>\", \"orders.*\"]",
        ),
        (
            "\"payments.requested\"",
            "\"payments..x\"",
            "11: `subjects` in [[worker]] is invalid: the subject `payments..x` has an empty token",
            "subjects = ",
        ),
        (
            "\"payments.requested\"",
            "\"payments.a\", \"payments.*\"",
            "11: the subjects `payments.a` and `payments.*` overlap",
            "narrow",
        ),
        (
            "\"x.>\"",
            "\"payments.settled\"",
            "12: `outputs` lists `payments.settled` twice",
            "remove one",
        ),
        (
            "\"x.>\"",
            "\"$JS.API.>\"",
            "12: `outputs` in [[worker]] is invalid: `$JS.API.>` is reserved for NATS",
            "outputs = ",
        ),
        (
            "\"header:Account\"",
            "\"body:x\"",
            "14: `ordering_key` in [[worker]] is invalid",
            "ordering_key = \"header:Account\"",
        ),
        (
            "\"1m\"",
            "\"1s\"",
            "24: `backoff_max` in [worker.retry] is shorter than `backoff` (2s)",
            "backoff_max = \"2s\"",
        ),
        (
            "deterministic_failures = \"retry\"",
            "deterministic_failures = \"no\"",
            "25: `deterministic_failures` in [worker.retry] is invalid",
            "deterministic_failures = \"retry\"",
        ),
        (
            "\"EUR\"",
            "978",
            "50: `config.currency` must be text in quotes",
            "write: currency = \"978\"",
        ),
        (
            "batch = 16",
            "batch = 16\nbatch = 17",
            "20: invalid TOML: duplicate key",
            "remove: batch = 17",
        ),
        (
            "name = \"settle\"",
            "name = settle",
            "8: invalid TOML",
            "name = \"settle\"",
        ),
        (
            "[[stream]]",
            "[stream]",
            "2: `stream` must be a list of tables",
            "[[stream]]",
        ),
        (
            "[[stream]]",
            "[[stream]]\nname = \"PAYMENTS\"\nsubjects = [\"a\"]\n[[stream]]",
            "6: the stream `PAYMENTS` is declared twice",
            "keep one",
        ),
        (
            "[[stream]]",
            "[[stream]]\nname = \"A\"\nsubjects = [\"payments.x\"]\n[[stream]]",
            "7: the subject `payments.>` overlaps `payments.x` of the stream `A`",
            "narrow",
        ),
    ];
    for (line, replacement, what, hint) in cases {
        let (error, hints) = refusal(line, replacement);
        assert!(error.starts_with(&format!("oncely.toml:{what}")), "{error}");
        assert!(hints.contains(hint), "{error}\n{hints}");
        assert!(
            !error.contains('\n') && !hints.contains('\n'),
            "{error}\n{hints}"
        );
    }
}

#[test]
fn a_manifest_without_a_worker_is_refused() {
    let error = Manifest::parse("", "oncely.toml").unwrap_err();
    assert_eq!(
        error.to_string(),
        "oncely.toml:1: the manifest has no worker"
    );
}

#[test]
fn a_worker_that_feeds_itself_is_allowed_with_a_warning() {
    assert!(full().warnings().is_empty());
    let text = FULL.replace("subjects = [\"payments.requested\"]\n", "");
    let manifest = Manifest::parse(&text, "oncely.toml").unwrap();
    let [warning] = manifest.warnings() else {
        panic!("{:?}", manifest.warnings())
    };
    assert!(
        warning.starts_with("oncely.toml:11: worker `settle` may publish `payments.settled`"),
        "{warning}"
    );
}

/// The manifest of [`FULL`] in a folder with schemas, and tables of its first worker.
fn with_tables(tables: &str) -> anyhow::Result<Manifest> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.json"), r#"{"type": "object"}"#).unwrap();
    std::fs::write(folder.path().join("bad.json"), r#"{"type": "objekt"}"#).unwrap();
    std::fs::write(folder.path().join("large.json"), " ".repeat(300_000)).unwrap();
    let tables = format!("{tables}\n[worker.limits]");
    let text = FULL.replacen("[worker.limits]", &tables, 1);
    let file = folder.path().join(FILE_NAME);
    std::fs::write(&file, text).unwrap();
    Manifest::load(&file, None)
}

#[test]
fn a_schema_is_read_compiled_and_part_of_the_deployment() {
    let table = |subject: &str, file: &str| {
        format!("[[worker.schema]]\nsubject = \"{subject}\"\nfile = \"{file}\"\n")
    };
    let manifest = with_tables(&table("payments.*", "a.json")).unwrap();
    let worker = &manifest.workers[0].worker;
    let stored: Worker = serde_json::from_str(&serde_json::to_string(worker).unwrap()).unwrap();
    assert_eq!(&stored, worker);
    let check = |body: &[u8]| stored.check_schema("payments.requested", &Vec::new(), body);
    assert!(check(b"{}").is_ok() && check(b"1").is_err());
    assert!(stored.check_schema("x.y", &Vec::new(), b"1").is_ok());
    for (tables, expected) in [
        (table("payments.*", "none.json"), "none.json cannot be read"),
        (table("payments.*", "large.json"), "at most 262144"),
        (
            table("payments.*", "bad.json"),
            "bad.json is invalid: at `/type`",
        ),
        (
            table("other", "a.json"),
            "neither receives nor publishes `other`",
        ),
        (table("x.>", "a.json").repeat(2), "`x.>` has two schemas"),
        (
            "[[worker.schema]]\nsubject = \"x.>\"\n".to_owned(),
            "needs `file`",
        ),
    ] {
        let error = with_tables(&tables).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.to_string().contains("oncely.toml:"), "{error}");
    }
}

#[test]
fn cloudevents_have_a_mode_a_source_and_types() {
    let events = |lines: &str| {
        let manifest = with_tables(&format!("[worker.cloudevents]\n{lines}"))?;
        anyhow::Ok(manifest.workers[0].worker.cloudevents.clone().unwrap())
    };
    let read = events("source = \"/pay\"").unwrap();
    assert_eq!(
        (read.mode, &*read.default_type),
        (CloudEventsMode::Binary, "{subject}")
    );
    let types = "[worker.cloudevents.types]\n\"payments.settled\" = \"com.example.settled\"";
    let full =
        format!("mode = \"structured\"\nsource = \"/pay\"\ntype = \"a.{{subject}}\"\n{types}");
    let read = events(&full).unwrap();
    assert_eq!(read.mode, CloudEventsMode::Structured);
    assert_eq!(read.types["payments.settled"], "com.example.settled");
    for (lines, expected) in [
        (
            full.replace("/pay", "a b"),
            "`source` in [worker.cloudevents] is invalid",
        ),
        (
            full.replace("structured", "batch"),
            "`batch` is not one of: binary, structured",
        ),
        (
            full.replace("payments.settled", "y.z"),
            "`y.z`, which is no subject of `outputs`",
        ),
        (
            full.replace("com.example.settled", ""),
            "the type of `payments.settled` is invalid",
        ),
        ("mode = \"binary\"".to_owned(), "needs `source`"),
    ] {
        let error = events(&lines).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn grants_allow_listed_subjects_and_never_reserved_ones() {
    let mut worker = worker();
    assert!(worker.grants("payments.settled") && worker.grants("x.y.z"));
    assert!(!worker.grants("payments.requested") && !worker.grants("x"));
    assert_eq!(
        worker.grant_line("y"),
        r#"outputs = ["payments.settled", "x.>", "y"]"#
    );
    worker.outputs = vec![">".into()];
    assert!(worker.grants("a"));
    assert!(
        !worker.grants("$JS.API.STREAM.DELETE.PAYMENTS") && !worker.grants("oncely.dlq.settle")
    );
}

#[test]
fn the_ordering_key_is_read_from_a_header_or_a_token() {
    let message = Message {
        event_id: "1".into(),
        subject: "a.b.c".into(),
        headers: vec![("account".into(), "42".into())],
        body: Bytes::new(),
        origin: None,
        redriven: None,
    };
    let key = |text: &str| {
        OrderingKey::try_from(text.to_owned())
            .unwrap()
            .key_of(&message)
    };
    assert_eq!(key("header:Account"), Some("42".into()));
    assert_eq!(key("header:Missing"), None);
    assert_eq!(key("subject:2"), Some("b".into()));
    assert_eq!(key("subject:4"), None);
    for text in [
        "",
        "header:",
        "header",
        "subject:0",
        "subject:x",
        "header:a b",
    ] {
        assert!(OrderingKey::try_from(text.to_owned()).is_err(), "{text}");
    }
}

#[test]
fn migrations_are_read_by_database_in_name_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut entry = full().workers[0].clone();
    entry.migrations = Some(folder.path().join("migrations"));
    let hint = entry.migrations_for(Dialect::Sqlite).unwrap_err();
    assert!(hints(&hint)[0].starts_with("create it: mkdir -p "));

    let write = |name: &str, text: &str| {
        let path = folder.path().join("migrations").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("0002.sql", "two");
    write("0001.sql", "one");
    write("notes.md", "no");
    let names = |dialect| {
        let migrations = entry.migrations_for(dialect)?;
        anyhow::Ok(
            migrations
                .into_iter()
                .map(|migration| (migration.name, migration.sql))
                .collect::<Vec<_>>(),
        )
    };
    let both = vec![
        ("0001.sql".to_owned(), "one".to_owned()),
        ("0002.sql".to_owned(), "two".to_owned()),
    ];
    assert_eq!(names(Dialect::Sqlite).unwrap(), both);
    assert_eq!(names(Dialect::Postgres).unwrap(), both);

    write("sqlite/0001.sql", "lite");
    assert!(
        names(Dialect::Sqlite)
            .unwrap_err()
            .to_string()
            .contains("and a subfolder for one database")
    );
    std::fs::remove_file(folder.path().join("migrations/0001.sql")).unwrap();
    std::fs::remove_file(folder.path().join("migrations/0002.sql")).unwrap();
    assert_eq!(
        names(Dialect::Sqlite).unwrap(),
        [("0001.sql".to_owned(), "lite".to_owned())]
    );
    assert!(
        names(Dialect::Postgres)
            .unwrap_err()
            .to_string()
            .contains("no migrations for this database")
    );
}

#[test]
fn a_missing_manifest_is_reported_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let error = Manifest::load(folder.path(), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "there is no manifest at {}",
            folder.path().join(FILE_NAME).display()
        )
    );
    std::fs::write(folder.path().join(FILE_NAME), FULL).unwrap();
    assert_eq!(
        Manifest::load(folder.path(), None).unwrap().workers.len(),
        2
    );
}

#[test]
fn every_manifest_key_is_in_the_reference() {
    let reference = include_str!("../../../../docs/manifest.md");
    let sections: [(&str, &[&str]); 9] = [
        ("## The file", &MANIFEST_KEYS),
        ("## `[[stream]]`", &STREAM_KEYS),
        ("## `[[worker]]`", &WORKER_KEYS),
        ("## `[worker.retry]`", &RETRY_KEYS),
        ("## `[worker.limits]`", &LIMITS_KEYS),
        ("## `[[worker.route]]`", &ROUTE_KEYS),
        ("## `[worker.alarm]`", &ALARM_KEYS),
        ("## `[[worker.schema]]`", &SCHEMA_KEYS),
        ("## `[worker.cloudevents]`", &CLOUD_EVENTS_KEYS),
    ];
    for (heading, keys) in sections {
        let section = reference
            .split("\n## ")
            .find(|text| heading.ends_with(text.lines().next().unwrap_or_default()));
        let section =
            section.unwrap_or_else(|| panic!("docs/manifest.md has no heading {heading}"));
        for key in keys {
            assert!(
                section.contains(&format!("\n| `{key}` |")),
                "{heading} lacks `{key}`"
            );
        }
        let documented = section
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
        for (key, rest) in documented {
            assert!(
                keys.contains(&key),
                "{heading} has `{key}`, which is no key"
            );
            let (default, meaning) = rest.split_once(" | ").unwrap_or_default();
            assert!(
                !default.trim().is_empty() && meaning.len() > 10,
                "{heading} lacks the default or the meaning of `{key}`"
            );
        }
    }
}

#[test]
fn the_example_in_the_reference_is_a_manifest() {
    let reference = include_str!("../../../../docs/manifest.md");
    let example = reference
        .split("```toml\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    assert!(
        Manifest::parse(example, "oncely.toml")
            .unwrap()
            .warnings()
            .is_empty()
    );
}
