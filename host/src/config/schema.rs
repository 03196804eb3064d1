//! JSON Schemas of messages: compiled once for a deployment, with bounded work for each message.
//!
//! A schema without references does bounded work: its size times that of the message. Only
//! references make recursion, so each of them counts its uses and the stack below it.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use jsonschema::{Keyword, PatternOptions, ValidationError, Validator};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::model::cloud_events;
use crate::model::message::Headers;
use crate::model::subject;

/// The largest file of a schema, in bytes.
pub const SCHEMA_SIZE_MAX: usize = 256 << 10;

/// The most references that the check of one message follows.
const STEPS_MAX: u32 = 250_000;

/// The most references that are followed to name the field that does not fit.
const EXPLAIN_STEPS_MAX: u32 = 10_000;

/// The stack that references may use, in bytes. A handler's stack has 2 MiB.
const STACK_MAX: usize = 256 << 10;

/// The stack of the thread that compiles a schema, in bytes. Most of it is never touched.
const COMPILER_STACK: usize = 64 << 20;

/// The memory of a compiled pattern, in bytes.
const PATTERN_SIZE_MAX: usize = 1 << 20;

/// The longest rule and the longest value in the detail of a mismatch, in characters.
const RULE_MAX: usize = 300;
const VALUE_MAX: usize = 100;

/// The keyword that counts a reference. It is inserted in front of each.
const STEP_KEYWORD: &str = "oncely:step";

/// `[[worker.schema]]`: the JSON Schema of the messages of a subject, with the content of its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SubjectSchema {
    /// The subjects whose messages it describes, wildcards allowed.
    pub subject: String,
    /// The path of the file in the manifest, for display.
    pub file: String,
    /// The content of the file.
    pub text: String,
    #[serde(skip)]
    compiled: Compiled,
}

/// The compiled schema, shared by all clones. It follows from the text.
#[derive(Debug, Clone, Default)]
struct Compiled(Arc<OnceLock<Result<CompiledSchema, String>>>);

/// A schema whose references are counted.
#[derive(Debug)]
struct CompiledSchema {
    validator: Validator,
    /// Whether the search for the field that does not fit is bounded, too.
    is_explained: bool,
}

impl PartialEq for Compiled {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Compiled {}

impl SubjectSchema {
    /// A schema that is not compiled yet.
    pub fn new(subject: String, file: String, text: String) -> Self {
        SubjectSchema {
            subject,
            file,
            text,
            compiled: Compiled::default(),
        }
    }

    /// Whether it describes the messages of a subject.
    pub fn applies_to(&self, subject: &str) -> bool {
        subject::matches(&self.subject, subject)
    }

    /// Compiles the schema, unless it is compiled already.
    ///
    /// # Errors
    /// The defect of the schema and its place, as a clause without a full stop.
    pub fn compile(&self) -> Result<(), String> {
        self.compiled().map(drop)
    }

    fn compiled(&self) -> Result<&CompiledSchema, String> {
        let compiled = self.compiled.0.get_or_init(|| {
            // The compiler recurses along references.
            std::thread::scope(|scope| {
                let compiler = std::thread::Builder::new().stack_size(COMPILER_STACK);
                let compiled = compiler.spawn_scoped(scope, || compile(&self.text));
                let compiled =
                    compiled.map_err(|error| format!("no thread to compile it: {error}"));
                let panicked = |_| Err("its compiler panicked".to_owned());
                compiled?.join().unwrap_or_else(panicked)
            })
        });
        compiled.as_ref().map_err(Clone::clone)
    }

    /// Checks a value.
    ///
    /// # Errors
    /// The field, the rule and the value, as a sentence without a full stop.
    fn check(&self, value: &Value) -> Result<(), String> {
        let CompiledSchema {
            validator,
            is_explained,
        } = self
            .compiled()
            .map_err(|why| format!("the schema {} is invalid: {why}", self.file))?;
        let (fits, exhausted) = Work::bounded(STEPS_MAX, || validator.is_valid(value));
        if exhausted {
            return Err(format!(
                "the message is nested too deeply, or has too many parts, for the recursion of {}",
                self.file
            ));
        }
        if fits {
            return Ok(());
        }
        if *is_explained {
            let (error, exhausted) = Work::bounded(EXPLAIN_STEPS_MAX, || validator.validate(value));
            if let (Err(error), false) = (error, exhausted) {
                return Err(self.describe(&error));
            }
        }
        Err(format!("the message does not fit {}", self.file))
    }

    fn describe(&self, error: &ValidationError<'_>) -> String {
        let pointer = error.instance_path().as_str();
        let field = match pointer {
            "" => "the message".to_owned(),
            pointer => format!("`{}`", pointer.escape_debug()),
        };
        format!(
            "{field} does not fit `{}` of {}: {}; the value is {}",
            error.kind().keyword(),
            self.file,
            clipped(&error.masked_with("the value").to_string(), RULE_MAX),
            clipped(&error.instance().to_string(), VALUE_MAX),
        )
    }
}

/// Checks a message against all schemas of its subject.
///
/// # Errors
/// The field, the rule and the value, as a sentence without a full stop.
pub fn check(
    schemas: &[SubjectSchema],
    subject: &str,
    headers: &Headers,
    body: &[u8],
) -> Result<(), String> {
    let mut schemas = schemas
        .iter()
        .filter(|schema| schema.applies_to(subject))
        .peekable();
    if schemas.peek().is_none() {
        return Ok(());
    }
    let data = cloud_events::data(headers, body)?;
    schemas.try_for_each(|schema| schema.check(&data))
}

fn compile(text: &str) -> Result<CompiledSchema, String> {
    if text.len() > SCHEMA_SIZE_MAX {
        return Err(format!(
            "it has {} bytes; at most {SCHEMA_SIZE_MAX} are allowed",
            text.len()
        ));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let schema: Value =
        serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let options = jsonschema::options()
        .offline()
        .should_validate_formats(true)
        // Linear in the length of the text, for every pattern.
        .with_pattern_options(
            PatternOptions::regex()
                .size_limit(PATTERN_SIZE_MAX)
                .dfa_size_limit(PATTERN_SIZE_MAX),
        )
        .with_keyword(STEP_KEYWORD, |_, _, _| Ok(Box::new(Step)));

    // The schema as it is, for errors with its own places. Then the one with counted references.
    options.build(&schema).map_err(|error| defect(&error))?;
    let draft = Draft::of(&schema);
    let counted = count_references(schema.clone(), draft);
    let has_references = counted != schema;
    let validator = options.build(&counted).map_err(|error| defect(&error))?;
    Ok(CompiledSchema {
        validator,
        is_explained: draft.has_if || !has_references,
    })
}

/// The differences between the drafts of JSON Schema that matter to references.
#[derive(Debug, Clone, Copy)]
struct Draft {
    /// Whether a reference stands alone: its siblings are no rules. So it was before 2019-09.
    drops_siblings: bool,
    /// Whether the keyword `if` exists. Draft 7 introduced it.
    has_if: bool,
}

impl Draft {
    fn of(schema: &Value) -> Self {
        let draft = schema.get("$schema").and_then(Value::as_str);
        let is = |name: &str| draft.is_some_and(|draft| draft.contains(name));
        Draft {
            drops_siblings: is("/draft-0"),
            has_if: !is("/draft-0") || is("/draft-07"),
        }
    }
}

/// The defect of a schema, with its place.
fn defect(error: &ValidationError<'_>) -> String {
    let text = clipped(&error.to_string(), RULE_MAX);
    match error.instance_path().as_str() {
        "" => text,
        place => format!("at `{}`: {text}", place.escape_debug()),
    }
}

/// Inserts the keyword that counts in front of every reference.
fn count_references(schema: Value, draft: Draft) -> Value {
    const REFERENCES: [&str; 3] = ["$ref", "$dynamicRef", "$recursiveRef"];
    const DATA: [&str; 4] = ["const", "enum", "default", "examples"];
    const NAMED: [&str; 6] = [
        "properties",
        "patternProperties",
        "$defs",
        "definitions",
        "dependentSchemas",
        "dependencies",
    ];
    let below = |value| count_references(value, draft);
    let named = |value| match value {
        Value::Object(members) => {
            let members = members.into_iter();
            members.map(|(name, value)| (name, below(value))).collect()
        }
        other => other,
    };
    let members = match schema {
        Value::Object(members) => members,
        Value::Array(items) => return items.into_iter().map(below).collect(),
        other => return other,
    };
    let is_reference = |key: &str, value: &Value| REFERENCES.contains(&key) && value.is_string();
    let is_alone = draft.drops_siblings
        && members
            .iter()
            .any(|(key, value)| key == "$ref" && value.is_string());

    let mut counted = Map::new();
    let mut references = Vec::new();
    for (key, value) in members {
        if is_reference(&key, &value) {
            references.push(json!({ (key): value }));
        } else if NAMED.contains(&key.as_str()) {
            if !is_alone || ["$defs", "definitions"].contains(&key.as_str()) {
                counted.insert(key, named(value));
            }
        } else if DATA.contains(&key.as_str()) {
            if !is_alone {
                counted.insert(key, value);
            }
        } else if !is_alone || key == "$schema" {
            counted.insert(key, below(value));
        }
    }
    if !references.is_empty() {
        // An exhausted check skips the references. Drafts before 7 have no `if`, and there only a
        // check that stops at the first error skips them.
        let group = if draft.has_if {
            json!({ "if": { STEP_KEYWORD: true }, "then": { "allOf": references }, "else": false })
        } else {
            references.insert(0, json!({ STEP_KEYWORD: true }));
            json!({ "allOf": references })
        };
        match counted.entry("allOf").or_insert_with(|| json!([])) {
            Value::Array(groups) => groups.push(group),
            other => *other = json!([group]),
        }
    }
    Value::Object(counted)
}

/// The work that the check on this thread may still do.
#[derive(Clone, Copy)]
struct Work {
    steps: u32,
    /// An address on the stack where the check began.
    stack: usize,
    exhausted: bool,
}

thread_local! {
    static WORK: Cell<Work> = const { Cell::new(Work { steps: 0, stack: 0, exhausted: false }) };
}

impl Work {
    /// Runs a check that follows at most `steps` references. Returns whether it exceeded a bound;
    /// its result means nothing then.
    fn bounded<T>(steps: u32, check: impl FnOnce() -> T) -> (T, bool) {
        WORK.set(Work {
            steps,
            stack: stack_address(),
            exhausted: false,
        });
        let result = check();
        (result, WORK.get().exhausted)
    }

    /// Counts a reference. False when the work is exhausted.
    fn step() -> bool {
        let mut work = WORK.get();
        let depth = work.stack.abs_diff(stack_address());
        work.exhausted |= work.steps == 0 || depth > STACK_MAX;
        work.steps = work.steps.saturating_sub(1);
        WORK.set(work);
        !work.exhausted
    }
}

/// The address of a local variable.
#[inline(never)]
fn stack_address() -> usize {
    let here = 0_u8;
    std::hint::black_box(&raw const here).addr()
}

/// The keyword that counts a reference.
struct Step;

impl<'i> Keyword<'i> for Step {
    fn validate(&self, _: &'i Value) -> Result<(), ValidationError<'i>> {
        if Work::step() {
            return Ok(());
        }
        Err(ValidationError::custom("too much work"))
    }

    fn is_valid(&self, _: &'i Value) -> bool {
        Work::step()
    }
}

/// The first characters of a text, on one line.
fn clipped(text: &str, most: usize) -> String {
    let mut clipped: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(most)
        .collect();
    if clipped.len() < text.len() && text.chars().count() > most {
        clipped.push('…');
    }
    clipped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(text: &str) -> SubjectSchema {
        SubjectSchema::new("a.*".into(), "s.json".into(), text.into())
    }

    fn mismatch(text: &str, body: &str) -> String {
        check(&[schema(text)], "a.b", &Vec::new(), body.as_bytes()).unwrap_err()
    }

    fn fits(text: &str, body: &str) -> bool {
        check(&[schema(text)], "a.b", &Vec::new(), body.as_bytes()).is_ok()
    }

    const ORDER: &str = r##"{
        "type": "object", "required": ["id", "lines"],
        "properties": {
            "id": {"type": "string", "pattern": "^o-[0-9]+$"},
            "at": {"type": "string", "format": "date-time"},
            "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}}
        },
        "$defs": {"line": {"type": "object", "properties": {"qty": {"minimum": 1}}}}
    }"##;

    #[test]
    fn a_mismatch_names_field_rule_and_value() {
        assert!(fits(ORDER, r#"{"id": "o-1", "lines": [{"qty": 1}]}"#));
        for (body, expected) in [
            (
                r#"{"id": "o-1", "lines": [{"qty": 1}, {"qty": 0}]}"#,
                "`/lines/1/qty` does not fit `minimum` of s.json: \
                 the value is less than the minimum of 1; the value is 0",
            ),
            (
                r#"{"id": "o-1"}"#,
                "the message does not fit `required` of s.json: \
                 \"lines\" is a required property; the value is {\"id\":\"o-1\"}",
            ),
            ("{", "the body is not JSON: EOF while parsing an object"),
            ("", "the body is not JSON"),
            (
                r#"{"id": "o-1", "lines": [], "at": "noon"}"#,
                "`/at` does not fit `format`",
            ),
        ] {
            let why = mismatch(ORDER, body);
            assert!(why.starts_with(expected), "{why}");
        }
        let long = format!(r#"{{"id": "{}", "lines": []}}"#, "x".repeat(9_000));
        let why = mismatch(ORDER, &long);
        assert!(why.starts_with("`/id` ") && why.len() < 500, "{why}");
    }

    #[test]
    fn a_schema_applies_to_its_subjects_only() {
        assert!(check(&[schema("false")], "b.b", &Vec::new(), b"{").is_ok());
        assert!(check(&[schema("true"), schema("false")], "a.b", &Vec::new(), b"1").is_err());
    }

    #[test]
    fn an_invalid_schema_is_reported_with_its_place() {
        for (text, expected) in [
            ("{", "it is not JSON: EOF while parsing an object at line 1"),
            (
                r#"{"properties": {"a": {"type": "txt"}}}"#,
                "at `/properties/a/type`: ",
            ),
            (r#"{"pattern": "("}"#, ""),
            (r#"{"pattern": "^(?=a)b"}"#, ""),
            (r#"{"$ref": "https://example.com/a.json"}"#, ""),
            (r#"{"$ref": "other.json"}"#, ""),
            (r#"{"$ref": "file:///etc/passwd"}"#, ""),
            (r##"{"$ref": "#/$defs/none"}"##, ""),
        ] {
            let why = schema(text).compile().map(drop).unwrap_err();
            assert!(why.starts_with(expected), "{text}: {why}");
        }
        let large = format!("\"{}\"", "x".repeat(SCHEMA_SIZE_MAX));
        assert!(schema(&large).compile().is_err());
    }

    #[test]
    fn references_work_in_every_draft() {
        let old = r##"{
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$ref": "#/definitions/root", "type": "string",
            "definitions": {
                "root": {"properties": {"$ref": {"type": "string"}, "next": {"$ref": "#"}}}
            }
        }"##;
        assert!(fits(old, r#"{"next": {"next": {"$ref": "text"}}}"#));
        assert!(
            mismatch(old, r#"{"next": {"next": {"$ref": 1}}}"#).starts_with("`/next/next/$ref`")
        );
        let new = r##"{
            "$ref": "#node", "required": ["x"], "unevaluatedProperties": false,
            "$defs": {"node": {"$anchor": "node", "properties": {"x": {"const": {"$ref": "#"}}}}}
        }"##;
        assert!(fits(new, r##"{"x": {"$ref": "#"}}"##));
        assert!(mismatch(new, r#"{"y": 1}"#).starts_with("the message"));
        assert!(!fits(new, r##"{"x": {"$ref": "#"}, "y": 1}"##));
    }

    #[test]
    fn recursion_is_bounded() {
        // Every level tries both branches: two to the power of the depth.
        let double = r##"{"anyOf": [
            {"properties": {"a": {"$ref": "#"}}, "required": ["b"]},
            {"properties": {"a": {"$ref": "#"}}, "required": ["c"]},
            {"properties": {"a": {"$ref": "#"}}, "maxProperties": 0}
        ]}"##;
        let deep = |depth: usize| format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth));
        let began = std::time::Instant::now();
        mismatch(double, &deep(100));
        // A reference to itself, and a long chain of references.
        assert!(fits(r##"{"$ref": "#"}"##, "1"));
        let old = double.replacen(
            '{',
            r#"{"$schema": "http://json-schema.org/draft-04/schema#", "#,
            1,
        );
        assert!(mismatch(&old, &deep(12)).ends_with("does not fit s.json"));
        mismatch(&old, &deep(100));
        let chain: Vec<String> = (0..4_000)
            .map(|n| format!(r##""d{n}": {{"$ref": "#/$defs/d{}"}}"##, n + 1))
            .collect();
        let chain = format!(
            r##"{{"$ref": "#/$defs/d0", "$defs": {{{}, "d4000": {{"type": "string"}}}}}}"##,
            chain.join(",")
        );
        mismatch(&chain, "1");
        assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());

        // An honest tree of the greatest depth that JSON may have here.
        let tree = r##"{"type": ["object", "integer"], "properties": {"a": {"$ref": "#"}}}"##;
        assert!(fits(tree, &deep(100)));
        assert!(mismatch(tree, &deep(200)).contains("recursion limit"));
        let wide = r##"{"anyOf": [{"type": "integer"}, {"items": {"$ref": "#"}}]}"##;
        assert!(fits(wide, &format!("[1{}]", ",1".repeat(200_000))));
        let unique = format!(
            "[0{}]",
            (1..90_000).map(|n| format!(",{n}")).collect::<String>()
        );
        assert!(fits(r#"{"uniqueItems": true}"#, &unique));
        let pattern = r#"{"pattern": "^(a+)+$"}"#;
        assert!(!fits(pattern, &format!("\"{}b\"", "a".repeat(500_000))));
    }
}
