//! `[env.NAME]`: the changes of a manifest for one environment.

use std::ops::Range;

use toml::de::{DeArray, DeTable, DeValue};

use crate::config::toml_text::{Section, Text};

/// The keys of an environment.
const ENVIRONMENT_KEYS: [&str; 2] = ["stream", "worker"];

/// The keys that select the component of a worker. An environment replaces them together.
const SOURCE_KEYS: [&str; 3] = ["crate", "component", "build"];

/// All environments of a manifest, in the order of their names.
pub(super) struct Environments<'t>(Vec<Environment<'t>>);

/// The tables that one environment merges over a manifest.
pub(super) struct Environment<'t> {
    pub name: String,
    span: Range<usize>,
    table: DeTable<'t>,
}

impl<'t> Environments<'t> {
    /// Takes the environments out of the parsed manifest.
    pub fn take(text: Text<'t>, manifest: &mut DeTable<'t>) -> anyhow::Result<Self> {
        let Some(value) = manifest.remove("env") else {
            return Ok(Environments(Vec::new()));
        };
        let hint = "write the name in the heading: [env.production]";
        let DeValue::Table(tables) = value.get_ref() else {
            return Err(text.refuse(&value.span(), "`env` must be a table", hint));
        };
        let environment = |(name, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'t>>)| {
            let text_of: &str = AsRef::as_ref(name.get_ref());
            let DeValue::Table(table) = value.get_ref() else {
                let what = format!("`env.{text_of}` must be a table");
                return Err(text.refuse(&name.span(), what, hint));
            };
            Ok(Environment {
                name: text_of.to_owned(),
                span: name.span(),
                table: table.clone(),
            })
        };
        let environments: anyhow::Result<Vec<_>> = tables.iter().map(environment).collect();
        environments.map(Environments)
    }

    pub fn all(&self) -> &[Environment<'t>] {
        &self.0
    }

    /// Checks that the requested environment exists.
    pub fn check_name(&self, text: Text<'t>, requested: Option<&str>) -> anyhow::Result<()> {
        let Some(name) = requested else {
            return Ok(());
        };
        if self.0.iter().any(|environment| environment.name == name) {
            return Ok(());
        }
        let names: Vec<&str> = self.0.iter().map(|one| one.name.as_str()).collect();
        let hint = if names.is_empty() {
            format!("the manifest has no environments; add one under the heading [env.{name}]")
        } else {
            format!("the environments are: {}", names.join(", "))
        };
        let what = format!("there is no environment `{}`", name.escape_debug());
        Err(text.refuse(&(0..0), what, hint))
    }
}

impl<'t> Environment<'t> {
    /// A copy of the manifest with the tables of this environment merged over it.
    pub fn merged_into(
        &self,
        text: Text<'t>,
        manifest: &DeTable<'t>,
    ) -> anyhow::Result<DeTable<'t>> {
        // Checks the keys.
        let (span, table) = (self.span.clone(), self.table.clone());
        Section::open(text, "[env.NAME]", span, table, &ENVIRONMENT_KEYS)?;

        let mut merged = manifest.clone();
        for kind in ENVIRONMENT_KEYS {
            let Some(value) = self.table.get(kind) else {
                continue;
            };
            let heading = format!("[[env.{}.{kind}]]", self.name);
            let refuse = || {
                let what = format!("`{kind}` must be a list of tables");
                let hint = format!("write its heading with double brackets: {heading}");
                text.refuse(&value.span(), what, hint)
            };
            let mut seen: Vec<&str> = Vec::new();
            for item in value.get_ref().as_array().ok_or_else(refuse)? {
                let changes = item.get_ref().as_table().ok_or_else(refuse)?;
                let name = changes.get("name").and_then(|name| name.get_ref().as_str());
                let name = name.ok_or_else(|| {
                    let hint = format!("add the name of the {kind} that it changes: name = \"…\"");
                    text.refuse(&item.span(), format!("{heading} needs `name`"), hint)
                })?;
                if seen.contains(&name) {
                    let what = format!("{heading} changes the {kind} `{name}` twice");
                    return Err(text.refuse(&item.span(), what, "keep one of the two"));
                }
                seen.push(name);
                let known = names(manifest, kind);
                let target = find(&mut merged, kind, name).ok_or_else(|| {
                    let what = format!("{heading} changes the {kind} `{name}`, which is unknown");
                    let hint = if known.is_empty() {
                        format!("declare it outside the environments: [[{kind}]]")
                    } else {
                        format!("the names are: {}", known.join(", "))
                    };
                    text.refuse(&item.span(), what, hint)
                })?;
                if SOURCE_KEYS.iter().any(|key| changes.contains_key(*key)) {
                    remove_source(target, changes);
                }
                merge(target, changes);
            }
        }
        Ok(merged)
    }
}

/// Removes the source of a worker if the environment has another one.
fn remove_source(worker: &mut DeTable<'_>, changes: &DeTable<'_>) {
    if changes.contains_key("crate") || changes.contains_key("component") {
        for key in SOURCE_KEYS {
            worker.remove(key);
        }
    }
}

/// Merges tables; any other value replaces the previous one.
fn merge<'t>(target: &mut DeTable<'t>, changes: &DeTable<'t>) {
    for (key, value) in changes {
        let name: &str = AsRef::as_ref(key.get_ref());
        let previous = target.get_mut(name).map(toml::Spanned::get_mut);
        match (previous, value.get_ref()) {
            (Some(DeValue::Table(previous)), DeValue::Table(changes)) => merge(previous, changes),
            _ => {
                // The key is replaced too: its position is named in errors.
                target.remove(name);
                target.insert(key.clone(), value.clone());
            }
        }
    }
}

fn array<'a, 't>(manifest: &'a DeTable<'t>, kind: &str) -> Option<&'a DeArray<'t>> {
    manifest.get(kind)?.get_ref().as_array()
}

fn names<'a>(manifest: &'a DeTable<'_>, kind: &str) -> Vec<&'a str> {
    let items = array(manifest, kind)
        .into_iter()
        .flat_map(|items| items.iter());
    items
        .filter_map(|item| item.get_ref().as_table()?.get("name")?.get_ref().as_str())
        .collect()
}

/// The table of the stream or worker with this name.
fn find<'a, 't>(
    manifest: &'a mut DeTable<'t>,
    kind: &str,
    name: &str,
) -> Option<&'a mut DeTable<'t>> {
    let DeValue::Array(items) = manifest.get_mut(kind)?.get_mut() else {
        return None;
    };
    items.iter_mut().find_map(|item| match item.get_mut() {
        DeValue::Table(table) => {
            let own = table.get("name").and_then(|own| own.get_ref().as_str());
            (own == Some(name)).then_some(table)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::config::manifest::{ConfigValue, Manifest, Source, parse};
    use crate::model::hint::hints;

    const BASE: &str = r#"[[stream]]
name = "IN"
subjects = ["in.>"]

[[worker]]
name = "a"
component = "a.wasm"
build = "make a.wasm"
stream = "IN"
outputs = ["out.a", "out.b"]
batch = 10
[worker.retry]
attempts = 7
backoff = "2s"
[worker.config]
label = "one"
mode = "test"

[[worker]]
name = "b"
crate = "b"
stream = "IN"
"#;

    fn load(environments: &str, name: Option<&str>) -> anyhow::Result<Manifest> {
        parse::manifest(&format!("{BASE}{environments}"), "app/oncely.toml", name)
    }

    /// The line of the first text behind the base.
    fn first_line() -> usize {
        BASE.lines().count() + 1
    }

    #[test]
    fn scalars_and_lists_are_replaced_and_tables_merged() {
        let text = r#"[[env.production.stream]]
name = "IN"
max_age = "7d"
[[env.production.worker]]
name = "a"
outputs = ["out.c"]
batch = 20
[env.production.worker.retry]
attempts = 9
[env.production.worker.config]
label = { secret = "env:LABEL" }
region = "eu"
"#;
        let plain = load(text, None).unwrap();
        assert_eq!(plain, load("", None).unwrap());

        let merged = load(text, Some("production")).unwrap();
        assert_eq!(merged.streams[0].subjects, ["in.>"]);
        assert_eq!(
            merged.streams[0].max_age,
            Some(Duration::from_secs(604_800))
        );
        let worker = &merged.workers[0].worker;
        assert_eq!(
            (worker.batch, &worker.outputs[..]),
            (20, &["out.c".into()][..])
        );
        assert_eq!(worker.retry.attempts, 9);
        assert_eq!(worker.retry.backoff, Duration::from_secs(2));
        let label = &worker.config["label"];
        assert!(matches!(label, ConfigValue::Secret { .. }), "{label:?}");
        assert_eq!(worker.config["mode"], ConfigValue::Text("test".into()));
        assert_eq!(worker.config["region"], ConfigValue::Text("eu".into()));
        assert_eq!(merged.workers[1], plain.workers[1]);
        assert_eq!(merged.workers[0].source, plain.workers[0].source);
    }

    #[test]
    fn a_crate_or_component_replaces_the_whole_source() {
        let text = "[[env.x.worker]]\nname = \"a\"\ncrate = \"a\"\n\
                    [[env.x.worker]]\nname = \"b\"\ncomponent = \"b.wasm\"\n\
                    [[env.y.worker]]\nname = \"a\"\nbuild = \"make other\"\n";
        let x = load(text, Some("x")).unwrap();
        assert_eq!(x.workers[0].source, Source::Crate("app/a".into()));
        let component = |path: &str, build: Option<&str>| Source::Component {
            path: path.into(),
            build: build.map(str::to_owned),
        };
        assert_eq!(x.workers[1].source, component("app/b.wasm", None));
        let y = load(text, Some("y")).unwrap();
        assert_eq!(
            y.workers[0].source,
            component("app/a.wasm", Some("make other"))
        );
    }

    #[test]
    fn every_environment_is_checked_with_its_place() {
        let line = first_line();
        for (text, at, expected, hint) in [
            (
                "[env.x]\nworkers = 1\n",
                1,
                "[env.NAME] has no key `workers`",
                "did you mean",
            ),
            (
                "[env.x.env.y]\n",
                0,
                "[env.NAME] has no key `env`",
                "stream, worker",
            ),
            (
                "[[env.x.worker]]\nname = \"a\"\nbatsch = 1\n",
                2,
                "[[worker]] has no key `batsch`",
                "did you mean: batch = 1",
            ),
            (
                "[[env.x.worker]]\nname = \"a\"\nbatch = 0\n",
                2,
                "must be between 1 and 1000",
                "batch = 100",
            ),
            (
                "[[env.x.worker]]\nname = \"c\"\n",
                0,
                "[[env.x.worker]] changes the worker `c`, which is unknown",
                "the names are: a, b",
            ),
            (
                "[[env.x.stream]]\nname = \"OUT\"\n",
                0,
                "[[env.x.stream]] changes the stream `OUT`, which is unknown",
                "the names are: IN",
            ),
            (
                "[[env.x.worker]]\nbatch = 1\n",
                0,
                "[[env.x.worker]] needs `name`",
                "name =",
            ),
            (
                "[[env.x.worker]]\nname = \"a\"\n[[env.x.worker]]\nname = \"a\"\n",
                2,
                "changes the worker `a` twice",
                "keep one",
            ),
            (
                "[env.x.worker]\nname = \"a\"\n",
                0,
                "must be a list of tables",
                "[[env.x.worker]]",
            ),
            (
                "[env]\nx = 1\n",
                1,
                "`env.x` must be a table",
                "[env.production]",
            ),
        ] {
            // With and without a selected environment.
            for name in [None, Some("x")] {
                let error = load(text, name).unwrap_err();
                let shown = format!("{error:#}");
                let place = format!("app/oncely.toml:{}: ", line + at);
                assert!(
                    shown.contains(&place) && shown.contains(expected),
                    "{shown}"
                );
                let hints = hints(&error).join("\n");
                assert!(hints.contains(hint), "{shown}: {hints}");
            }
        }
    }

    #[test]
    fn an_unknown_environment_is_an_error_with_the_known_ones() {
        let error = load("[env.staging]\n[env.production]\n", Some("prod")).unwrap_err();
        assert!(
            error.to_string().contains("there is no environment `prod`"),
            "{error:#}"
        );
        assert_eq!(hints(&error), ["the environments are: production, staging"]);
        let error = load("", Some("prod")).unwrap_err();
        assert_eq!(
            hints(&error),
            ["the manifest has no environments; add one under the heading [env.prod]"]
        );
    }
}
