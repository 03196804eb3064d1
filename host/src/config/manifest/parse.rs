//! Parsing and checking of a manifest.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::config::manifest::environments::Environments;
use crate::config::manifest::{
    Isolation, Limits, Manifest, OnFailure, OrderingKey, Route, Source, StateKey, Stream, Worker,
    WorkerEntry, cloud_events, config_values, routes, schemas,
};
use crate::config::toml_text::{Located, Section, Text};
use crate::model::alarm::Thresholds;
use crate::model::oci::Reference;
use crate::model::redrive::REDRIVE_STREAM;
use crate::model::retry::{OnDeterministicFailure, RetryPolicy, WAIT_MAX};
use crate::model::subject::{check_pattern, covers, is_reserved, overlaps};

pub(super) const MANIFEST_KEYS: [&str; 3] = ["stream", "worker", "env"];
pub(super) const STREAM_KEYS: [&str; 3] = ["name", "subjects", "max_age"];
pub(super) const WORKER_KEYS: [&str; 22] = [
    "name",
    "crate",
    "component",
    "build",
    "stream",
    "route",
    "subjects",
    "outputs",
    "migrations",
    "ordering_key",
    "on_failure",
    "state_keys",
    "isolation",
    "concurrency",
    "batch",
    "ack_wait",
    "retry",
    "limits",
    "alarm",
    "config",
    "schema",
    "cloudevents",
];
pub(super) const ALARM_KEYS: [&str; 8] = [
    "dead_letters",
    "dead_letter_age",
    "unhandled_age",
    "unpublished_age",
    "parked",
    "id_taken",
    "new_failures",
    "clear_after",
];
pub(super) const RETRY_KEYS: [&str; 4] = [
    "attempts",
    "backoff",
    "backoff_max",
    "deterministic_failures",
];
pub(super) const LIMITS_KEYS: [&str; 13] = [
    "time",
    "memory",
    "outputs",
    "output_size",
    "outputs_size",
    "sql_statements",
    "sql_rows",
    "sql_size",
    "response_size",
    "state_size",
    "state_entries",
    "state_entries_size",
    "log_size",
];

const NAME_MAX: usize = 63;
const GIB: u64 = 1 << 30;
const YEARS: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Parses and checks a manifest and all of its environments. Returns it with `environment` applied.
pub(super) fn manifest(
    text: &str,
    file_name: &str,
    environment: Option<&str>,
) -> anyhow::Result<Manifest> {
    let text = Text {
        name: file_name,
        text,
    };
    let parsed = text.parse()?;
    let span = parsed.span();
    let mut table = parsed.into_inner();
    let environments = Environments::take(text, &mut table)?;
    let top = Section::open(
        text,
        "a manifest",
        span.clone(),
        table.clone(),
        &MANIFEST_KEYS,
    )?;
    let mut selected = checked_manifest(text, &top)?;
    environments.check_name(text, environment)?;
    for overlay in environments.all() {
        let merged = overlay.merged_into(text, &table)?;
        let top = Section::open(text, "a manifest", span.clone(), merged, &MANIFEST_KEYS)?;
        let manifest = checked_manifest(text, &top)
            .with_context(|| format!("check the environment `{}`", overlay.name))?;
        if environment == Some(overlay.name.as_str()) {
            selected = manifest;
        }
    }
    Ok(selected)
}

fn checked_manifest(text: Text<'_>, top: &Section<'_>) -> anyhow::Result<Manifest> {
    let streams = streams(text, top)?;
    let folder = Path::new(text.name).parent().unwrap_or(Path::new(""));
    let mut manifest = Manifest {
        streams,
        workers: Vec::new(),
        warnings: Vec::new(),
    };
    for section in top.tables("worker", "[[worker]]", &WORKER_KEYS)? {
        let entry = worker(text, &section, folder, &manifest)?;
        manifest.warnings.extend(loop_warning(
            text,
            &section,
            &entry.worker,
            &manifest.streams,
        ));
        manifest.workers.push(entry);
    }
    if manifest.workers.is_empty() {
        return Err(text.refuse(
            &(0..0),
            "the manifest has no worker",
            "add one with the line: [[worker]]",
        ));
    }
    Ok(manifest)
}

fn streams(text: Text<'_>, top: &Section<'_>) -> anyhow::Result<Vec<Stream>> {
    let mut streams: Vec<Stream> = Vec::new();
    for section in top.tables("stream", "[[stream]]", &STREAM_KEYS)? {
        let name = required(&section, "name", "\"PAYMENTS\"", check_stream_name)?;
        if streams.iter().any(|stream| stream.name == name.value) {
            let what = format!("the stream `{}` is declared twice", name.value);
            return Err(text.refuse(
                &name.span,
                what,
                "keep one [[stream]] of that name, with all its subjects",
            ));
        }
        let subjects = section.texts("subjects", "[\"payments.>\"]", check_own_pattern)?;
        if subjects.is_empty() {
            return Err(section.missing("subjects", "[\"payments.>\"]"));
        }
        let taken = streams.iter().flat_map(|stream| {
            stream
                .subjects
                .iter()
                .map(|taken| (taken, stream.name.as_str()))
        });
        check_overlap(text, &subjects, taken.collect())?;
        let subjects = values(subjects);
        let max_age = section.duration("max_age", "\"7d\"", Duration::from_secs(1)..=YEARS)?;
        streams.push(Stream {
            name: name.value,
            subjects,
            max_age,
        });
    }
    Ok(streams)
}

fn worker(
    text: Text<'_>,
    section: &Section<'_>,
    folder: &Path,
    manifest: &Manifest,
) -> anyhow::Result<WorkerEntry> {
    let name = required(section, "name", "\"settle\"", check_worker_name)?;
    if manifest
        .workers
        .iter()
        .any(|entry| entry.worker.name == name.value)
    {
        let what = format!("there are two workers named `{}`", name.value);
        return Err(text.refuse(
            &name.span,
            what,
            format!("rename one of them: name = \"{}-2\"", name.value),
        ));
    }

    // Source, and stream or routes.
    let source = source(text, section, folder)?;
    let example = manifest
        .streams
        .first()
        .map_or("PAYMENTS", |stream| stream.name.as_str());
    let routes = routes::routes(text, section)?;
    let stream = worker_stream(text, section, example, &routes)?;
    let subjects = match &stream {
        Some(stream) => subjects(text, section, stream, &manifest.streams)?,
        None => Vec::new(),
    };

    // Settings with their defaults.
    let lanes = if routes.is_empty() { 4 } else { 16 };
    let key_example = "\"header:Account\"";
    let check_key = |key: &str| OrderingKey::try_from(key.to_owned()).map(|_| ());
    let ordering_key = section.text("ordering_key", key_example, check_key)?;
    let ack_wait = Duration::from_secs(1)..=Duration::from_secs(60 * 60);
    let outputs = values(section.texts("outputs", "[\"payments.settled\"]", check_own_pattern)?);
    let worker = Worker {
        name: name.value,
        component: None,
        stream: stream.map(|stream| stream.value),
        routes,
        subjects,
        on_failure: on_failure(text, section, ordering_key.is_some())?,
        ordering_key: ordering_key.and_then(|key| OrderingKey::try_from(key.value).ok()),
        state_keys: state_keys(section)?,
        isolation: isolation(section)?,
        concurrency: section.count("concurrency", "4", 1..=256)?.unwrap_or(lanes),
        batch: section.count("batch", "100", 1..=1000)?.unwrap_or(100),
        ack_wait: section
            .duration("ack_wait", "\"10s\"", ack_wait)?
            .unwrap_or(Duration::from_secs(10)),
        retry: retry(section)?,
        limits: limits(section)?,
        alarm: alarm(section)?,
        config: config_values::parse(text, section)?,
        schemas: schemas::schemas(text, section, folder)?,
        cloudevents: cloud_events::cloud_events(text, section, &outputs)?,
        outputs,
    };
    schemas::check_subjects(text, section, &worker, &manifest.streams)?;
    let migrations = section
        .text("migrations", "\"migrations\"", check_path)?
        .map(|path| folder.join(path.value));
    Ok(WorkerEntry {
        worker,
        source,
        migrations,
        folder: folder.to_owned(),
    })
}

/// The stream of a worker that handles messages; `None` for one that answers requests. For the
/// latter, settings about messages are errors.
fn worker_stream(
    text: Text<'_>,
    section: &Section<'_>,
    example: &str,
    routes: &[Route],
) -> anyhow::Result<Option<Located<String>>> {
    let example = format!("{example:?}");
    if routes.is_empty() {
        let stream = section.text("stream", &example, check_stream_name)?;
        let hint = format!(
            "add the line: stream = {example}, or for HTTP requests: [[worker.route]] with a path"
        );
        return stream.map(Some).ok_or_else(|| {
            text.refuse(
                &section.span(),
                "[[worker]] needs a `stream` or a route",
                &hint,
            )
        });
    }
    let message_keys = [
        "stream",
        "subjects",
        "ordering_key",
        "on_failure",
        "state_keys",
        "isolation",
        "ack_wait",
        "retry",
    ];
    match message_keys.iter().find(|key| section.has(key)) {
        Some(key) => {
            let what = format!(
                "`{key}` is for workers that handle messages, but this one answers requests"
            );
            Err(text.refuse(
                &section.span_of(key),
                what,
                "remove it, or split the worker into two",
            ))
        }
        None => Ok(None),
    }
}

fn on_failure(text: Text<'_>, section: &Section<'_>, has_key: bool) -> anyhow::Result<OnFailure> {
    let check = one_of(&["skip", "hold"]);
    let Some(found) = section.text("on_failure", "\"hold\"", check)? else {
        return Ok(OnFailure::Skip);
    };
    if found.value == "skip" {
        return Ok(OnFailure::Skip);
    }
    if !has_key {
        let what =
            "`on_failure` is `hold`, but without an ordering key no message waits for another";
        return Err(text.refuse(
            &found.span,
            what,
            "set the source of the key: ordering_key = \"header:Account\"",
        ));
    }
    Ok(OnFailure::Hold)
}

fn state_keys(section: &Section<'_>) -> anyhow::Result<Vec<StateKey>> {
    let check = |key: &str| StateKey::try_from(key.to_owned()).map(|_| ());
    let found = section.texts("state_keys", "[\"account/{header:Account}\"]", check)?;
    Ok(found
        .into_iter()
        .filter_map(|key| StateKey::try_from(key.value).ok())
        .collect())
}

fn isolation(section: &Section<'_>) -> anyhow::Result<Isolation> {
    let found = section.text("isolation", "\"message\"", one_of(&["message", "batch"]))?;
    Ok(match found {
        Some(found) if found.value == "batch" => Isolation::Batch,
        _ => Isolation::Message,
    })
}

/// A check that accepts one of a few words.
pub(super) fn one_of(words: &'static [&'static str]) -> impl Fn(&str) -> Result<(), String> {
    move |word| {
        if words.contains(&word) {
            return Ok(());
        }
        Err(format!(
            "`{}` is not one of: {}",
            word.escape_debug(),
            words.join(", ")
        ))
    }
}

fn source(text: Text<'_>, section: &Section<'_>, folder: &Path) -> anyhow::Result<Source> {
    let crate_path = section.text("crate", "\".\"", check_path)?;
    let component = section.text("component", "\"worker.wasm\"", check_path)?;
    let build = section.text("build", "\"make worker.wasm\"", check_path)?;
    match (crate_path, component, build) {
        (Some(_), None, Some(build)) => {
            let hint =
                "remove it, or replace `crate` by the built file: component = \"worker.wasm\"";
            Err(text.refuse(
                &build.span,
                "`build` is only for a `component`; Oncely compiles a `crate` itself",
                hint,
            ))
        }
        (Some(path), None, None) => Ok(Source::Crate(folder.join(path.value))),
        (None, Some(component), build) if Reference::is_reference(&component.value) => {
            oci_source(text, &component, build.as_ref())
        }
        (None, Some(path), build) => Ok(Source::Component {
            path: folder.join(path.value),
            build: build.map(|build| build.value),
        }),
        (Some(_), Some(component), _) => {
            let hint = "keep `crate` for Oncely to compile the worker, \
                        or `component` for one built elsewhere";
            Err(text.refuse(
                &component.span,
                "[[worker]] has both `crate` and `component`",
                hint,
            ))
        }
        (None, None, _) => {
            let hint =
                "add the line: crate = \".\"   (a Rust crate), or: component = \"worker.wasm\"";
            Err(text.refuse(
                &section.span(),
                "[[worker]] needs `crate` or `component`",
                hint,
            ))
        }
    }
}

/// The reference of a component in a registry.
fn oci_source(
    text: Text<'_>,
    component: &Located<String>,
    build: Option<&Located<String>>,
) -> anyhow::Result<Source> {
    if let Some(build) = build {
        return Err(text.refuse(
            &build.span,
            "`build` is for a file, but `component` is in a registry",
            "remove it, or name the built file: component = \"worker.wasm\"",
        ));
    }
    let reference = Reference::try_from(component.value.clone()).map_err(|why| {
        let hint = "for example: component = \"oci://registry.example.com/team/worker:1.2\", \
                    or with a digest: …/worker@sha256:…";
        text.refuse(&component.span, format!("`component` {why}"), hint)
    })?;
    Ok(Source::Oci(reference))
}

/// The subjects that a worker consumes. Each must be within its stream, if the manifest declares
/// that stream.
fn subjects(
    text: Text<'_>,
    section: &Section<'_>,
    stream: &Located<String>,
    streams: &[Stream],
) -> anyhow::Result<Vec<String>> {
    let found = section.texts("subjects", "[\"payments.requested\"]", check_pattern)?;
    check_overlap(text, &found, Vec::new())?;
    let Some(declared) = streams
        .iter()
        .find(|declared| declared.name == stream.value)
    else {
        check_stream_spelling(text, stream, streams)?;
        return Ok(values(found));
    };
    for subject in &found {
        if !declared
            .subjects
            .iter()
            .any(|pattern| covers(pattern, &subject.value))
        {
            let what = format!(
                "the stream `{}` does not capture the subject `{}`",
                declared.name, subject.value
            );
            let all = declared
                .subjects
                .iter()
                .chain([&subject.value])
                .map(|subject| format!("{subject:?}"));
            let hint = format!(
                "add it to [[stream]]: subjects = [{}]",
                all.collect::<Vec<_>>().join(", ")
            );
            return Err(text.refuse(&subject.span, what, hint));
        }
    }
    Ok(values(found))
}

/// A stream that is not declared may exist, but a name that differs from a declared one only in
/// case is a mistake.
fn check_stream_spelling(
    text: Text<'_>,
    stream: &Located<String>,
    streams: &[Stream],
) -> anyhow::Result<()> {
    match streams
        .iter()
        .find(|declared| declared.name.eq_ignore_ascii_case(&stream.value))
    {
        Some(near) => {
            let what = format!("no [[stream]] is named `{}`", stream.value);
            Err(text.refuse(
                &stream.span,
                what,
                format!("did you mean: stream = \"{}\"", near.name),
            ))
        }
        None => Ok(()),
    }
}

fn retry(section: &Section<'_>) -> anyhow::Result<RetryPolicy> {
    let default = RetryPolicy::default();
    let Some(retry) = section.table("retry", "[worker.retry]", &RETRY_KEYS)? else {
        return Ok(default);
    };
    let range = Duration::from_millis(1)..=WAIT_MAX;
    let policy = RetryPolicy {
        attempts: retry
            .count("attempts", "5", 1..=1000)?
            .unwrap_or(default.attempts),
        backoff: retry
            .duration("backoff", "\"1s\"", range.clone())?
            .unwrap_or(default.backoff),
        backoff_max: retry
            .duration("backoff_max", "\"5m\"", range)?
            .unwrap_or(default.backoff_max),
        deterministic_failures: match retry.text(
            "deterministic_failures",
            "\"retry\"",
            one_of(&["dead-letter", "retry"]),
        )? {
            Some(found) if found.value == "retry" => OnDeterministicFailure::Retry,
            _ => OnDeterministicFailure::DeadLetter,
        },
    };
    if policy.backoff > policy.backoff_max {
        let backoff = crate::model::units::format_duration(policy.backoff);
        let what = format!("is shorter than `backoff` ({backoff})");
        return Err(retry.invalid(
            &retry.span_of("backoff_max"),
            "backoff_max",
            &what,
            &format!("{backoff:?}"),
        ));
    }
    Ok(policy)
}

fn limits(section: &Section<'_>) -> anyhow::Result<Limits> {
    let default = Limits::default();
    let Some(limits) = section.table("limits", "[worker.limits]", &LIMITS_KEYS)? else {
        return Ok(default);
    };
    let time = Duration::from_millis(1)..=Duration::from_secs(60 * 60);
    let size = |key: &str, example: &str, range: RangeInclusive<u64>, default: u64| {
        limits
            .size(key, example, range)
            .map(|size| size.unwrap_or(default))
    };
    let count = |key: &str, example: &str, range: RangeInclusive<u32>, default: u32| {
        limits
            .count(key, example, range)
            .map(|count| count.unwrap_or(default))
    };
    Ok(Limits {
        time: limits
            .duration("time", "\"10s\"", time)?
            .unwrap_or(default.time),
        memory: size("memory", "\"64MiB\"", 1 << 20..=4 * GIB, default.memory)?,
        outputs: count("outputs", "100", 0..=100_000, default.outputs)?,
        output_size: size("output_size", "\"1MiB\"", 1..=64 << 20, default.output_size)?,
        outputs_size: size("outputs_size", "\"4MiB\"", 1..=GIB, default.outputs_size)?,
        sql_statements: count(
            "sql_statements",
            "1000",
            0..=1_000_000,
            default.sql_statements,
        )?,
        sql_rows: count("sql_rows", "10000", 0..=10_000_000, default.sql_rows)?,
        sql_size: size("sql_size", "\"16MiB\"", 1..=GIB, default.sql_size)?,
        response_size: size(
            "response_size",
            "\"4MiB\"",
            1..=64 << 20,
            default.response_size,
        )?,
        state_size: size("state_size", "\"1MiB\"", 1..=64 << 20, default.state_size)?,
        state_entries: count(
            "state_entries",
            "10000",
            0..=1_000_000,
            default.state_entries,
        )?,
        state_entries_size: size(
            "state_entries_size",
            "\"16MiB\"",
            1..=GIB,
            default.state_entries_size,
        )?,
        log_size: size("log_size", "\"64KiB\"", 0..=64 << 20, default.log_size)?,
    })
}

fn alarm(section: &Section<'_>) -> anyhow::Result<Thresholds> {
    let default = Thresholds::default();
    let Some(alarm) = section.table("alarm", "[worker.alarm]", &ALARM_KEYS)? else {
        return Ok(default);
    };
    let count = |key: &str, example: &str, default: u32| {
        alarm
            .count(key, example, 0..=1_000_000_000)
            .map(|count| count.unwrap_or(default))
    };
    let age = |key: &str, example: &str, default: Duration| {
        alarm
            .duration(key, example, Duration::ZERO..=YEARS)
            .map(|age| age.unwrap_or(default))
    };
    Ok(Thresholds {
        dead_letters: count("dead_letters", "100", default.dead_letters)?,
        dead_letter_age: age("dead_letter_age", "\"24h\"", default.dead_letter_age)?,
        unhandled_age: age("unhandled_age", "\"5m\"", default.unhandled_age)?,
        unpublished_age: age("unpublished_age", "\"1m\"", default.unpublished_age)?,
        parked: count("parked", "1", default.parked)?,
        id_taken: count("id_taken", "1", default.id_taken)?,
        new_failures: count("new_failures", "20", default.new_failures)?,
        clear_after: age("clear_after", "\"1m\"", default.clear_after)?,
    })
}

/// Warns about a worker that may publish to subjects it consumes, as its messages can loop forever.
fn loop_warning(
    text: Text<'_>,
    section: &Section<'_>,
    worker: &Worker,
    streams: &[Stream],
) -> Option<String> {
    let stream_subjects = streams
        .iter()
        .find(|stream| Some(&stream.name) == worker.stream.as_ref())
        .map(|stream| &stream.subjects);
    let taken = if worker.subjects.is_empty() {
        stream_subjects?
    } else {
        &worker.subjects
    };
    let feeds = |output: &&String| taken.iter().any(|subject| overlaps(subject, output));
    let output = worker.outputs.iter().find(feeds)?;
    Some(format!(
        "{}: worker `{}` may publish `{output}`, which it also consumes, \
         so a message could loop forever; \
         narrow its `subjects` or `outputs` if this is not intended",
        text.location(&section.span_of("outputs")),
        worker.name
    ))
}

/// Refuses overlapping subjects, as JetStream does within a stream, between streams and within a
/// consumer's filter.
fn check_overlap(
    text: Text<'_>,
    found: &[Located<String>],
    taken: Vec<(&String, &str)>,
) -> anyhow::Result<()> {
    for (index, subject) in found.iter().enumerate() {
        let hint = format!("narrow or remove one of the two: {:?}", subject.value);
        if let Some(earlier) = found
            .iter()
            .take(index)
            .find(|earlier| overlaps(&earlier.value, &subject.value))
        {
            let what = format!(
                "the subjects `{}` and `{}` overlap",
                earlier.value, subject.value
            );
            return Err(text.refuse(&subject.span, what, hint));
        }
        if let Some((other, stream)) = taken
            .iter()
            .find(|(other, _)| overlaps(other, &subject.value))
        {
            let what = format!(
                "the subject `{}` overlaps `{other}` of the stream `{stream}`",
                subject.value
            );
            return Err(text.refuse(&subject.span, what, hint));
        }
    }
    Ok(())
}

pub(super) fn required(
    section: &Section<'_>,
    key: &str,
    example: &str,
    check: impl Fn(&str) -> Result<(), String>,
) -> anyhow::Result<Located<String>> {
    section
        .text(key, example, check)?
        .ok_or_else(|| section.missing(key, example))
}

fn values(found: Vec<Located<String>>) -> Vec<String> {
    found.into_iter().map(|found| found.value).collect()
}

/// Checks the name of a worker.
///
/// # Errors
/// The name, and which characters it may have.
pub fn check_worker_name(name: &str) -> Result<(), String> {
    let fits = (1..=NAME_MAX).contains(&name.len());
    if fits
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    {
        return Ok(());
    }
    Err(format!(
        "`{}` is not 1 to {NAME_MAX} characters of a-z, 0-9 and -",
        name.escape_debug()
    ))
}

fn check_stream_name(name: &str) -> Result<(), String> {
    if name == REDRIVE_STREAM {
        return Err(format!(
            "`{name}` is reserved for the host, which redrives dead letters on it"
        ));
    }
    let fits = (1..=255).contains(&name.len());
    if fits
        && name
            .chars()
            .all(|c| c.is_ascii_graphic() && !".*>/\\".contains(c))
    {
        return Ok(());
    }
    let name = name.escape_debug();
    Err(format!(
        "`{name}` is not a valid stream name: \
         printable ASCII without space, `.`, `*`, `>`, `/` and `\\`"
    ))
}

/// Checks a subject pattern that is reserved neither by the broker nor by the platform.
pub(super) fn check_own_pattern(pattern: &str) -> Result<(), String> {
    check_pattern(pattern)?;
    if is_reserved(pattern) {
        Err(format!("`{pattern}` is reserved for NATS or Oncely"))
    } else {
        Ok(())
    }
}

pub(super) fn check_path(path: &str) -> Result<(), String> {
    if path.trim().is_empty() {
        Err("it is empty".to_owned())
    } else {
        Ok(())
    }
}
