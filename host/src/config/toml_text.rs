//! Strict TOML parsing: each error is one sentence with file and line, and has a hint with the fix.

use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use anyhow::anyhow;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::model::hint::WithHint;
use crate::model::units;

/// A TOML text with its display name.
#[derive(Clone, Copy)]
pub struct Text<'t> {
    pub name: &'t str,
    pub text: &'t str,
}

/// A value with its position in the text.
#[derive(Debug, Clone)]
pub struct Located<T> {
    pub value: T,
    pub span: Range<usize>,
}

/// One table of a text, with the keys it may have.
pub struct Section<'t> {
    text: Text<'t>,
    /// Its name in errors, such as `[[worker]]`.
    title: &'static str,
    span: Range<usize>,
    table: DeTable<'t>,
}

/// A value of a table with any keys.
pub enum Pair<'t> {
    Text(String),
    Table(Section<'t>),
}

impl<'t> Text<'t> {
    /// Parses the text. `known` are the allowed keys of its top level.
    pub fn section(self, title: &'static str, known: &[&str]) -> anyhow::Result<Section<'t>> {
        let parsed = self.parse()?;
        Section::open(self, title, parsed.span(), parsed.into_inner(), known)
    }

    /// Parses the text without a check of its keys.
    pub fn parse(self) -> anyhow::Result<Spanned<DeTable<'t>>> {
        DeTable::parse(self.text).map_err(|error| {
            let what = error.message().trim().replace('\n', "; ");
            self.refuse(
                &error.span().unwrap_or_default(),
                format!("invalid TOML: {what}"),
                self.toml_hint(&error),
            )
        })
    }

    /// An error at `span`, with a hint.
    pub fn refuse(
        &self,
        span: &Range<usize>,
        what: impl Display,
        hint: impl Into<String>,
    ) -> anyhow::Error {
        anyhow!("{}: {what}", self.location(span)).hint(hint)
    }

    /// `file:line`, counted from 1.
    pub fn location(&self, span: &Range<usize>) -> String {
        format!("{}:{}", self.name, self.line_number(span))
    }

    fn line_number(&self, span: &Range<usize>) -> usize {
        self.text
            .bytes()
            .take(span.start)
            .filter(|byte| *byte == b'\n')
            .count()
            + 1
    }

    fn line(&self, span: &Range<usize>) -> &'t str {
        self.text
            .lines()
            .nth(self.line_number(span) - 1)
            .unwrap_or_default()
            .trim()
    }

    fn toml_hint(&self, error: &toml::de::Error) -> String {
        let line = self.line(&error.span().unwrap_or_default());
        if error.message().contains("duplicate key") {
            return format!("keep one of the two lines, and remove: {line}");
        }
        match line.split_once('=') {
            Some((key, value))
                if error.message().contains("quoted") || error.message().contains("string") =>
            {
                format!(
                    "put text in quotes: {} = \"{}\"",
                    key.trim(),
                    value.trim().trim_matches(['"', '\''])
                )
            }
            _ => format!(
                "write `key = value` with text in quotes, or a [table]; the line is: {line}"
            ),
        }
    }
}

impl<'t> Section<'t> {
    /// A section of a table that was parsed before. `known` are its allowed keys.
    pub fn open(
        text: Text<'t>,
        title: &'static str,
        span: Range<usize>,
        table: DeTable<'t>,
        known: &[&str],
    ) -> anyhow::Result<Self> {
        let unknown = table
            .keys()
            .filter(|key| !known.contains(&key.get_ref().as_ref()));
        if let Some(key) = unknown.min_by_key(|key| key.span().start) {
            let name = key.get_ref();
            let hint = match closest_key(name, known) {
                Some(near) => format!(
                    "did you mean: {}",
                    text.line(&key.span()).replacen(name.as_ref(), near, 1)
                ),
                None => format!("remove it; the keys here are: {}", known.join(", ")),
            };
            return Err(text.refuse(&key.span(), format!("{title} has no key `{name}`"), hint));
        }
        Ok(Section {
            text,
            title,
            span,
            table,
        })
    }

    /// The position of the section.
    pub fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// Whether the section has the key.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The position of the key, or of the section if it lacks the key.
    pub fn span_of(&self, key: &str) -> Range<usize> {
        self.table
            .get_key_value(key)
            .map_or_else(|| self.span(), |(name, _)| name.span())
    }

    /// The error for a missing key.
    pub fn missing(&self, key: &str, example: &str) -> anyhow::Error {
        self.text.refuse(
            &self.span,
            format!("{} needs `{key}`", self.title),
            format!("add the line: {key} = {example}"),
        )
    }

    /// A text that `check` accepts. The error of `check` is a clause without a full stop.
    pub fn text(
        &self,
        key: &str,
        example: &str,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> anyhow::Result<Option<Located<String>>> {
        let Some(value) = self.table.get(key) else {
            return Ok(None);
        };
        self.checked_text(value, key, example, &check).map(Some)
    }

    /// A list of different texts, each of which `check` accepts.
    pub fn texts(
        &self,
        key: &str,
        example: &str,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> anyhow::Result<Vec<Located<String>>> {
        let Some(value) = self.table.get(key) else {
            return Ok(Vec::new());
        };
        let DeValue::Array(items) = value.get_ref() else {
            return Err(self.wrong_type(value, key, "a list of texts", example));
        };
        let mut texts: Vec<Located<String>> = Vec::new();
        for item in items.iter() {
            let found = self.checked_text(item, key, example, &check)?;
            if texts.iter().any(|earlier| earlier.value == found.value) {
                let what = format!("`{key}` lists `{}` twice", found.value);
                return Err(self.text.refuse(&found.span, what, "remove one of the two"));
            }
            texts.push(found);
        }
        Ok(texts)
    }

    /// A whole number within `range`.
    pub fn count(
        &self,
        key: &str,
        example: &str,
        range: RangeInclusive<u32>,
    ) -> anyhow::Result<Option<u32>> {
        let Some(value) = self.table.get(key) else {
            return Ok(None);
        };
        let DeValue::Integer(integer) = value.get_ref() else {
            return Err(self.wrong_type(value, key, "a whole number", example));
        };
        let count = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
        match count
            .and_then(|count| u32::try_from(count).ok())
            .filter(|count| range.contains(count))
        {
            Some(count) => Ok(Some(count)),
            None => {
                let what = format!("must be between {} and {}", range.start(), range.end());
                Err(self.wrong_value(value, key, &what, example))
            }
        }
    }

    /// A duration within `range`.
    pub fn duration(
        &self,
        key: &str,
        example: &str,
        range: RangeInclusive<Duration>,
    ) -> anyhow::Result<Option<Duration>> {
        self.measure(
            key,
            example,
            "a duration",
            units::parse_duration,
            units::format_duration,
            range,
        )
    }

    /// A size in bytes within `range`.
    pub fn size(
        &self,
        key: &str,
        example: &str,
        range: RangeInclusive<u64>,
    ) -> anyhow::Result<Option<u64>> {
        self.measure(
            key,
            example,
            "a size",
            units::parse_size,
            units::format_size,
            range,
        )
    }

    fn measure<T: PartialOrd + Copy>(
        &self,
        key: &str,
        example: &str,
        kind: &str,
        parse: impl Fn(&str) -> Result<T, String>,
        show: impl Fn(T) -> String,
        range: RangeInclusive<T>,
    ) -> anyhow::Result<Option<T>> {
        let Some(value) = self.table.get(key) else {
            return Ok(None);
        };
        let DeValue::String(text) = value.get_ref() else {
            return Err(self.wrong_type(value, key, &format!("{kind} in quotes"), example));
        };
        let measure = parse(text)
            .map_err(|why| self.wrong_value(value, key, &format!("is invalid: {why}"), example))?;
        if !range.contains(&measure) {
            let what = format!(
                "must be between {} and {}",
                show(*range.start()),
                show(*range.end())
            );
            return Err(self.wrong_value(value, key, &what, example));
        }
        Ok(Some(measure))
    }

    /// A table with any keys, such as `[worker.config]`. Each value is a text, or a table with the
    /// keys `known`.
    pub fn pairs(
        &self,
        key: &str,
        title: &'static str,
        known: &[&str],
    ) -> anyhow::Result<Vec<(String, Pair<'t>)>> {
        let Some(value) = self.table.get(key) else {
            return Ok(Vec::new());
        };
        let DeValue::Table(table) = value.get_ref() else {
            return Err(self.wrong_type(value, key, "a table", title));
        };
        let pair = |(name, value): (&Spanned<_>, &Spanned<DeValue<'t>>)| {
            let name: &str = AsRef::as_ref(name.get_ref());
            let pair = match value.get_ref() {
                DeValue::String(text) => Pair::Text(text.to_string()),
                DeValue::Table(table) => {
                    let table = table.clone();
                    Pair::Table(Section::open(self.text, title, value.span(), table, known)?)
                }
                other => {
                    let hint = match scalar_text(other) {
                        Some(text) => format!("write: {name} = \"{text}\""),
                        None => format!("write: {name} = \"…\""),
                    };
                    return Err(self.text.refuse(
                        &value.span(),
                        format!("`{key}.{name}` must be text in quotes"),
                        hint,
                    ));
                }
            };
            Ok((name.to_owned(), pair))
        };
        table.iter().map(pair).collect()
    }

    /// The table under a key.
    pub fn table(
        &self,
        key: &str,
        title: &'static str,
        known: &[&str],
    ) -> anyhow::Result<Option<Section<'t>>> {
        let Some((name, value)) = self.table.get_key_value(key) else {
            return Ok(None);
        };
        let DeValue::Table(table) = value.get_ref() else {
            return Err(self.wrong_type(value, key, "a table", title));
        };
        Section::open(self.text, title, name.span(), table.clone(), known).map(Some)
    }

    /// The tables under a key, in the order of the text.
    pub fn tables(
        &self,
        key: &str,
        title: &'static str,
        known: &[&str],
    ) -> anyhow::Result<Vec<Section<'t>>> {
        let Some(value) = self.table.get(key) else {
            return Ok(Vec::new());
        };
        let refuse = || {
            let what = format!("`{key}` must be a list of tables");
            self.text.refuse(
                &self.span_of(key),
                what,
                format!("write its heading with double brackets: {title}"),
            )
        };
        let items: &DeArray<'t> = value.get_ref().as_array().ok_or_else(refuse)?;
        let open = |item: &Spanned<DeValue<'t>>| match item.get_ref() {
            DeValue::Table(table) => {
                Section::open(self.text, title, item.span(), table.clone(), known)
            }
            _ => Err(refuse()),
        };
        items.iter().map(open).collect()
    }

    /// A single value as text: a quoted text, a number or a boolean.
    pub fn scalar(&self, key: &str, example: &str) -> anyhow::Result<Option<Located<String>>> {
        let Some(value) = self.table.get(key) else {
            return Ok(None);
        };
        match scalar_text(value.get_ref()) {
            Some(text) => Ok(Some(Located {
                value: text,
                span: value.span(),
            })),
            None => Err(self.wrong_type(value, key, "a single value", example)),
        }
    }

    fn checked_text(
        &self,
        value: &Spanned<DeValue<'t>>,
        key: &str,
        example: &str,
        check: &impl Fn(&str) -> Result<(), String>,
    ) -> anyhow::Result<Located<String>> {
        let DeValue::String(text) = value.get_ref() else {
            return Err(self.wrong_type(value, key, "text in quotes", example));
        };
        check(text)
            .map_err(|why| self.wrong_value(value, key, &format!("is invalid: {why}"), example))?;
        Ok(Located {
            value: text.to_string(),
            span: value.span(),
        })
    }

    fn wrong_type(
        &self,
        value: &Spanned<DeValue<'t>>,
        key: &str,
        wanted: &str,
        example: &str,
    ) -> anyhow::Error {
        self.wrong_value(value, key, &format!("must be {wanted}"), example)
    }

    /// An error for the value of a key; `what` continues the sentence "`key` in this section".
    fn wrong_value(
        &self,
        value: &Spanned<DeValue<'t>>,
        key: &str,
        what: &str,
        example: &str,
    ) -> anyhow::Error {
        self.invalid(&value.span(), key, what, example)
    }

    /// An error for the value of a key at `span`; `what` continues the sentence "`key` in this
    /// section".
    pub fn invalid(
        &self,
        span: &Range<usize>,
        key: &str,
        what: &str,
        example: &str,
    ) -> anyhow::Error {
        let hint = if example.starts_with('[') && example.ends_with(']') && !example.contains('"') {
            format!("write it under the heading {example}")
        } else {
            format!("for example: {key} = {example}")
        };
        self.text
            .refuse(span, format!("`{key}` in {} {what}", self.title), hint)
    }
}

/// The most similar name in `known`, if it is similar enough to be the intended one.
fn closest_key<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let distance = |known: &str| {
        strsim::damerau_levenshtein(&name.to_ascii_lowercase().replace('-', "_"), known)
    };
    let (near, edits) = known
        .iter()
        .map(|known| (*known, distance(known)))
        .min_by_key(|(_, edits)| *edits)?;
    (edits <= (name.len() / 3).max(1)).then_some(near)
}

fn scalar_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(integer) => Some(integer.to_string()),
        DeValue::Float(float) => Some(float.as_str().to_owned()),
        DeValue::Boolean(truth) => Some(truth.to_string()),
        DeValue::Datetime(time) => Some(time.to_string()),
        DeValue::Array(_) | DeValue::Table(_) => None,
    }
}
