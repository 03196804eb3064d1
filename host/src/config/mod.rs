//! What a host needs to run, resolved before anything starts: flag, else variable, else file, else default.
//! `docs/configuration.md` lists every setting.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::model::request::Admission;
use crate::model::units;

mod cache;
mod compile;
mod http;
pub mod manifest;
mod nats;
mod sources;
mod token;
mod toml_text;
mod webhook;

pub use cache::{CacheSettings, CacheUrl};
pub use compile::CompileSettings;
pub use http::HttpLimits;
pub use nats::{JetStreamApi, Login, Nats};
pub use token::{load_or_create_token, read_token};
pub use webhook::{Webhook, key as webhook_key};

use sources::{Setting, Sources};

/// The file that is read when there is one and `--config` names no other.
pub const FILE_NAME: &str = "oncely-host.toml";

/// Where the control API listens unless told otherwise.
pub const LISTEN_ADDRESS: &str = "127.0.0.1:7420";

/// Where requests over HTTP are taken unless told otherwise.
pub const HTTP_ADDRESS: &str = "127.0.0.1:7480";

/// Every setting, by its key in the file. Its flag is `--key` with hyphens, its variable `ONCELY_KEY`.
pub(crate) const SETTINGS: [&str; 34] = [
    "database",
    "pool_size",
    "guest_sql",
    "nats",
    "nats_context",
    "nats_creds",
    "stream_replicas",
    "take_over",
    "listen",
    "token",
    "http",
    "http_caller",
    "http_publish",
    "http_connections",
    "http_memory",
    "http_head_timeout",
    "http_body_timeout",
    "http_idle_timeout",
    "data_dir",
    "log_format",
    "log_level",
    "drain",
    "keep_outputs",
    "relay",
    "relay_database",
    "relay_slot_max",
    "keep_inbox",
    "archive",
    "webhook",
    "webhook_secret",
    "cache_size",
    "cache_url",
    "compile_time",
    "compile_memory",
];

/// The settings as flags. They are texts here: [`HostConfig::resolve`] reads them, whichever source they came from.
#[derive(Debug, Clone, Default, Args)]
pub struct HostFlags {
    /// Read further settings from this file [default: oncely-host.toml if there is one] [env: ONCELY_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// postgres://… or the path of a SQLite file [default: oncely.db in the data folder] [env: ONCELY_DATABASE]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// The most database connections [default: 16] [env: ONCELY_POOL_SIZE]
    #[arg(long, value_name = "COUNT")]
    pub pool_size: Option<String>,
    /// How workers' SQL is kept apart on PostgreSQL: restricted, by a role of its own, or trusted [default: restricted] [env: ONCELY_GUEST_SQL]
    #[arg(long, value_name = "MODE")]
    pub guest_sql: Option<String>,
    /// NATS servers, separated by commas [default: nats://127.0.0.1:4222] [env: ONCELY_NATS]
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
    /// A context of the nats tool that says where and as whom to connect [env: ONCELY_NATS_CONTEXT]
    #[arg(long, value_name = "NAME")]
    pub nats_context: Option<String>,
    /// A NATS credentials file [env: ONCELY_NATS_CREDS]
    #[arg(long, value_name = "FILE")]
    pub nats_creds: Option<String>,
    /// How many servers of a NATS cluster keep each stream that hosts make: 1, 3, 5, or auto for 3 where there are as many [default: auto] [env: ONCELY_STREAM_REPLICAS]
    #[arg(long, value_name = "COUNT")]
    pub stream_replicas: Option<String>,
    /// Make the streams and consumers of this other installation, which is gone for good, this one's [default: none] [env: ONCELY_TAKE_OVER]
    #[arg(long, value_name = "ID")]
    pub take_over: Option<String>,
    /// Where the control API listens [default: 127.0.0.1:7420] [env: ONCELY_LISTEN]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// The token callers of the control API show [default: one made and kept in the data folder] [env: ONCELY_TOKEN]
    #[arg(long, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Where requests over HTTP are taken, or off [default: 127.0.0.1:7480] [env: ONCELY_HTTP]
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<String>,
    /// The header that says who sends a request: an idempotency key is the sender's own [default: Authorization] [env: ONCELY_HTTP_CALLER]
    #[arg(long, value_name = "HEADER")]
    pub http_caller: Option<String>,
    /// Subjects that POST /publish/SUBJECT may publish to, separated by commas [default: none] [env: ONCELY_HTTP_PUBLISH]
    #[arg(long, value_name = "SUBJECTS")]
    pub http_publish: Option<String>,
    /// The most connections open for requests; fewer if the process may not open so many files [default: 1024] [env: ONCELY_HTTP_CONNECTIONS]
    #[arg(long, value_name = "COUNT")]
    pub http_connections: Option<String>,
    /// How much memory the bodies of requests and answers may take [default: 128MiB] [env: ONCELY_HTTP_MEMORY]
    #[arg(long, value_name = "SIZE")]
    pub http_memory: Option<String>,
    /// How long the head of a request may take [default: 10s] [env: ONCELY_HTTP_HEAD_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    pub http_head_timeout: Option<String>,
    /// How long a body may take to come or go, and a second more for every 16 KiB [default: 30s] [env: ONCELY_HTTP_BODY_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    pub http_body_timeout: Option<String>,
    /// How long a connection stays open between two requests [default: 75s] [env: ONCELY_HTTP_IDLE_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    pub http_idle_timeout: Option<String>,
    /// The folder for everything the host keeps on this machine [default: .oncely] [env: ONCELY_DATA_DIR]
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: Option<String>,
    /// The form of log lines: text or json [default: text] [env: ONCELY_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Which log lines: a level, or directives such as oncely=debug,info [default: info] [env: ONCELY_LOG_LEVEL]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How long a host that was asked to stop finishes its work [default: 30s] [env: ONCELY_DRAIN]
    #[arg(long, value_name = "TIME")]
    pub drain: Option<String>,
    /// How long published outputs are kept, for the case that a stream loses them [default: 15m] [env: ONCELY_KEEP_OUTPUTS]
    #[arg(long, value_name = "TIME")]
    pub keep_outputs: Option<String>,
    /// How outputs are published on PostgreSQL: poll, or wal, from the database's log; for all hosts of the database [default: as it was, poll at first] [env: ONCELY_RELAY]
    #[arg(long, value_name = "MODE")]
    pub relay: Option<String>,
    /// postgres://… of the server itself, where the other URL names a pooler, to read its log [default: as for the database] [env: ONCELY_RELAY_DATABASE]
    #[arg(long, value_name = "URL")]
    pub relay_database: Option<String>,
    /// How much of its log the server may keep for the relay until that polls again [default: 4GiB] [env: ONCELY_RELAY_SLOT_MAX]
    #[arg(long, value_name = "SIZE")]
    pub relay_slot_max: Option<String>,
    /// How long it is remembered what was handled: a time, or auto for a day longer than the streams keep messages [default: auto] [env: ONCELY_KEEP_INBOX]
    #[arg(long, value_name = "TIME")]
    pub keep_inbox: Option<String>,
    /// A folder where old inbox records and outputs are kept in files when they leave the database [default: none] [env: ONCELY_ARCHIVE]
    #[arg(long, value_name = "FOLDER")]
    pub archive: Option<String>,
    /// Where alarms are posted to, http or https [default: nowhere] [env: ONCELY_WEBHOOK]
    #[arg(long, value_name = "URL")]
    pub webhook: Option<String>,
    /// What they are signed with: whsec_ and a secret in Base64 [default: not signed] [env: ONCELY_WEBHOOK_SECRET]
    #[arg(long, value_name = "SECRET")]
    pub webhook_secret: Option<String>,
    /// How much memory cached values may take; 0 for none [default: 64MiB] [env: ONCELY_CACHE_SIZE]
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<String>,
    /// A Redis or Valkey that all hosts share as a cache [default: none] [env: ONCELY_CACHE_URL]
    #[arg(long, value_name = "URL")]
    pub cache_url: Option<String>,
    /// Processor time that compiling one component may take [default: 2m] [env: ONCELY_COMPILE_TIME]
    #[arg(long, value_name = "TIME")]
    pub compile_time: Option<String>,
    /// Memory that compiling one component may take [default: 2GiB] [env: ONCELY_COMPILE_MEMORY]
    #[arg(long, value_name = "SIZE")]
    pub compile_memory: Option<String>,
}

/// Everything a host needs to know, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    pub database: Database,
    /// The most connections to the database.
    pub pool_size: u32,
    pub guest_sql: GuestSql,
    pub nats: Nats,
    /// How many servers of a cluster keep each stream that hosts make; none for as many as there are, up to three.
    pub stream_replicas: Option<usize>,
    /// The id of another installation on this NATS whose streams and consumers become this one's.
    pub take_over: Option<String>,
    /// Where the control API listens.
    pub listen: SocketAddr,
    /// The control API's token, if one was set; else see [`HostConfig::load_or_create_token`].
    pub token: Option<Secret>,
    /// Where requests over HTTP are taken; none for nowhere.
    pub http: Option<SocketAddr>,
    pub admission: Admission,
    pub http_limits: HttpLimits,
    /// Holds the token, compiled components, and the SQLite file unless `database` says otherwise.
    pub data_dir: PathBuf,
    pub log_format: LogFormat,
    /// Directives for `tracing_subscriber::filter::Targets`.
    pub log_level: String,
    /// How long a host that was asked to stop finishes its work.
    pub drain: Duration,
    /// How long published outputs are kept.
    pub keep_outputs: Duration,
    /// How outputs are published; none to leave it as it is.
    pub relay: Option<RelayMode>,
    /// A `postgres://` URL that no pooler stands behind.
    pub relay_database: Option<Database>,
    /// How much of its log the server may keep until it is read, in bytes.
    pub relay_slot_max: u64,
    pub keep_inbox: KeepInbox,
    /// Where old rows are kept when they leave the database.
    pub archive: Option<PathBuf>,
    /// Where alarms are posted to.
    pub webhook: Option<Webhook>,
    /// What these posts are signed with.
    pub webhook_secret: Option<Secret>,
    pub cache: CacheSettings,
    pub compile: CompileSettings,
}

/// How outputs are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayMode {
    /// Hosts hand them over from memory, and sweep for what is left.
    Poll,
    /// One host reads them from PostgreSQL's log.
    Wal,
}

/// How long it is remembered what was handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepInbox {
    /// A day longer than the streams keep messages.
    Auto,
    For(Duration),
}

/// Which database, and where.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// The path of the file.
    Sqlite(PathBuf),
    /// A `postgres://` URL, password included; it is never shown whole.
    Postgres(String),
}

/// What keeps workers' SQL from the platform's tables on PostgreSQL. On SQLite the wall always stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestSql {
    /// A login role of the app's own, and the check of each statement's text before it.
    Restricted,
    /// The check of the text alone, for databases that let nobody make roles.
    Trusted,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl HostConfig {
    /// Resolves the configuration from flags, the environment and the file.
    pub fn load(flags: &HostFlags) -> anyhow::Result<HostConfig> {
        Self::resolve(flags, &|name| {
            std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
        })
    }

    /// Like [`HostConfig::load`], with the environment as an argument. An empty variable counts as unset.
    pub fn resolve(
        flags: &HostFlags,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> anyhow::Result<HostConfig> {
        let sources = Sources::open(flags, env)?;
        let data_dir = sources
            .get("data_dir")
            .map_or_else(|| PathBuf::from(".oncely"), |setting| setting.path());
        let default_database = || Ok(Database::Sqlite(data_dir.join("oncely.db")));
        let token = sources
            .get("token")
            .map(|setting| token::check(&setting))
            .transpose()?;
        let database = sources
            .get("database")
            .map_or_else(default_database, |setting| database(&setting))?;
        Ok(HostConfig {
            relay: sources
                .get("relay")
                .map(|setting| relay(&setting, &database))
                .transpose()?,
            relay_database: sources
                .get("relay_database")
                .map(|setting| relay_database(&setting))
                .transpose()?,
            relay_slot_max: sources
                .get("relay_slot_max")
                .map_or(Ok(4 << 30), |setting| relay_slot_max(&setting))?,
            database,
            pool_size: sources
                .get("pool_size")
                .map_or(Ok(16), |setting| pool_size(&setting))?,
            guest_sql: sources
                .get("guest_sql")
                .map_or(Ok(GuestSql::Restricted), |setting| guest_sql(&setting))?,
            nats: nats::resolve(&sources, env)?,
            stream_replicas: sources
                .get("stream_replicas")
                .map_or(Ok(None), |setting| stream_replicas(&setting))?,
            take_over: sources
                .get("take_over")
                .map(|setting| take_over(&setting))
                .transpose()?,
            listen: listen(&sources, token.is_some())?,
            token,
            http: http::address(&sources)?,
            admission: http::admission(&sources)?,
            http_limits: http::limits(&sources)?,
            log_format: sources
                .get("log_format")
                .map_or(Ok(LogFormat::Text), |setting| log_format(&setting))?,
            log_level: sources
                .get("log_level")
                .map_or_else(|| Ok("info".to_owned()), |setting| log_level(&setting))?,
            drain: sources
                .get("drain")
                .map_or(Ok(Duration::from_secs(30)), |setting| drain(&setting))?,
            keep_outputs: sources
                .get("keep_outputs")
                .map_or(Ok(Duration::from_secs(15 * 60)), |setting| {
                    keep_outputs(&setting)
                })?,
            keep_inbox: sources
                .get("keep_inbox")
                .map_or(Ok(KeepInbox::Auto), |setting| keep_inbox(&setting))?,
            archive: sources
                .get("archive")
                .map(|setting| archive(&setting))
                .transpose()?,
            webhook: sources
                .get("webhook")
                .map(|setting| webhook::webhook(&setting))
                .transpose()?,
            webhook_secret: sources
                .get("webhook_secret")
                .map(|setting| webhook::secret(&setting))
                .transpose()?,
            cache: cache::resolve(&sources)?,
            compile: compile::resolve(&sources)?,
            data_dir,
        })
    }

    /// The token that was set, else the one kept in the data folder, which is made if it is not there yet.
    pub fn load_or_create_token(&self) -> anyhow::Result<Secret> {
        match &self.token {
            Some(token) => Ok(token.clone()),
            None => load_or_create_token(&self.data_dir),
        }
    }
}

fn database(setting: &Setting) -> anyhow::Result<Database> {
    let wrong = |what: &str| {
        Err(setting.refuse(
            what,
            "postgres://user:password@host/name, or a path such as oncely.db",
        ))
    };
    let value = setting.value.as_str();
    if value.starts_with("postgres://") || value.starts_with("postgresql://") {
        if has_multiple_hosts(value) {
            return Err(setting.refuse_with_hint(
                "it names several PostgreSQL servers, and a host connects to one address",
                "name a virtual address that follows the primary, or a pooler before the servers"
                    .to_owned(),
            ));
        }
        return Ok(Database::Postgres(value.to_owned()));
    }
    let path = match value.split_once(':') {
        Some(("sqlite", path)) => path.strip_prefix("//").unwrap_or(path),
        // The rest of the value may hold a password, so it is not repeated.
        Some((scheme, rest)) if rest.starts_with("//") => {
            return wrong(&format!("`{scheme}://` is no database Oncely knows"));
        }
        _ => value,
    };
    if path.is_empty() || path.contains(":memory:") {
        return wrong("it must name a file: a database in memory would forget what was handled");
    }
    if value.starts_with("sqlite:") && path.contains('?') {
        return wrong("options behind `?` are not supported for SQLite");
    }
    Ok(Database::Sqlite(setting.resolve_path(path)))
}

/// Whether the place of a `postgres://` URL is a list, as libpq takes it: behind a login, before the name of the database.
fn has_multiple_hosts(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let place = rest.split(['/', '?']).next().unwrap_or_default();
    let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
    let host_parameter = |part: &str| {
        part.strip_prefix("host=")
            .is_some_and(|hosts| hosts.contains(',') || hosts.contains("%2C"))
    };
    place.contains(',') || rest.split(['?', '&']).skip(1).any(host_parameter)
}

fn pool_size(setting: &Setting) -> anyhow::Result<u32> {
    match setting.value.parse() {
        Ok(count @ 2..=1000) => Ok(count),
        _ => Err(setting.refuse_value("is not a whole number between 2 and 1000", "16")),
    }
}

fn guest_sql(setting: &Setting) -> anyhow::Result<GuestSql> {
    match setting.value.as_str() {
        "restricted" => Ok(GuestSql::Restricted),
        "trusted" => Ok(GuestSql::Trusted),
        _ => Err(setting.refuse_value("is neither `restricted` nor `trusted`", "restricted")),
    }
}

fn stream_replicas(setting: &Setting) -> anyhow::Result<Option<usize>> {
    match setting.value.as_str() {
        "auto" => Ok(None),
        "1" => Ok(Some(1)),
        "3" => Ok(Some(3)),
        "5" => Ok(Some(5)),
        _ => Err(setting.refuse_value("is none of 1, 3, 5 and `auto`", "3")),
    }
}

fn take_over(setting: &Setting) -> anyhow::Result<String> {
    let id = setting.value.as_str();
    if id.len() == 16
        && id
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    {
        return Ok(id.to_owned());
    }
    Err(setting.refuse_value(
        "is not the id of an installation, 16 hex digits",
        "0123456789abcdef",
    ))
}

fn relay(setting: &Setting, database: &Database) -> anyhow::Result<RelayMode> {
    match (setting.value.as_str(), database) {
        ("poll", _) => Ok(RelayMode::Poll),
        ("wal", Database::Postgres(_)) => Ok(RelayMode::Wal),
        ("wal", Database::Sqlite(_)) => Err(setting.refuse_with_hint(
            "`wal` reads the log of a PostgreSQL server, and the database is SQLite",
            "leave it out, or name a postgres:// URL in `database`".to_owned(),
        )),
        _ => Err(setting.refuse_value("is neither `poll` nor `wal`", "wal")),
    }
}

fn relay_database(setting: &Setting) -> anyhow::Result<Database> {
    match database(setting)? {
        Database::Postgres(url) => Ok(Database::Postgres(url)),
        Database::Sqlite(_) => Err(setting.refuse(
            "it is for a PostgreSQL server behind a pooler",
            "postgres://user:password@host/name",
        )),
    }
}

fn relay_slot_max(setting: &Setting) -> anyhow::Result<u64> {
    match units::parse_size(&setting.value) {
        Ok(most) if most >= 64 << 20 => Ok(most),
        _ => Err(setting.refuse_value("is not a size of 64 MiB or more", "4GiB")),
    }
}

fn listen(sources: &Sources<'_>, has_token: bool) -> anyhow::Result<SocketAddr> {
    let default = Setting::default_of("listen", LISTEN_ADDRESS);
    let setting = sources.get("listen").unwrap_or(default);
    let address: SocketAddr = setting
        .value
        .replacen("localhost:", "127.0.0.1:", 1)
        .parse()
        .map_err(|_| setting.refuse_value("is not an address with a port", LISTEN_ADDRESS))?;
    if !address.ip().is_loopback() && !has_token {
        let what = format!("`{address}` can be reached from other machines, and no token is set");
        return Err(setting.refuse_with_hint(
            what,
            format!("set one: ONCELY_TOKEN=$(openssl rand -hex 32), or listen on {LISTEN_ADDRESS}"),
        ));
    }
    Ok(address)
}

fn log_format(setting: &Setting) -> anyhow::Result<LogFormat> {
    match setting.value.as_str() {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(setting.refuse_value("is neither `text` nor `json`", "json")),
    }
}

fn log_level(setting: &Setting) -> anyhow::Result<String> {
    match setting.value.parse::<tracing_subscriber::filter::Targets>() {
        Ok(_) => Ok(setting.value.clone()),
        Err(_) => {
            Err(setting.refuse_value("is neither a level nor directives", "oncely=debug,info"))
        }
    }
}

fn drain(setting: &Setting) -> anyhow::Result<Duration> {
    let most = Duration::from_secs(60 * 60);
    match units::parse_duration(&setting.value) {
        Ok(drain) if drain <= most => Ok(drain),
        _ => Err(setting.refuse_value("is not a length of time up to 1h", "30s")),
    }
}

fn keep_outputs(setting: &Setting) -> anyhow::Result<Duration> {
    let (least, most) = (
        Duration::from_secs(60),
        Duration::from_secs(30 * 24 * 60 * 60),
    );
    match units::parse_duration(&setting.value) {
        Ok(keep) if (least..=most).contains(&keep) => Ok(keep),
        _ => Err(setting.refuse_value("is not a length of time between 1m and 30d", "15m")),
    }
}

fn keep_inbox(setting: &Setting) -> anyhow::Result<KeepInbox> {
    let (least, most) = (
        Duration::from_secs(60),
        Duration::from_secs(10 * 365 * 24 * 60 * 60),
    );
    match (
        setting.value.as_str(),
        units::parse_duration(&setting.value),
    ) {
        ("auto", _) => Ok(KeepInbox::Auto),
        (_, Ok(keep)) if (least..=most).contains(&keep) => Ok(KeepInbox::For(keep)),
        _ => Err(setting.refuse_value(
            "is neither `auto` nor a length of time between 1m and 3650d",
            "auto",
        )),
    }
}

/// The folder is made now: what is found out later has nobody to tell.
fn archive(setting: &Setting) -> anyhow::Result<PathBuf> {
    let folder = setting.path();
    std::fs::create_dir_all(&folder)
        .and_then(|()| tempfile::tempfile_in(&folder))
        .map_err(|error| {
            setting.refuse(
                format!("nothing can be written to {}: {error}", folder.display()),
                "/var/lib/oncely/archive",
            )
        })?;
    Ok(folder)
}

impl Database {
    /// For people: without the password.
    pub fn redacted(&self) -> String {
        match self {
            Database::Sqlite(path) => format!("sqlite:{}", path.display()),
            Database::Postgres(url) => without_password(url),
        }
    }
}

/// A URL without its password and its parameters, which may hold one too.
fn without_password(url: &str) -> String {
    let url = url.split('?').next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    match rest.rsplit_once('@') {
        Some((user, place)) => format!(
            "{scheme}://{}@{place}",
            user.split(':').next().unwrap_or_default()
        ),
        None => url.to_owned(),
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, for whoever has to send or compare it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

#[cfg(test)]
mod tests;
