//! `oncely.toml`: which streams an app needs and which workers it has. `docs/manifest.md` is the reference.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::model::alarm::Thresholds;
use crate::model::hint::WithHint;
use crate::model::message::Message;
use crate::model::retry::RetryPolicy;
use crate::model::sql::SqlLimits;
use crate::model::subject;
use crate::model::units;

mod migrations;
mod parse;
mod routes;
mod state_keys;

pub use migrations::WorkerMigration;
pub use routes::{CachePolicy, CacheScope, KeyRule, Route, StoreFailures};
pub use state_keys::StateKey;

/// The name of the file.
pub const FILE_NAME: &str = "oncely.toml";

/// A checked manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The streams the app needs; they are made when they are absent.
    pub streams: Vec<Stream>,
    /// At least one.
    pub workers: Vec<WorkerEntry>,
    warnings: Vec<String>,
}

/// `[[stream]]`: a JetStream stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    pub name: String,
    /// The subjects it captures, wildcards allowed.
    pub subjects: Vec<String>,
    /// How long it keeps a message; none for ever.
    #[serde(
        default,
        with = "optional_duration",
        skip_serializing_if = "Option::is_none"
    )]
    pub max_age: Option<Duration>,
}

/// `[[worker]]` as it stands in a manifest: the worker, and where its parts are on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerEntry {
    pub worker: Worker,
    pub source: Source,
    /// The folder of its migrations.
    pub migrations: Option<PathBuf>,
    /// Where a `build` command runs: the manifest's folder.
    pub folder: PathBuf,
}

/// Where a worker's component comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A Rust crate that Oncely compiles: its folder.
    Crate(PathBuf),
    /// A component, and the command that makes it.
    Component {
        path: PathBuf,
        build: Option<String>,
    },
}

/// A worker with all defaults filled in: what a deployment keeps, as JSON, and what a host runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    pub name: String,
    /// The stream it takes its messages from; none for one that answers requests over HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// The requests it answers; empty for one that takes messages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// The subjects of that stream it takes, wildcards allowed; empty for all.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// The subjects it may publish to, wildcards allowed.
    #[serde(default)]
    pub outputs: Vec<String>,
    /// Messages with the same key are handled in stream order; none leaves the order open.
    #[serde(default)]
    pub ordering_key: Option<OrderingKey>,
    /// What follows for the later messages of a key when one fails.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// The state keys that a message is likely to need; they are read for a whole batch with one statement.
    #[serde(default)]
    pub state_keys: Vec<StateKey>,
    /// How many messages one instance of the component handles.
    #[serde(default)]
    pub isolation: Isolation,
    /// Lanes, that is transactions at the same time, on each host.
    pub concurrency: u32,
    /// The most messages in one transaction.
    pub batch: u32,
    /// After how long without a sign of life JetStream delivers a message again.
    #[serde(with = "units::duration")]
    pub ack_wait: Duration,
    #[serde(default)]
    pub retry: RetryPolicy,
    #[serde(default)]
    pub limits: Limits,
    /// What is to be told of before it is looked for.
    #[serde(default)]
    pub alarm: Thresholds,
    /// What the component reads through `wasi:config`.
    #[serde(default)]
    pub config: BTreeMap<String, String>,
}

/// `[worker.limits]`: what one attempt may use. Beyond a limit the attempt fails, and only that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Time for one attempt.
    #[serde(with = "units::duration")]
    pub time: Duration,
    /// Memory of the component, in bytes.
    pub memory: u64,
    /// Messages it may send.
    pub outputs: u32,
    /// Body and headers of one output, in bytes; never more than the NATS server takes.
    pub output_size: u64,
    /// All outputs together, in bytes.
    pub outputs_size: u64,
    /// SQL statements.
    pub sql_statements: u32,
    /// Rows of one query.
    pub sql_rows: u32,
    /// The result of one query, in bytes.
    pub sql_size: u64,
    /// The body of an answer to a request, in bytes.
    pub answer_size: u64,
    /// One value of keyed state, in bytes.
    pub state_size: u64,
    /// Keys of keyed state that it may read or change.
    pub state_entries: u32,
    /// Those keys and the values read and written, together, in bytes.
    pub state_entries_size: u64,
    /// Log lines together, in bytes; the rest is cut off, which fails nothing.
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
            answer_size: 4 << 20,
            state_size: 1 << 20,
            state_entries: 10_000,
            state_entries_size: 16 << 20,
            log_size: 64 << 10,
        }
    }
}

/// Where a message's ordering key stands; `header:NAME` or `subject:TOKEN`, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum OrderingKey {
    Header(String),
    Subject(usize),
}

/// What becomes of the later messages of a key while a failed one waits for its next attempt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// They go on.
    #[default]
    Skip,
    /// They wait until the failed one is done or dead; messages of other keys go on.
    Hold,
}

/// How many messages one instance of the component handles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// One: nothing is left in memory from the message before.
    #[default]
    Message,
    /// All messages of a batch, until one fails.
    Batch,
}

impl Manifest {
    /// Reads and checks a manifest: a file, or a folder that holds `oncely.toml`.
    pub fn load(path: &Path) -> anyhow::Result<Manifest> {
        let file = if path.is_dir() {
            path.join(FILE_NAME)
        } else {
            path.to_owned()
        };
        if !file.exists() {
            let hint = "name a folder that holds an oncely.toml, or begin one as docs/first-worker.md shows";
            return Err(anyhow::anyhow!("there is no manifest at {}", file.display()).hint(hint));
        }
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("read the manifest {}", file.display()))?;
        Manifest::parse(&text, &file.to_string_lossy())
    }

    /// Checks the text of a manifest. `file_name` is what errors call it; paths in it are taken from its folder.
    pub fn parse(text: &str, file_name: &str) -> anyhow::Result<Manifest> {
        parse::manifest(text, file_name)
    }

    /// What is allowed and probably not meant, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl Worker {
    /// A worker of this name and place with the default of every setting.
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

    /// Whether it may publish to `subject`. What belongs to NATS or to the platform is never granted.
    pub fn grants(&self, subject: &str) -> bool {
        !subject::is_reserved(subject)
            && self
                .outputs
                .iter()
                .any(|pattern| subject::matches(pattern, subject))
    }

    /// The key of a message whose followers wait for it while it fails; none when they do not wait.
    pub fn held_key(&self, message: &Message) -> Option<String> {
        match self.on_failure {
            OnFailure::Skip => None,
            OnFailure::Hold => self.ordering_key.as_ref()?.key_of(message),
        }
    }

    /// The line of the manifest that would let it publish to `subject`.
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
    /// What one query may bring back.
    pub fn sql(&self) -> SqlLimits {
        let size = usize::try_from(self.sql_size).unwrap_or(usize::MAX);
        SqlLimits {
            rows: usize::try_from(self.sql_rows).unwrap_or(usize::MAX),
            bytes: size,
        }
    }
}

impl OrderingKey {
    /// The key of a message; none when it has no such header or token.
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
