//! `[[worker.schema]]`: reads and compiles the JSON Schemas of a worker.

use std::path::Path;

use crate::config::manifest::parse::{check_own_pattern, check_path, required};
use crate::config::manifest::{Stream, Worker};
use crate::config::schema::{SCHEMA_SIZE_MAX, SubjectSchema};
use crate::config::toml_text::{Section, Text};
use crate::model::subject::overlaps;

pub(super) const SCHEMA_KEYS: [&str; 2] = ["subject", "file"];

/// The most schemas of one worker. All of them are a part of its deployment.
const SCHEMAS_MAX: usize = 32;

/// Reads the schemas of a worker. Paths start at `folder`.
pub(super) fn schemas(
    text: Text<'_>,
    section: &Section<'_>,
    folder: &Path,
) -> anyhow::Result<Vec<SubjectSchema>> {
    let mut schemas: Vec<SubjectSchema> = Vec::new();
    for table in section.tables("schema", "[[worker.schema]]", &SCHEMA_KEYS)? {
        let subject = required(&table, "subject", "\"orders.new\"", check_own_pattern)?;
        let file = required(&table, "file", "\"schemas/order.json\"", check_path)?;
        if schemas.iter().any(|schema| schema.subject == subject.value) {
            let what = format!("the subject `{}` has two schemas", subject.value);
            return Err(text.refuse(&subject.span, what, "keep one, with all rules in `allOf`"));
        }
        if schemas.len() == SCHEMAS_MAX {
            let what = format!("a worker has at most {SCHEMAS_MAX} schemas");
            return Err(text.refuse(&table.span(), what, "use a pattern such as `orders.*`"));
        }
        let path = folder.join(&file.value);
        let content = read(&path).map_err(|why| {
            let what = format!("the schema {} cannot be read: {why}", path.display());
            text.refuse(
                &file.span,
                what,
                "name a JSON Schema, relative to this file",
            )
        })?;
        let schema = SubjectSchema::new(subject.value, file.value, content);
        schema.compile().map_err(|why| {
            let what = format!("the schema {} is invalid: {why}", path.display());
            let hint = "correct the schema; references start with `#`, and patterns have no \
                        lookaround or backreferences, see docs/manifest.md";
            text.refuse(&file.span, what, hint)
        })?;
        schemas.push(schema);
    }
    Ok(schemas)
}

/// Refuses a schema of a subject that the worker neither receives nor publishes.
pub(super) fn check_subjects(
    text: Text<'_>,
    section: &Section<'_>,
    worker: &Worker,
    streams: &[Stream],
) -> anyhow::Result<()> {
    let declared = streams
        .iter()
        .find(|stream| Some(&stream.name) == worker.stream.as_ref());
    let received = match (worker.subjects.is_empty(), declared) {
        (false, _) => worker.subjects.as_slice(),
        (true, Some(stream)) => stream.subjects.as_slice(),
        // The subjects of a stream that the manifest does not declare are unknown.
        (true, None) if worker.stream.is_some() => return Ok(()),
        (true, None) => &[],
    };
    let mut known = received.iter().chain(&worker.outputs);
    for schema in &worker.schemas {
        if !known.clone().any(|known| overlaps(known, &schema.subject)) {
            let what = format!(
                "worker `{}` neither receives nor publishes `{}`, which has a schema",
                worker.name, schema.subject
            );
            let hint = match known.next() {
                Some(known) => format!("did you mean: subject = {known:?}"),
                None => "remove the schema".to_owned(),
            };
            return Err(text.refuse(&section.span_of("schema"), what, hint));
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if size.len() > SCHEMA_SIZE_MAX as u64 {
        return Err(format!(
            "it has {} bytes; at most {SCHEMA_SIZE_MAX} are allowed",
            size.len()
        ));
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}
