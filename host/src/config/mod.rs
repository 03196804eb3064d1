//! The configuration of a host, resolved before anything starts: flag, else variable, else file,
//! else default. `docs/configuration.md` lists every setting.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::model::request::Admission;
use crate::model::signature::PublicKeys;
use crate::model::units;

mod cache;
mod compile;
mod component_keys;
mod http;
pub mod manifest;
mod nats;
mod oidc;
mod schema;
mod shared;
mod sources;
mod token;
mod toml_text;
mod traces;
mod webhook;

pub use cache::{CacheSettings, CacheUrl};
pub use compile::CompileSettings;
pub use http::HttpLimits;
pub use nats::{JetStreamApi, Login, Nats};
pub(crate) use oidc::is_loopback;
pub use oidc::{ConsoleUrl, OidcSettings};
pub use token::{load_or_create_token, read_token};
pub use traces::{TraceEndpoint, TraceSettings};
pub use webhook::{Webhook, key as webhook_key};

use sources::{Setting, Sources};

/// The configuration file that is read if it exists and `--config` names no other.
pub const FILE_NAME: &str = "oncely-host.toml";

/// The default address of the control API.
pub const LISTEN_ADDRESS: &str = "127.0.0.1:7420";

/// The default address for HTTP requests.
pub const HTTP_ADDRESS: &str = "127.0.0.1:7480";

/// How long published outputs are kept by default.
const KEEP_OUTPUTS: Duration = Duration::from_secs(15 * 60);

/// How long receipts can be issued by default.
const KEEP_RECEIPTS: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Every setting by its key in the file. Its flag is `--key` with hyphens, its variable is
/// `ONCELY_KEY`.
pub(crate) const SETTINGS: [&str; 49] = [
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
    "console_names",
    "console_url",
    "oidc_issuer",
    "oidc_client_id",
    "oidc_client_secret",
    "oidc_scopes",
    "oidc_claim",
    "oidc_roles",
    "oidc_session",
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
    "receipts",
    "keep_receipts",
    "webhook",
    "webhook_secret",
    "cache_size",
    "cache_url",
    "compile_time",
    "compile_memory",
    "component_keys",
    "traces",
    "traces_service",
    "traces_sampling",
];

/// The settings as flags. They stay text here: [`HostConfig::resolve`] parses them, whatever their
/// source.
#[derive(Debug, Clone, Default, Args)]
pub struct HostFlags {
    /// Read further settings from this file [default: oncely-host.toml if it exists] [env:
    /// ONCELY_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Use this database: a postgres:// URL or the path of a SQLite file [default: oncely.db in the
    /// data folder] [env: ONCELY_DATABASE]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// Open at most this many database connections [default: 16] [env: ONCELY_POOL_SIZE]
    #[arg(long, value_name = "COUNT")]
    pub pool_size: Option<String>,
    /// Isolate workers' SQL on PostgreSQL: restricted, by a separate role, or trusted, by the
    /// statement filter alone [default: restricted] [env: ONCELY_GUEST_SQL]
    #[arg(long, value_name = "MODE")]
    pub guest_sql: Option<String>,
    /// Connect to these NATS servers, separated by commas [default: nats://127.0.0.1:4222] [env:
    /// ONCELY_NATS]
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
    /// Connect with the servers and login of this context of the nats tool [env:
    /// ONCELY_NATS_CONTEXT]
    #[arg(long, value_name = "NAME")]
    pub nats_context: Option<String>,
    /// Log in to NATS with this credentials file [env: ONCELY_NATS_CREDS]
    #[arg(long, value_name = "FILE")]
    pub nats_creds: Option<String>,
    /// Replicate each stream that hosts create: 1, 3, 5, or auto for 3 if the cluster has as many
    /// servers [default: auto] [env: ONCELY_STREAM_REPLICAS]
    #[arg(long, value_name = "COUNT")]
    pub stream_replicas: Option<String>,
    /// Take over the streams and consumers of this other installation, which no longer exists
    /// [default: none] [env: ONCELY_TAKE_OVER]
    #[arg(long, value_name = "ID")]
    pub take_over: Option<String>,
    /// Serve the control API at this address [default: 127.0.0.1:7420] [env: ONCELY_LISTEN]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Require this token from callers of the control API [default: generated and kept in the data
    /// folder] [env: ONCELY_TOKEN]
    #[arg(long, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Serve the console under these host names, too, separated by commas [default: names of this
    /// machine only] [env: ONCELY_CONSOLE_NAMES]
    #[arg(long, value_name = "NAMES")]
    pub console_names: Option<String>,
    /// Reach the console at this URL, whose host name is one of the console names, too [default:
    /// none] [env: ONCELY_CONSOLE_URL]
    #[arg(long, value_name = "URL")]
    pub console_url: Option<String>,
    /// Log in to the console with the OpenID Connect provider at this URL, too [default: none]
    /// [env: ONCELY_OIDC_ISSUER]
    #[arg(long, value_name = "URL")]
    pub oidc_issuer: Option<String>,
    /// Identify the console to the provider by this client id [env: ONCELY_OIDC_CLIENT_ID]
    #[arg(long, value_name = "ID")]
    pub oidc_client_id: Option<String>,
    /// Read the client secret from a variable, env:NAME, or from a file, file:PATH [default: a
    /// public client] [env: ONCELY_OIDC_CLIENT_SECRET]
    #[arg(long, value_name = "PLACE")]
    pub oidc_client_secret: Option<String>,
    /// Request these scopes, separated by spaces [default: openid profile email] [env:
    /// ONCELY_OIDC_SCOPES]
    #[arg(long, value_name = "SCOPES")]
    pub oidc_scopes: Option<String>,
    /// Read roles from this claim: a name, or a JSON pointer such as /realm_access/roles [default:
    /// groups] [env: ONCELY_OIDC_CLAIM]
    #[arg(long, value_name = "CLAIM")]
    pub oidc_claim: Option<String>,
    /// Grant roles to values of the claim, such as on-call=operate,staff=view [env:
    /// ONCELY_OIDC_ROLES]
    #[arg(long, value_name = "ROLES")]
    pub oidc_roles: Option<String>,
    /// End a session of the provider's users after this time [default: 8h] [env:
    /// ONCELY_OIDC_SESSION]
    #[arg(long, value_name = "TIME")]
    pub oidc_session: Option<String>,
    /// Serve HTTP requests at this address, or off [default: 127.0.0.1:7480] [env: ONCELY_HTTP]
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<String>,
    /// Identify callers by this header; each caller has its own idempotency keys [default:
    /// Authorization] [env: ONCELY_HTTP_CALLER]
    #[arg(long, value_name = "HEADER")]
    pub http_caller: Option<String>,
    /// Allow POST /publish/SUBJECT for these subjects, separated by commas [default: none] [env:
    /// ONCELY_HTTP_PUBLISH]
    #[arg(long, value_name = "SUBJECTS")]
    pub http_publish: Option<String>,
    /// Keep at most this many connections open for requests; lowered to the limit on open files
    /// [default: 1024] [env: ONCELY_HTTP_CONNECTIONS]
    #[arg(long, value_name = "COUNT")]
    pub http_connections: Option<String>,
    /// Limit the memory for the bodies of requests and responses [default: 128MiB] [env:
    /// ONCELY_HTTP_MEMORY]
    #[arg(long, value_name = "SIZE")]
    pub http_memory: Option<String>,
    /// Limit the time to receive the head of a request [default: 10s] [env:
    /// ONCELY_HTTP_HEAD_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    pub http_head_timeout: Option<String>,
    /// Limit the time to transfer a body, plus one second for every 16 KiB [default: 30s] [env:
    /// ONCELY_HTTP_BODY_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    pub http_body_timeout: Option<String>,
    /// Close a connection that is idle for this long [default: 75s] [env: ONCELY_HTTP_IDLE_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    pub http_idle_timeout: Option<String>,
    /// Keep the host's local files in this folder [default: .oncely] [env: ONCELY_DATA_DIR]
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: Option<String>,
    /// Write log lines as text or json [default: text] [env: ONCELY_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Filter log lines by a level, or by directives such as oncely=debug,info [default: info]
    /// [env: ONCELY_LOG_LEVEL]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Finish work in progress for at most this long on shutdown [default: 30s] [env: ONCELY_DRAIN]
    #[arg(long, value_name = "TIME")]
    pub drain: Option<String>,
    /// Keep published outputs for this long, in case a stream loses them [default: 15m] [env:
    /// ONCELY_KEEP_OUTPUTS]
    #[arg(long, value_name = "TIME")]
    pub keep_outputs: Option<String>,
    /// Publish outputs on PostgreSQL by polling (poll) or from the WAL (wal), for all hosts of the
    /// database [default: unchanged, poll at first] [env: ONCELY_RELAY]
    #[arg(long, value_name = "MODE")]
    pub relay: Option<String>,
    /// Read the WAL over this postgres:// URL of the server itself, if the database URL names a
    /// pooler [default: the database URL] [env: ONCELY_RELAY_DATABASE]
    #[arg(long, value_name = "URL")]
    pub relay_database: Option<String>,
    /// Return to polling when the server retains more WAL than this for the relay [default: 4GiB]
    /// [env: ONCELY_RELAY_SLOT_MAX]
    #[arg(long, value_name = "SIZE")]
    pub relay_slot_max: Option<String>,
    /// Remember handled messages for this long, or auto for one day longer than the streams keep
    /// messages [default: auto] [env: ONCELY_KEEP_INBOX]
    #[arg(long, value_name = "TIME")]
    pub keep_inbox: Option<String>,
    /// Archive old inbox records and outputs as files in this folder before they are deleted
    /// [default: none] [env: ONCELY_ARCHIVE]
    #[arg(long, value_name = "FOLDER")]
    pub archive: Option<String>,
    /// Close a checkpoint this often, so that receipts can be issued, or off [default: off] [env:
    /// ONCELY_RECEIPTS]
    #[arg(long, value_name = "TIME")]
    pub receipts: Option<String>,
    /// Issue receipts of events for this long after they were settled [default: 7d] [env:
    /// ONCELY_KEEP_RECEIPTS]
    #[arg(long, value_name = "TIME")]
    pub keep_receipts: Option<String>,
    /// Post alarms to this http or https URL [default: none] [env: ONCELY_WEBHOOK]
    #[arg(long, value_name = "URL")]
    pub webhook: Option<String>,
    /// Sign these posts with this secret: whsec_ and Base64 [default: unsigned] [env:
    /// ONCELY_WEBHOOK_SECRET]
    #[arg(long, value_name = "SECRET")]
    pub webhook_secret: Option<String>,
    /// Limit the memory for cached values; 0 for none [default: 64MiB] [env: ONCELY_CACHE_SIZE]
    #[arg(long, value_name = "SIZE")]
    pub cache_size: Option<String>,
    /// Use this Redis or Valkey as a cache that all hosts share [default: none] [env:
    /// ONCELY_CACHE_URL]
    #[arg(long, value_name = "URL")]
    pub cache_url: Option<String>,
    /// Limit the processor time to compile one component [default: 2m] [env: ONCELY_COMPILE_TIME]
    #[arg(long, value_name = "TIME")]
    pub compile_time: Option<String>,
    /// Limit the memory to compile one component [default: 2GiB] [env: ONCELY_COMPILE_MEMORY]
    #[arg(long, value_name = "SIZE")]
    pub compile_memory: Option<String>,
    /// Run only components that are signed by one of the public keys in this PEM file [default:
    /// any component] [env: ONCELY_COMPONENT_KEYS]
    #[arg(long, value_name = "FILE")]
    pub component_keys: Option<String>,
    /// Export traces to the OpenTelemetry collector at this URL, or off [default: off] [env:
    /// ONCELY_TRACES]
    #[arg(long, value_name = "URL")]
    pub traces: Option<String>,
    /// Export traces under this service name [default: oncely] [env: ONCELY_TRACES_SERVICE]
    #[arg(long, value_name = "NAME")]
    pub traces_service: Option<String>,
    /// Record this share of new traces, between 0 and 1 [default: 1] [env:
    /// ONCELY_TRACES_SAMPLING]
    #[arg(long, value_name = "SHARE")]
    pub traces_sampling: Option<String>,
}

/// The checked configuration of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    /// The database of the installation, shared by all of its hosts.
    pub database: Database,
    /// The maximum number of database connections.
    pub pool_size: u32,
    /// How workers' SQL is kept from the platform's tables.
    pub guest_sql: GuestSql,
    /// The NATS servers and the login for them.
    pub nats: Nats,
    /// Replicas of each stream that hosts create; `None` for as many as there are servers, up to
    /// three.
    pub stream_replicas: Option<usize>,
    /// The id of another installation on this NATS whose streams and consumers this one takes over.
    pub take_over: Option<String>,
    /// The address of the control API.
    pub listen: SocketAddr,
    /// The configured token of the control API; if `None`, see
    /// [`HostConfig::load_or_create_token`].
    pub token: Option<Secret>,
    /// The host names of the console besides those of this machine itself.
    pub console_names: Vec<String>,
    /// The URL of the console for browsers.
    pub console_url: Option<ConsoleUrl>,
    /// The login with an OpenID Connect provider.
    pub oidc: Option<OidcSettings>,
    /// The address for HTTP requests; `None` if they are off.
    pub http: Option<SocketAddr>,
    /// The header that identifies callers, and the subjects that they may publish to.
    pub admission: Admission,
    /// The limits on connections, memory and time for HTTP requests.
    pub http_limits: HttpLimits,
    /// The folder for the token, compiled components, and the SQLite file unless `database` names
    /// another.
    pub data_dir: PathBuf,
    /// The form of the log lines on standard error.
    pub log_format: LogFormat,
    /// Directives for `tracing_subscriber::filter::Targets`.
    pub log_level: String,
    /// How long a host finishes its work on shutdown.
    pub drain: Duration,
    /// How long published outputs are kept.
    pub keep_outputs: Duration,
    /// The relay mode; `None` to leave it unchanged.
    pub relay: Option<RelayMode>,
    /// A `postgres://` URL of the server itself, not of a pooler.
    pub relay_database: Option<Database>,
    /// How much WAL the server may retain for the relay, in bytes.
    pub relay_slot_max: u64,
    /// How long handled messages are remembered.
    pub keep_inbox: KeepInbox,
    /// The folder in which old rows are archived before they are deleted.
    pub archive: Option<PathBuf>,
    /// The time between two checkpoints of receipts; `None` if they are off.
    pub receipts: Option<Duration>,
    /// How long receipts can be issued.
    pub keep_receipts: Duration,
    /// The webhook for alarms.
    pub webhook: Option<Webhook>,
    /// The secret that signs these posts.
    pub webhook_secret: Option<Secret>,
    /// The memory limit of the cache, and the URL of the shared cache.
    pub cache: CacheSettings,
    /// The limits of time and memory for compiling one component.
    pub compile: CompileSettings,
    /// The keys by which components have to be signed; `None` if unsigned ones may run.
    pub component_keys: Option<PublicKeys>,
    /// The configuration file, if it contains a secret.
    pub file_with_secrets: Option<PathBuf>,
    /// The export of traces.
    pub traces: TraceSettings,
}

/// The relay mode: how outputs are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayMode {
    /// Hosts publish outputs from memory, and the poller publishes the rest.
    Poll,
    /// One host reads them from the PostgreSQL WAL.
    Wal,
}

/// How long handled messages are remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepInbox {
    /// One day longer than the streams keep messages.
    Auto,
    /// This long, counted from the transaction that handled the message.
    For(Duration),
}

/// The kind and address of the database.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// The path of the database file.
    Sqlite(PathBuf),
    /// A `postgres://` URL, password included. It must not be shown unredacted.
    Postgres(String),
}

/// How workers' SQL is kept from the platform's tables on PostgreSQL. On SQLite it is always
/// restricted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestSql {
    /// By database privileges of the app's own login role, after the statement filter.
    Restricted,
    /// By the statement filter alone, for databases that do not allow creating roles.
    Trusted,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text without colors, one line per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl HostConfig {
    /// Resolves the configuration from flags, the environment and the file.
    ///
    /// # Errors
    /// A setting is invalid, or the file cannot be read. Each error names its source and has a
    /// hint.
    pub fn load(flags: &HostFlags) -> anyhow::Result<HostConfig> {
        Self::resolve(flags, &|name| {
            std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
        })
    }

    /// Like [`HostConfig::load`], with the environment as an argument. An empty variable counts as
    /// unset.
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
        let (oidc, console_url) = oidc::resolve(&sources, env)?;
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
            console_names: console_names(&sources)?,
            console_url,
            oidc,
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
                .map_or(Ok(KEEP_OUTPUTS), |setting| keep_outputs(&setting))?,
            keep_inbox: sources
                .get("keep_inbox")
                .map_or(Ok(KeepInbox::Auto), |setting| keep_inbox(&setting))?,
            archive: sources
                .get("archive")
                .map(|setting| archive(&setting))
                .transpose()?,
            receipts: sources.get("receipts").map_or(Ok(None), |setting| {
                receipts(&setting, sources.get("keep_outputs"))
            })?,
            keep_receipts: sources
                .get("keep_receipts")
                .map_or(Ok(KEEP_RECEIPTS), |setting| keep_receipts(&setting))?,
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
            component_keys: sources
                .get("component_keys")
                .map(|setting| component_keys::component_keys(&setting))
                .transpose()?,
            file_with_secrets: sources.file_with_secrets(),
            traces: traces::resolve(&sources, env)?,
            data_dir,
        })
    }

    /// The configured token, else the one in the data folder, which is created if it does not
    /// exist.
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
                "it names several PostgreSQL servers, but a host connects to one address",
                "use a virtual address that follows the primary, \
                 or a pooler in front of the servers"
                    .to_owned(),
            ));
        }
        return Ok(Database::Postgres(value.to_owned()));
    }
    let path = match value.split_once(':') {
        Some(("sqlite", path)) => path.strip_prefix("//").unwrap_or(path),
        // The rest of the value may contain a password, so it is not repeated.
        Some((scheme, rest)) if rest.starts_with("//") => {
            return wrong(&format!("`{scheme}://` is not a supported database"));
        }
        _ => value,
    };
    if path.is_empty() || path.contains(":memory:") {
        return wrong("it must name a file: an in-memory database would lose the inbox");
    }
    if value.starts_with("sqlite:") && path.contains('?') {
        return wrong("options after `?` are not supported for SQLite");
    }
    Ok(Database::Sqlite(setting.resolve_path(path)))
}

/// Whether a `postgres://` URL lists several hosts, as libpq allows: after the login, before the
/// database name.
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
            "`wal` reads the WAL of a PostgreSQL server, but the database is SQLite",
            "omit it, or set `database` to a postgres:// URL".to_owned(),
        )),
        _ => Err(setting.refuse_value("is neither `poll` nor `wal`", "wal")),
    }
}

fn relay_database(setting: &Setting) -> anyhow::Result<Database> {
    match database(setting)? {
        Database::Postgres(url) => Ok(Database::Postgres(url)),
        Database::Sqlite(_) => Err(setting.refuse(
            "it must be the URL of a PostgreSQL server behind a pooler",
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

fn console_names(sources: &Sources<'_>) -> anyhow::Result<Vec<String>> {
    let Some(setting) = sources.get("console_names") else {
        return Ok(Vec::new());
    };
    let names = setting.value.split(',').map(|name| name.trim().to_owned());
    let names: Vec<String> = names.collect();
    let is_name = |name: &String| {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        !name.is_empty() && name.chars().all(is_part)
    };
    if names.iter().all(is_name) {
        return Ok(names);
    }
    Err(setting.refuse_value("is not a host name without a port", "oncely.example.com"))
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
        let what = format!("`{address}` is reachable from other machines, but no token is set");
        return Err(setting.refuse_with_hint(
            what,
            format!(
                "set a token: ONCELY_TOKEN=$(openssl rand -hex 32), or listen on {LISTEN_ADDRESS}"
            ),
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
        _ => Err(setting.refuse_value("is not a duration of up to 1h", "30s")),
    }
}

fn keep_outputs(setting: &Setting) -> anyhow::Result<Duration> {
    let (least, most) = (
        Duration::from_secs(60),
        Duration::from_secs(30 * 24 * 60 * 60),
    );
    match units::parse_duration(&setting.value) {
        Ok(keep) if (least..=most).contains(&keep) => Ok(keep),
        _ => Err(setting.refuse_value("is not a duration between 1m and 30d", "15m")),
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
            "is neither `auto` nor a duration between 1m and 3650d",
            "auto",
        )),
    }
}

/// A checkpoint has to be closed while the outbox still has the outputs.
fn receipts(setting: &Setting, outputs: Option<Setting>) -> anyhow::Result<Option<Duration>> {
    let kept = outputs.map_or(Ok(KEEP_OUTPUTS), |setting| keep_outputs(&setting))?;
    let (least, most) = (Duration::from_secs(1), kept / 2);
    match (
        setting.value.as_str(),
        units::parse_duration(&setting.value),
    ) {
        ("off", _) => Ok(None),
        (_, Ok(interval)) if (least..=most).contains(&interval) => Ok(Some(interval)),
        _ => Err(setting.refuse_value(
            "is neither `off` nor a duration between 1s and half of `keep_outputs`",
            "1m",
        )),
    }
}

fn keep_receipts(setting: &Setting) -> anyhow::Result<Duration> {
    let (least, most) = (
        Duration::from_secs(60 * 60),
        Duration::from_secs(10 * 365 * 24 * 60 * 60),
    );
    match units::parse_duration(&setting.value) {
        Ok(keep) if (least..=most).contains(&keep) => Ok(keep),
        _ => Err(setting.refuse_value("is not a duration between 1h and 3650d", "7d")),
    }
}

/// Checks that the folder is writable or can be created, while an operator can still see the error.
fn archive(setting: &Setting) -> anyhow::Result<PathBuf> {
    let folder = setting.path();
    let absolute = std::path::absolute(&folder).unwrap_or_else(|_| folder.clone());
    let existing = absolute.ancestors().find(|path| path.exists());
    tempfile::tempfile_in(existing.unwrap_or(&absolute)).map_err(|error| {
        setting.refuse(
            format!("{} is not writable: {error}", folder.display()),
            "/var/lib/oncely/archive",
        )
    })?;
    Ok(folder)
}

impl Database {
    /// The database without its password, for display.
    pub fn redacted(&self) -> String {
        match self {
            Database::Sqlite(path) => format!("sqlite:{}", path.display()),
            Database::Postgres(url) => without_password(url),
        }
    }
}

/// A URL without its password and its parameters, which may contain one too.
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
    /// Wraps a text. [`Secret::reveal`] returns it.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, to send or compare it.
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
