//! `oncely.toml`: the streams that an app needs, and its workers. `docs/manifest.md` is the
//! reference.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::schema;
use crate::model::alarm::Thresholds;
use crate::model::hint::WithHint;
use crate::model::message::{Headers, Message};
use crate::model::oci::Reference;
use crate::model::retry::RetryPolicy;
use crate::model::sql::SqlLimits;
use crate::model::subject;
use crate::model::units;

mod cloud_events;
mod config_values;
mod environments;
mod json_schema;
mod migrations;
mod parse;
mod routes;
mod schemas;
mod state_keys;

pub use cloud_events::{CloudEvents, CloudEventsMode};
pub use config_values::{ConfigValue, ResolvedConfig, SecretReference};
pub use json_schema::json_schema;
pub use migrations::WorkerMigration;
pub use parse::check_worker_name;
pub use routes::{CachePolicy, CacheScope, KeyRule, Route, StoreFailures};
pub use state_keys::StateKey;

pub use crate::config::schema::SubjectSchema;

/// The name of the file.
pub const FILE_NAME: &str = "oncely.toml";

/// A checked manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The streams that the app needs; missing ones are created.
    pub streams: Vec<Stream>,
    /// At least one.
    pub workers: Vec<WorkerEntry>,
    warnings: Vec<String>,
}

/// `[[stream]]`: a JetStream stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ManifestStream")]
pub struct Stream {
    /// The name, unique in the manifest and in its NATS account.
    pub name: String,
    /// The subjects it captures, wildcards allowed.
    pub subjects: Vec<String>,
    /// How long it keeps a message; `None` for no limit.
    #[serde(
        default,
        with = "optional_duration",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "Option<String>")]
    pub max_age: Option<Duration>,
}

/// `[[worker]]` in a manifest: the worker, and the location of its parts on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerEntry {
    /// The worker as it is deployed.
    pub worker: Worker,
    /// The crate, or the component with its build command.
    pub source: Source,
    /// The folder of its migrations.
    pub migrations: Option<PathBuf>,
    /// The folder in which a `build` command runs: that of the manifest.
    pub folder: PathBuf,
}

/// The source of a worker's component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A Rust crate that Oncely compiles: its folder.
    Crate(PathBuf),
    /// A component, and the command that builds it.
    Component {
        /// The component, a `.wasm` file.
        path: PathBuf,
        /// The command that builds the file; `None` if the file exists already.
        build: Option<String>,
    },
    /// A component in a registry.
    Oci(Reference),
}

/// A worker with all defaults filled in. Deployments store it as JSON, and hosts run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "WorkerManifest")]
pub struct Worker {
    /// The name, unique in an installation.
    pub name: String,
    /// The registry that its component comes from, with the digest; `None` for one that was built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<Reference>,
    /// The stream it consumes; `None` for a worker that answers HTTP requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// The requests it answers; empty for a worker that handles messages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// The subjects it consumes from that stream, wildcards allowed; empty for all.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// The subjects it may publish to, wildcards allowed.
    #[serde(default)]
    pub outputs: Vec<String>,
    /// Messages with the same key are handled in stream order; `None` for no order.
    #[serde(default)]
    pub ordering_key: Option<OrderingKey>,
    /// The effect of a failed message on later messages of its key.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// The state keys that a message is likely to need. They are read for a whole batch with one
    /// statement.
    #[serde(default)]
    pub state_keys: Vec<StateKey>,
    /// How many messages one instance of the component handles.
    #[serde(default)]
    pub isolation: Isolation,
    /// Lanes (concurrent transactions) on each host.
    pub concurrency: u32,
    /// The maximum number of messages in one transaction.
    pub batch: u32,
    /// JetStream redelivers a message after this long without an acknowledgement or progress.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub ack_wait: Duration,
    /// `[worker.retry]`: the number of attempts, and the waits between them.
    #[serde(default)]
    pub retry: RetryPolicy,
    /// `[worker.limits]`: the limits of one attempt.
    #[serde(default)]
    pub limits: Limits,
    /// The alarm thresholds.
    #[serde(default)]
    pub alarm: Thresholds,
    /// The configuration that the component reads through `wasi:config`. It contains references to
    /// secrets, never their values.
    #[serde(default)]
    pub config: BTreeMap<String, ConfigValue>,
    /// The JSON Schemas of its messages and outputs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schemas: Vec<SubjectSchema>,
    /// The attributes of its outputs, if they are CloudEvents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloudevents: Option<CloudEvents>,
}

/// `[worker.limits]`: the limits of one attempt. Exceeding one fails only that attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Limits {
    /// The time of one attempt.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub time: Duration,
    /// The memory of the component, in bytes.
    pub memory: u64,
    /// The number of messages it may send.
    pub outputs: u32,
    /// Body and headers of one output, in bytes; the NATS server's limit also applies.
    pub output_size: u64,
    /// All outputs together, in bytes.
    pub outputs_size: u64,
    /// SQL statements.
    pub sql_statements: u32,
    /// Rows of one query.
    pub sql_rows: u32,
    /// The result of one query, in bytes.
    pub sql_size: u64,
    /// The body of a response, in bytes.
    pub response_size: u64,
    /// One value of keyed state, in bytes.
    pub state_size: u64,
    /// The number of state keys that it may read or change.
    pub state_entries: u32,
    /// The total size of those keys and the values read and written, in bytes.
    pub state_entries_size: u64,
    /// The total size of log lines, in bytes. The rest is truncated, which is no failure.
    pub log_size: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            time: Duration::from_secs(10),
            memory: 64 << 20,
            outputs: 100,
            output_size: 1 << 20,
            outputs_size: 4 << 20,
            sql_statements: 1000,
            sql_rows: 10_000,
            sql_size: 16 << 20,
            response_size: 4 << 20,
            state_size: 1 << 20,
            state_entries: 10_000,
            state_entries_size: 16 << 20,
            log_size: 64 << 10,
        }
    }
}

/// The source of a message's ordering key: `header:NAME`, or `subject:TOKEN` counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum OrderingKey {
    /// The value of the header with this name.
    Header(String),
    /// The token of the subject at this position, counted from 1.
    Subject(usize),
}

/// The treatment of later messages of a key while a failed one waits for its next attempt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// They are handled.
    #[default]
    Skip,
    /// They are held until the failed one is done or dead; messages of other keys are handled.
    Hold,
}

/// How many messages one instance of the component handles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// One message: no memory is shared with the previous message.
    #[default]
    Message,
    /// All messages of a batch, until one fails.
    Batch,
}

impl Manifest {
    /// Loads and checks a manifest: a file, or a folder that contains `oncely.toml`. The tables of
    /// `environment` are merged over it.
    ///
    /// # Errors
    /// The file is missing or invalid, or it has no such environment.
    pub fn load(path: &Path, environment: Option<&str>) -> anyhow::Result<Manifest> {
        let file = if path.is_dir() {
            path.join(FILE_NAME)
        } else {
            path.to_owned()
        };
        if !file.exists() {
            let hint = "use a folder that contains an oncely.toml, \
                        or create one, see docs/first-worker.md";
            return Err(anyhow::anyhow!("there is no manifest at {}", file.display()).hint(hint));
        }
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("read the manifest {}", file.display()))?;
        parse::manifest(&text, &file.to_string_lossy(), environment)
    }

    /// Parses and checks the text of a manifest. `file_name` is its name in errors; relative paths
    /// start at its folder.
    pub fn parse(text: &str, file_name: &str) -> anyhow::Result<Manifest> {
        parse::manifest(text, file_name, None)
    }

    /// The warnings about allowed but probably unintended settings, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl Worker {
    /// The same worker, stream and routes, with the default of every other setting.
    pub fn with_defaults(&self) -> Worker {
        let default = |place: &str| {
            let text = format!("[[worker]]\nname = \"w\"\ncomponent = \"w.wasm\"\n{place}\n");
            Manifest::parse(&text, FILE_NAME)
                .ok()?
                .workers
                .pop()
                .map(|entry| entry.worker)
        };
        let (stream_worker, route_worker) = (
            default("stream = \"S\""),
            default("[[worker.route]]\npath = \"/r\""),
        );
        let route = route_worker
            .as_ref()
            .and_then(|worker| worker.routes.first().cloned());
        let mut worker = if self.routes.is_empty() {
            stream_worker
        } else {
            route_worker
        }
        .unwrap_or_else(|| self.clone());
        (worker.name, worker.stream) = (self.name.clone(), self.stream.clone());
        let reset = |own: &Route| {
            let route = route.clone().unwrap_or_else(|| own.clone());
            Route {
                path: own.path.clone(),
                methods: own.methods.clone(),
                ..route
            }
        };
        worker.routes = self.routes.iter().map(reset).collect();
        worker
    }

    /// The name of its durable consumer on the stream.
    pub fn durable(&self) -> String {
        format!("oncely-{}", self.name)
    }

    /// Whether it may publish to `subject`. Subjects of NATS or of the platform are never granted.
    pub fn grants(&self, subject: &str) -> bool {
        !subject::is_reserved(subject)
            && self
                .outputs
                .iter()
                .any(|pattern| subject::matches(pattern, subject))
    }

    /// Compiles its schemas, unless they are compiled already.
    ///
    /// # Errors
    /// A schema is invalid.
    pub fn compile_schemas(&self) -> anyhow::Result<()> {
        for schema in &self.schemas {
            let compiled = schema.compile().map_err(anyhow::Error::msg);
            compiled.with_context(|| format!("compile the schema {}", schema.file))?;
        }
        Ok(())
    }

    /// Checks a message, or an output, against the schemas of its subject.
    ///
    /// # Errors
    /// The field, the rule and the value, as a sentence without a full stop.
    pub fn check_schema(
        &self,
        subject: &str,
        headers: &Headers,
        body: &[u8],
    ) -> Result<(), String> {
        schema::check(&self.schemas, subject, headers, body)
    }

    /// The key of a message whose later messages are held while it fails; `None` if none are held.
    pub fn held_key(&self, message: &Message) -> Option<String> {
        match self.on_failure {
            OnFailure::Skip => None,
            OnFailure::Hold => self.ordering_key.as_ref()?.key_of(message),
        }
    }

    /// The manifest line that would grant publishing to `subject`.
    pub fn grant_line(&self, subject: &str) -> String {
        let outputs = self.outputs.iter().map(String::as_str).chain([subject]);
        format!(
            "outputs = [{}]",
            outputs
                .map(|output| format!("{output:?}"))
                .collect::<Vec<_>>()
                .join(", ")
        )
    }
}

impl Limits {
    /// The limits of one query result.
    pub fn sql(&self) -> SqlLimits {
        let size = usize::try_from(self.sql_size).unwrap_or(usize::MAX);
        SqlLimits {
            rows: usize::try_from(self.sql_rows).unwrap_or(usize::MAX),
            bytes: size,
        }
    }
}

impl OrderingKey {
    /// The key of a message; `None` if it has no such header or token.
    pub fn key_of(&self, message: &Message) -> Option<String> {
        match self {
            OrderingKey::Header(name) => message.header(name).map(str::to_owned),
            OrderingKey::Subject(token) => message
                .subject
                .split('.')
                .nth(token.checked_sub(1)?)
                .map(str::to_owned),
        }
    }
}

impl TryFrom<String> for OrderingKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let key = match text.split_once(':') {
            Some(("header", name))
                if !name.is_empty() && name.chars().all(|c| c.is_ascii_graphic() && c != ':') =>
            {
                Some(OrderingKey::Header(name.to_owned()))
            }
            Some(("subject", token)) => token
                .parse()
                .ok()
                .filter(|token| (1..=subject::SUBJECT_MAX).contains(token))
                .map(OrderingKey::Subject),
            _ => None,
        };
        key.ok_or_else(|| {
            format!(
                "`{text}` is neither `header:NAME` nor `subject:TOKEN` with a token counted from 1"
            )
        })
    }
}

impl From<OrderingKey> for String {
    fn from(key: OrderingKey) -> String {
        match key {
            OrderingKey::Header(name) => format!("header:{name}"),
            OrderingKey::Subject(token) => format!("subject:{token}"),
        }
    }
}

mod optional_duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::model::units;

    pub fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        duration.map(units::format_duration).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| units::parse_duration(&text).map_err(serde::de::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests;
