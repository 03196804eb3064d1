//! `[worker.config]`: texts, and references to secrets that each host resolves itself.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Worker;
use crate::config::Secret;
use crate::config::toml_text::{Pair, Section, Text};
use crate::model::hint::WithHint;

/// The keys of a value that is a table.
const SECRET_KEYS: [&str; 1] = ["secret"];

/// Variables with this prefix are settings of the host, such as its token.
const HOST_PREFIX: &str = "ONCELY_";

/// The maximum size of a secret, in bytes.
const SECRET_MAX: u64 = 64 << 10;

/// Folders without regular files. `/proc` contains the environment of the host.
const SYSTEM_FOLDERS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A value of `[worker.config]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ConfigValue {
    /// The value itself.
    Text(String),
    /// `{ secret = "env:NAME" }` or `{ secret = "file:PATH" }`.
    Secret {
        /// The place of the value on each host.
        secret: SecretReference,
    },
}

/// The place of a secret on each host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum SecretReference {
    /// `env:NAME`: a variable in the environment of the host.
    Variable(String),
    /// `file:PATH`: a file with an absolute path.
    File(PathBuf),
}

/// The configuration of a running worker: all values, secrets included. Its values are not shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvedConfig(BTreeMap<String, Secret>);

impl ResolvedConfig {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(Secret::reveal)
    }

    /// All keys with their values, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(key, value)| (key.as_str(), value.reveal()))
    }
}

impl Worker {
    /// Reads the secrets of the configuration from the environment and the files of this machine.
    ///
    /// # Errors
    /// A secret is missing. The error names the secret and the worker.
    pub fn resolve_config(&self) -> anyhow::Result<ResolvedConfig> {
        self.resolve_config_from(&|name| std::env::var_os(name))
    }

    /// Like [`Worker::resolve_config`], with the environment as an argument.
    fn resolve_config_from(
        &self,
        env: &dyn Fn(&str) -> Option<std::ffi::OsString>,
    ) -> anyhow::Result<ResolvedConfig> {
        let resolve = |(key, value): (&String, &ConfigValue)| {
            let value = match value {
                ConfigValue::Text(text) => Secret::new(text),
                ConfigValue::Secret { secret } => secret
                    .resolve(env)
                    .with_context(|| {
                        format!(
                            "the secret {secret} of worker {} (config key `{key}`) is missing",
                            self.name
                        )
                    })
                    .hint(secret.hint())?,
            };
            Ok((key.clone(), value))
        };
        let values: anyhow::Result<_> = self.config.iter().map(resolve).collect();
        Ok(ResolvedConfig(values?))
    }
}

impl SecretReference {
    /// Reads the secret.
    ///
    /// # Errors
    /// It is missing, empty or unreadable.
    pub(crate) fn resolve(
        &self,
        env: &dyn Fn(&str) -> Option<std::ffi::OsString>,
    ) -> anyhow::Result<Secret> {
        let text = match self {
            SecretReference::Variable(name) => env(name)
                .with_context(|| format!("the variable {name} is not set on this host"))?
                .into_string()
                .map_err(|_| anyhow!("the variable {name} is not UTF-8"))?,
            SecretReference::File(path) => read(path)?,
        };
        if text.is_empty() {
            bail!("it is empty");
        }
        Ok(Secret::new(text))
    }

    fn hint(&self) -> String {
        match self {
            SecretReference::Variable(name) => {
                format!("set {name} in the environment of the host and restart the host")
            }
            SecretReference::File(path) => format!(
                "create {} on the host, readable for the user of the host",
                path.display()
            ),
        }
    }
}

/// Reads a secret from a file, without the line break at its end.
fn read(path: &Path) -> anyhow::Result<String> {
    let context = || format!("read {}", path.display());
    let real = path.canonicalize().with_context(context)?;
    let is_system = SYSTEM_FOLDERS.iter().any(|folder| real.starts_with(folder));
    if is_system || !real.is_file() {
        bail!("{} is not a regular file", path.display());
    }
    let mut text = String::new();
    std::fs::File::open(&real)
        .and_then(|file| file.take(SECRET_MAX + 1).read_to_string(&mut text))
        .with_context(context)?;
    if text.len() as u64 > SECRET_MAX {
        bail!("{} is larger than 64 KiB", path.display());
    }
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

impl TryFrom<String> for SecretReference {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("env", name)) if name.starts_with(HOST_PREFIX) => Err(format!(
                "`{text}` is a setting of the host, which components cannot read"
            )),
            Some(("env", name)) if is_variable(name) => {
                Ok(SecretReference::Variable(name.to_owned()))
            }
            Some(("file", path)) if Path::new(path).is_absolute() && !path.contains('\0') => {
                Ok(SecretReference::File(path.into()))
            }
            Some(("file", _)) => Err(format!("`{}` is not an absolute path", text.escape_debug())),
            _ => Err(format!(
                "`{}` is neither `env:NAME` nor `file:PATH`",
                text.escape_debug()
            )),
        }
    }
}

impl From<SecretReference> for String {
    fn from(reference: SecretReference) -> String {
        reference.to_string()
    }
}

impl fmt::Display for SecretReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretReference::Variable(name) => write!(f, "env:{name}"),
            SecretReference::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Parses `[worker.config]`.
pub(super) fn parse(
    text: Text<'_>,
    worker: &Section<'_>,
) -> anyhow::Result<BTreeMap<String, ConfigValue>> {
    let example = "\"env:API_KEY\"";
    let check = |value: &str| SecretReference::try_from(value.to_owned()).map(|_| ());
    let mut config = BTreeMap::new();
    for (key, pair) in worker.pairs("config", "[worker.config]", &SECRET_KEYS)? {
        let value = match pair {
            Pair::Text(value) => ConfigValue::Text(value),
            Pair::Table(section) => {
                let reference = section.text("secret", example, check)?;
                let reference = reference.ok_or_else(|| {
                    text.refuse(
                        &section.span(),
                        format!("`config.{key}` is a table without `secret`"),
                        format!("write: {key} = {{ secret = {example} }}"),
                    )
                })?;
                let secret =
                    SecretReference::try_from(reference.value).map_err(anyhow::Error::msg)?;
                ConfigValue::Secret { secret }
            }
        };
        config.insert(key, value);
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::manifest::Manifest;
    use crate::model::hint::hints;

    fn worker(config: &str) -> anyhow::Result<Worker> {
        let text = format!(
            "[[worker]]\nname = \"w\"\ncomponent = \"w.wasm\"\nstream = \"S\"\n\
             [worker.config]\n{config}\n"
        );
        let mut manifest = Manifest::parse(&text, "oncely.toml")?;
        Ok(manifest.workers.remove(0).worker)
    }

    #[test]
    fn a_stored_worker_contains_only_the_reference_of_a_secret() {
        let worker = worker("key = { secret = \"env:API_KEY\" }\nlabel = \"one\"").unwrap();
        let stored = serde_json::to_value(&worker).unwrap();
        let expected = serde_json::json!({ "key": { "secret": "env:API_KEY" }, "label": "one" });
        assert_eq!(stored["config"], expected);
        let again: Worker = serde_json::from_value(stored).unwrap();
        assert_eq!(again, worker);

        let resolved = worker
            .resolve_config_from(&|name| (name == "API_KEY").then(|| "s3cret".into()))
            .unwrap();
        assert_eq!(resolved.get("key"), Some("s3cret"));
        assert_eq!(resolved.get("label"), Some("one"));
        assert!(!format!("{resolved:?}").contains("s3cret"));
    }

    #[test]
    fn a_secret_in_a_file_loses_only_its_last_line_break() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let worker = worker(&format!(
            "key = {{ secret = \"file:{}\" }}",
            file.path().display()
        ))
        .unwrap();
        let resolve = || worker.resolve_config_from(&|_| None);
        for (content, expected) in [("a b\n", "a b"), ("a\r\n", "a"), ("a\n\n", "a\n")] {
            std::fs::write(file.path(), content).unwrap();
            assert_eq!(resolve().unwrap().get("key"), Some(expected));
        }
        std::fs::write(file.path(), "x".repeat(70_000)).unwrap();
        assert!(format!("{:#}", resolve().unwrap_err()).contains("larger than 64 KiB"));
        std::fs::write(file.path(), "").unwrap();
        assert!(format!("{:#}", resolve().unwrap_err()).contains("it is empty"));
    }

    #[test]
    fn a_missing_secret_is_named_with_its_worker() {
        let variable = worker("key = { secret = \"env:API_KEY\" }").unwrap();
        let error = variable.resolve_config_from(&|_| None).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "the secret env:API_KEY of worker w (config key `key`) is missing: \
             the variable API_KEY is not set on this host"
        );
        assert_eq!(
            hints(&error),
            ["set API_KEY in the environment of the host and restart the host"]
        );
        for path in ["/no/such/file", "/proc/self/environ", "/dev/stdin", "/tmp"] {
            let file = worker(&format!("key = {{ secret = \"file:{path}\" }}")).unwrap();
            let error = file.resolve_config_from(&|_| None).unwrap_err();
            assert!(format!("{error:#}").contains(path), "{error:#}");
        }
    }

    #[test]
    fn invalid_references_are_refused_with_their_line() {
        for (config, expected) in [
            (
                "key = { secret = \"env:ONCELY_TOKEN\" }",
                "is a setting of the host",
            ),
            ("key = { secret = \"env:A-B\" }", "neither `env:NAME` nor"),
            ("key = { secret = \"file:key\" }", "not an absolute path"),
            ("key = { secret = \"vault:key\" }", "neither `env:NAME` nor"),
            ("key = { secret = 7 }", "must be text in quotes"),
            ("key = { secert = \"env:A\" }", "has no key `secert`"),
            ("key = {}", "is a table without `secret`"),
        ] {
            let error = worker(config).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.starts_with("oncely.toml:6: "), "{text}");
            assert!(text.contains(expected), "{text}");
            assert!(!hints(&error).is_empty(), "{text}");
        }
    }
}
