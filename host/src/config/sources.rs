//! The sources of a setting's value: flag, else variable, else file. Also the errors for invalid
//! values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};

use crate::config::toml_text::Text;
use crate::config::{FILE_NAME, HostFlags, SETTINGS};
use crate::model::hint::WithHint;

/// All sources, in order of precedence.
pub(super) struct Sources<'a> {
    flags: [(&'static str, &'a Option<String>); SETTINGS.len()],
    env: &'a dyn Fn(&str) -> Option<String>,
    file: BTreeMap<&'static str, Setting>,
    /// The path of the file, if one was read.
    file_path: Option<PathBuf>,
}

/// The value of a setting, with its source.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    pub key: &'static str,
    pub value: String,
    /// The source for display: a flag, a variable or `file:line`.
    from: String,
    /// The base of relative paths: the file's folder, or the working directory of the host.
    folder: PathBuf,
}

impl<'a> Sources<'a> {
    /// Opens the sources and reads the file if it exists.
    pub fn open(
        flags: &'a HostFlags,
        env: &'a dyn Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let named = flags
            .config
            .clone()
            .map(|path| (path, "--config".to_owned()));
        let named =
            named.or_else(|| variable(env, "config").map(|(path, from)| (path.into(), from)));
        let file_path = match named {
            Some((path, from)) if !path.is_file() => {
                return Err(anyhow!(
                    "there is no configuration file {} (from {from})",
                    path.display()
                )
                .hint(format!("create the file, or omit {from}")));
            }
            Some((path, _)) => Some(path),
            None => Some(PathBuf::from(FILE_NAME)).filter(|path| path.is_file()),
        };
        let file = file_path.as_deref().map(read_file).transpose()?;
        Ok(Sources {
            flags: flag_values(flags),
            env,
            file: file.unwrap_or_default(),
            file_path,
        })
    }

    /// The path of the file, if it contains a secret.
    pub fn file_with_secrets(&self) -> Option<PathBuf> {
        let is_secret = |setting: &Setting| {
            // A URL with a login may contain a password.
            ["token", "webhook", "webhook_secret"].contains(&setting.key)
                || (setting.value.contains("://") && setting.value.contains('@'))
        };
        let has_secret = self.file.values().any(is_secret);
        self.file_path.clone().filter(|_| has_secret)
    }

    /// The value of a setting, if any source sets it.
    pub fn get(&self, key: &'static str) -> Option<Setting> {
        let flag = self
            .flags
            .iter()
            .find(|(name, _)| *name == key)
            .and_then(|(_, value)| (*value).clone());
        let setting = |(value, from)| Setting {
            key,
            value,
            from,
            folder: PathBuf::new(),
        };
        flag.map(|value| (value, format!("--{}", key.replace('_', "-"))))
            .or_else(|| variable(self.env, key))
            .map(setting)
            .or_else(|| self.file.get(key).cloned())
    }
}

fn flag_values(flags: &HostFlags) -> [(&'static str, &Option<String>); SETTINGS.len()] {
    [
        ("database", &flags.database),
        ("pool_size", &flags.pool_size),
        ("guest_sql", &flags.guest_sql),
        ("nats", &flags.nats),
        ("nats_context", &flags.nats_context),
        ("nats_creds", &flags.nats_creds),
        ("stream_replicas", &flags.stream_replicas),
        ("take_over", &flags.take_over),
        ("listen", &flags.listen),
        ("token", &flags.token),
        ("console_names", &flags.console_names),
        ("console_url", &flags.console_url),
        ("oidc_issuer", &flags.oidc_issuer),
        ("oidc_client_id", &flags.oidc_client_id),
        ("oidc_client_secret", &flags.oidc_client_secret),
        ("oidc_scopes", &flags.oidc_scopes),
        ("oidc_claim", &flags.oidc_claim),
        ("oidc_roles", &flags.oidc_roles),
        ("oidc_session", &flags.oidc_session),
        ("http", &flags.http),
        ("http_caller", &flags.http_caller),
        ("http_publish", &flags.http_publish),
        ("http_connections", &flags.http_connections),
        ("http_memory", &flags.http_memory),
        ("http_head_timeout", &flags.http_head_timeout),
        ("http_body_timeout", &flags.http_body_timeout),
        ("http_idle_timeout", &flags.http_idle_timeout),
        ("data_dir", &flags.data_dir),
        ("log_format", &flags.log_format),
        ("log_level", &flags.log_level),
        ("drain", &flags.drain),
        ("keep_outputs", &flags.keep_outputs),
        ("relay", &flags.relay),
        ("relay_database", &flags.relay_database),
        ("relay_slot_max", &flags.relay_slot_max),
        ("keep_inbox", &flags.keep_inbox),
        ("archive", &flags.archive),
        ("receipts", &flags.receipts),
        ("keep_receipts", &flags.keep_receipts),
        ("webhook", &flags.webhook),
        ("webhook_secret", &flags.webhook_secret),
        ("cache_size", &flags.cache_size),
        ("cache_url", &flags.cache_url),
        ("compile_time", &flags.compile_time),
        ("compile_memory", &flags.compile_memory),
        ("component_keys", &flags.component_keys),
        ("traces", &flags.traces),
        ("traces_service", &flags.traces_service),
        ("traces_sampling", &flags.traces_sampling),
    ]
}

/// The value and name of a setting's variable; an empty value counts as unset.
fn variable(env: &dyn Fn(&str) -> Option<String>, key: &str) -> Option<(String, String)> {
    let name = format!("ONCELY_{}", key.to_ascii_uppercase());
    env(&name)
        .filter(|value| !value.is_empty())
        .map(|value| (value, name))
}

fn read_file(path: &Path) -> anyhow::Result<BTreeMap<&'static str, Setting>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("read the configuration {}", path.display()))?;
    let name = path.to_string_lossy();
    let text = Text {
        name: &name,
        text: &text,
    };
    let section = text.section("the configuration", &SETTINGS)?;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let mut values = BTreeMap::new();
    for key in SETTINGS {
        if let Some(found) = section.scalar(key, "\"…\"")? {
            let setting = Setting {
                key,
                value: found.value,
                from: text.location(&found.span),
                folder: folder.clone(),
            };
            values.insert(key, setting);
        }
    }
    Ok(values)
}

impl Setting {
    /// A setting with its default value, for defaults that need the same checks.
    pub fn default_of(key: &'static str, value: &str) -> Setting {
        Setting {
            key,
            value: value.to_owned(),
            from: "its default".to_owned(),
            folder: PathBuf::new(),
        }
    }

    /// A setting from a variable of another standard, if that is set and not empty.
    pub fn of_variable(
        key: &'static str,
        name: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Option<Setting> {
        let value = env(name).filter(|value| !value.is_empty())?;
        Some(Setting {
            key,
            value,
            from: name.to_owned(),
            folder: PathBuf::new(),
        })
    }

    /// The same setting and source with another value, for a value that was read indirectly.
    pub fn with_value(self, value: String) -> Setting {
        Setting { value, ..self }
    }

    /// The value as a path.
    pub fn path(&self) -> PathBuf {
        self.resolve_path(&self.value)
    }

    /// A path from the value, relative to the setting's source.
    pub fn resolve_path(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    /// Refuses the value without repeating it, and shows a valid example.
    pub fn refuse(&self, what: impl std::fmt::Display, example: &str) -> anyhow::Error {
        self.refuse_with_hint(what, format!("for example: {}", self.example(example)))
    }

    /// Refuses the value and repeats it: "`value` is not …".
    pub fn refuse_value(&self, what: &str, example: &str) -> anyhow::Error {
        self.refuse(format!("`{}` {what}", self.value), example)
    }

    /// Refuses the value with a hint.
    pub fn refuse_with_hint(&self, what: impl std::fmt::Display, hint: String) -> anyhow::Error {
        anyhow!("`{}` (from {}) is invalid: {what}", self.key, self.from).hint(hint)
    }

    /// Another value as it would be set in the same source.
    fn example(&self, value: &str) -> String {
        match self.from.as_str() {
            flag if flag.starts_with("--") => format!("{flag} {value}"),
            variable if variable.starts_with("ONCELY_") => format!("{variable}={value}"),
            _ => format!("{} = \"{value}\"", self.key),
        }
    }
}
