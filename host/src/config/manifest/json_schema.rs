//! The JSON Schema of `oncely.toml`, for editors. The keys are those of the parser, the texts those
//! of `docs/manifest.md`.

use serde_json::{Map, Value, json};

use super::cloud_events::CLOUD_EVENTS_KEYS;
use super::parse::{ALARM_KEYS, LIMITS_KEYS, RETRY_KEYS, STREAM_KEYS, WORKER_KEYS};
use super::routes::ROUTE_KEYS;
use super::schemas::SCHEMA_KEYS;

/// The reference of the manifest.
const REFERENCE: &str = include_str!("../../../../docs/manifest.md");

/// A kind of table: its heading in the reference, its keys, and those that are required.
struct Table {
    name: &'static str,
    heading: &'static str,
    keys: &'static [&'static str],
    required: &'static [&'static str],
}

const TABLES: [Table; 8] = [
    Table {
        name: "stream",
        heading: "## `[[stream]]`",
        keys: &STREAM_KEYS,
        required: &["name", "subjects"],
    },
    Table {
        name: "worker",
        heading: "## `[[worker]]`",
        keys: &WORKER_KEYS,
        required: &["name"],
    },
    Table {
        name: "retry",
        heading: "## `[worker.retry]`",
        keys: &RETRY_KEYS,
        required: &[],
    },
    Table {
        name: "limits",
        heading: "## `[worker.limits]`",
        keys: &LIMITS_KEYS,
        required: &[],
    },
    Table {
        name: "route",
        heading: "## `[[worker.route]]`",
        keys: &ROUTE_KEYS,
        required: &["path"],
    },
    Table {
        name: "alarm",
        heading: "## `[worker.alarm]`",
        keys: &ALARM_KEYS,
        required: &[],
    },
    Table {
        name: "schema",
        heading: "## `[[worker.schema]]`",
        keys: &SCHEMA_KEYS,
        required: &["subject", "file"],
    },
    Table {
        name: "cloudevents",
        heading: "## `[worker.cloudevents]`",
        keys: &CLOUD_EVENTS_KEYS,
        required: &["source"],
    },
];

/// The JSON Schema of a manifest.
pub fn json_schema() -> Value {
    let mut definitions: Map<String, Value> = TABLES
        .iter()
        .map(|table| (table.name.to_owned(), table.schema(table.required)))
        .collect();
    // An environment has only the changed keys.
    let overlay = json!({
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "stream": { "type": "array", "items": TABLES[0].schema(&["name"]) },
            "worker": { "type": "array", "items": TABLES[1].schema(&["name"]) },
        },
    });
    definitions.insert("environment".to_owned(), overlay);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "oncely.toml",
        "type": "object",
        "additionalProperties": false,
        "required": ["worker"],
        "properties": {
            "stream": { "type": "array", "items": { "$ref": "#/$defs/stream" } },
            "worker": { "type": "array", "minItems": 1, "items": { "$ref": "#/$defs/worker" } },
            "env": {
                "type": "object",
                "additionalProperties": { "$ref": "#/$defs/environment" },
            },
        },
        "$defs": definitions,
    })
}

impl Table {
    fn schema(&self, required: &[&str]) -> Value {
        let properties: Map<String, Value> = self
            .keys
            .iter()
            .map(|key| ((*key).to_owned(), self.property(key)))
            .collect();
        json!({
            "type": "object",
            "additionalProperties": false,
            "required": required,
            "properties": properties,
        })
    }

    fn property(&self, key: &str) -> Value {
        let mut property = kind(self.name, key);
        if let (Value::Object(property), Some(meaning)) = (&mut property, self.meaning(key)) {
            property.insert("description".to_owned(), Value::from(meaning));
        }
        property
    }

    /// The meaning of a key, with its default, in the reference.
    fn meaning(&self, key: &str) -> Option<String> {
        let section = REFERENCE.split(self.heading).nth(1)?;
        let section = section.split("\n## ").next()?;
        let row = section
            .lines()
            .find(|line| line.starts_with(&format!("| `{key}` |")))?;
        let mut cells = row.trim_matches('|').split(" | ").skip(1);
        let (default, meaning) = (cells.next()?.trim(), cells.next()?.trim());
        Some(format!("{meaning} Default: {default}."))
    }
}

/// The form of the value of a key.
fn kind(table: &str, key: &str) -> Value {
    let one_of = |values: &[&str]| json!({ "type": "string", "enum": values });
    let table_of = |name: &str| json!({ "$ref": format!("#/$defs/{name}") });
    match (table, key) {
        ("stream" | "worker" | "route", "subjects" | "outputs" | "state_keys" | "cache_tags") => {
            json!({ "type": "array", "items": { "type": "string" } })
        }
        (_, "methods") => {
            let methods = one_of(&super::routes::METHODS);
            json!({ "type": "array", "items": methods })
        }
        ("worker", "route" | "schema") => json!({ "type": "array", "items": table_of(key) }),
        ("worker", "retry" | "limits" | "alarm" | "cloudevents") => table_of(key),
        ("worker", "config") => {
            let secret = json!({
                "type": "object",
                "additionalProperties": false,
                "required": ["secret"],
                "properties": { "secret": { "type": "string", "pattern": "^(env|file):" } },
            });
            let value = json!({ "anyOf": [{ "type": "string" }, secret] });
            json!({ "type": "object", "additionalProperties": value })
        }
        (_, "types") => json!({ "type": "object", "additionalProperties": { "type": "string" } }),
        (_, "on_failure") => one_of(&["skip", "hold"]),
        (_, "isolation") => one_of(&["message", "batch"]),
        (_, "deterministic_failures") => one_of(&["dead-letter", "retry"]),
        (_, "idempotency_key") => one_of(&["required", "optional"]),
        (_, "store_failures") => one_of(&["answered", "all"]),
        (_, "cache_scope") => one_of(&["caller", "shared"]),
        (_, "mode") => one_of(&["binary", "structured"]),
        ("worker", "concurrency" | "batch")
        | ("retry", "attempts")
        | ("limits", "outputs" | "sql_statements" | "sql_rows" | "state_entries")
        | ("alarm", "dead_letters" | "parked" | "id_taken" | "new_failures") => {
            json!({ "type": "integer", "minimum": 0 })
        }
        _ => json!({ "type": "string" }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The manifests below a folder.
    fn manifests(folder: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                manifests(&path, found);
            } else if path.ends_with("oncely.toml") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push(text.replace("{{name}}", "orders"));
            }
        }
    }

    fn errors(text: &str) -> Vec<String> {
        let manifest: Value = toml::from_str(text).unwrap();
        let validator = jsonschema::validator_for(&json_schema()).unwrap();
        let errors = validator.iter_errors(&manifest);
        errors.map(|error| error.to_string()).collect()
    }

    #[test]
    fn every_key_has_a_description() {
        for table in TABLES {
            for key in table.keys {
                assert!(table.meaning(key).is_some(), "{}.{key}", table.name);
            }
        }
    }

    #[test]
    fn the_manifests_of_examples_and_templates_fit() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut found = vec![super::super::tests::FULL.to_owned()];
        manifests(&repository.join("examples"), &mut found);
        manifests(&repository.join("host/templates"), &mut found);
        assert!(found.len() >= 10, "{}", found.len());
        for text in found {
            assert_eq!(errors(&text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn mistakes_do_not_fit() {
        let worker = "[[worker]]\nname = \"a\"\n";
        for (text, part) in [
            ("", "worker"),
            ("[[worker]]\nstream = \"S\"", "name"),
            (&format!("{worker}nam = \"x\""), "nam"),
            (&format!("{worker}on_failure = \"wait\""), "wait"),
            (&format!("{worker}batch = \"7\""), "integer"),
            (&format!("{worker}subjects = \"x\""), "array"),
            (
                &format!("{worker}[env.production]\nworkers = []"),
                "workers",
            ),
            (
                &format!("{worker}[[env.production.worker]]\nbatch = 1"),
                "name",
            ),
        ] {
            let found = errors(text);
            assert!(
                found.iter().any(|error| error.contains(part)),
                "{text}: {found:?}"
            );
        }
        let overlay = format!("{worker}[[env.production.worker]]\nname = \"a\"\nbatch = 1");
        assert_eq!(errors(&overlay), Vec::<String>::new());
    }
}
