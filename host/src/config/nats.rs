//! The NATS servers and login: a URL, a context of the `nats` tool, a credentials file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use percent_encoding::percent_decode_str;
use serde::Deserialize;

use crate::config::sources::{Setting, Sources};
use crate::config::{Secret, without_password};

/// The connection settings for NATS.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Nats {
    /// At least one server: `nats://…`, `tls://…` or `host:port`, possibly with a password.
    pub servers: Vec<String>,
    /// The login read at the start. [`Nats::current_login`] has the current one.
    pub login: Login,
    /// The context file, if the login comes from a context. It is read again for each connection.
    pub context: Option<Context>,
    /// Whether the TLS handshake precedes the server's `INFO`.
    pub tls_first: bool,
    /// The prefix of inbox subjects; `None` for `_INBOX`.
    pub inbox_prefix: Option<String>,
    /// The JetStream API to use; it determines the prefix of its subjects.
    pub jetstream: JetStreamApi,
    /// A certificate authority's certificate, in PEM.
    pub root_certificate: Option<PathBuf>,
    /// The client's own certificate and key, in PEM.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
}

/// A context of the `nats` tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    file: PathBuf,
    /// The folder that `~` stands for.
    home: PathBuf,
}

/// The JetStream API to use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum JetStreamApi {
    /// The API of the account itself, under `$JS.API`.
    #[default]
    Local,
    /// The API of the domain with this name, under `$JS.NAME.API`.
    Domain(String),
    /// An API under other subjects, for example one imported from another account.
    Prefix(String),
}

/// The login for the servers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Login {
    /// No login.
    #[default]
    None,
    /// A user and a password, from a URL or a context.
    Password {
        /// The user name, without percent-encoding.
        user: String,
        /// The password of that user.
        password: Secret,
    },
    /// A token, from a URL or a context.
    Token(Secret),
    /// A file with the seed of an nkey.
    Nkey(PathBuf),
    /// A credentials file: a JWT and the seed of its nkey.
    Credentials(PathBuf),
    /// A JWT, and a file with the seed of its nkey unless it is a bearer token.
    Jwt {
        /// The token that identifies the user.
        jwt: Secret,
        /// The file with the seed; `None` for a bearer token.
        seed: Option<PathBuf>,
    },
}

/// A context file of the `nats` tool; an empty value counts as unset.
#[derive(Deserialize, Default)]
#[serde(default)]
struct ContextFile {
    url: String,
    user: String,
    password: String,
    token: String,
    creds: String,
    nkey: String,
    ca: String,
    cert: String,
    key: String,
    user_jwt: String,
    tls_first: bool,
    inbox_prefix: String,
    jetstream_domain: String,
    jetstream_api_prefix: String,
    /// All others.
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

impl Context {
    /// The file of the context.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }
}

/// Keys of a context that have no effect here.
const IGNORED_KEYS: [&str; 3] = ["description", "color_scheme", "jetstream_event_prefix"];

/// Resolves the context first; `nats` and `nats_creds` override its values.
pub(super) fn resolve(
    sources: &Sources<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<Nats> {
    let home = env("HOME").map(PathBuf::from).unwrap_or_default();
    let setting = sources.get("nats_context");
    let file = setting
        .as_ref()
        .map(|setting| context_file(setting, &home, env))
        .transpose()?;
    let context = file
        .as_deref()
        .map(read_context)
        .transpose()?
        .unwrap_or_default();
    if let (Some(setting), Some(other)) = (&setting, context.unsupported()) {
        let what = format!("names a context with `{other}`, which hosts do not support");
        return Err(setting.refuse_value(&what, "a context without it"));
    }

    // Settings override the context.
    let path = |text: &str| expand_home(&home, text);
    let non_empty = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());

    let url = sources.get("nats").or_else(|| {
        let from_context = setting.clone().zip(non_empty(&context.url));
        from_context.map(|(setting, url)| setting.with_value(url))
    });
    let servers =
        servers(&url.unwrap_or_else(|| Setting::default_of("nats", "nats://127.0.0.1:4222")))?;
    let login = match sources.get("nats_creds") {
        Some(setting) => Login::Credentials(existing_file(&setting, setting.path())?),
        None => login_in_url(&servers).unwrap_or_else(|| login(&context, path)),
    };
    let is_from_context = login != Login::None && login == context_login(&context, path);
    Ok(Nats {
        servers,
        login,
        context: file.filter(|_| is_from_context).map(|file| Context {
            file,
            home: home.clone(),
        }),
        tls_first: context.tls_first,
        inbox_prefix: non_empty(&context.inbox_prefix),
        jetstream: match (
            non_empty(&context.jetstream_domain),
            non_empty(&context.jetstream_api_prefix),
        ) {
            (_, Some(prefix)) => JetStreamApi::Prefix(prefix.trim_end_matches('.').to_owned()),
            (Some(domain), None) => JetStreamApi::Domain(domain),
            (None, None) => JetStreamApi::Local,
        },
        root_certificate: non_empty(&context.ca).map(|text| path(&text)),
        client_certificate: non_empty(&context.cert)
            .zip(non_empty(&context.key))
            .map(|(c, k)| (path(&c), path(&k))),
    })
}

/// The first login in a URL: `user:password@`, or a token alone. The client library ignores logins
/// in URLs.
fn login_in_url(servers: &[String]) -> Option<Login> {
    let place = |server: &str| {
        server
            .split_once("://")
            .map_or(server, |(_, place)| place)
            .to_owned()
    };
    let login = servers
        .iter()
        .find_map(|server| Some(place(server).rsplit_once('@')?.0.to_owned()))?;
    let plain = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some(match login.split_once(':') {
        Some((user, password)) => Login::Password {
            user: plain(user),
            password: Secret::new(plain(password)),
        },
        None => Login::Token(Secret::new(plain(&login))),
    })
}

/// The login of a context: one in its URL, or one of its own keys.
fn context_login(context: &ContextFile, path: impl Fn(&str) -> PathBuf) -> Login {
    let servers: Vec<String> = context.url.split(',').map(str::to_owned).collect();
    login_in_url(&servers).unwrap_or_else(|| login(context, path))
}

fn login(context: &ContextFile, path: impl Fn(&str) -> PathBuf) -> Login {
    if !context.user_jwt.is_empty() {
        let seed = Some(&context.nkey)
            .filter(|seed| !seed.is_empty())
            .map(|seed| path(seed));
        Login::Jwt {
            jwt: Secret::new(&context.user_jwt),
            seed,
        }
    } else if !context.creds.is_empty() {
        Login::Credentials(path(&context.creds))
    } else if !context.nkey.is_empty() {
        Login::Nkey(path(&context.nkey))
    } else if !context.token.is_empty() {
        Login::Token(Secret::new(&context.token))
    } else if !context.user.is_empty() {
        Login::Password {
            user: context.user.clone(),
            password: Secret::new(&context.password),
        }
    } else {
        Login::None
    }
}

fn expand_home(home: &Path, text: &str) -> PathBuf {
    text.strip_prefix("~/")
        .map_or_else(|| PathBuf::from(text), |rest| home.join(rest))
}

impl ContextFile {
    /// An unknown key that is set, and may change the meaning of the others.
    fn unsupported(&self) -> Option<&str> {
        let is_unset = |value: &serde_json::Value| match value {
            serde_json::Value::Null | serde_json::Value::Bool(false) => true,
            serde_json::Value::String(text) => text.is_empty(),
            serde_json::Value::Array(items) => items.is_empty(),
            _ => false,
        };
        let others = self.others.iter().filter(|(_, value)| !is_unset(value));
        others
            .map(|(name, _)| name.as_str())
            .find(|name| !IGNORED_KEYS.contains(name))
    }
}

impl Nats {
    /// The current login. A context is read again, so that a rotated login takes effect.
    ///
    /// # Errors
    /// The context file is missing or malformed.
    pub fn current_login(&self) -> anyhow::Result<Login> {
        let Some(Context { file, home }) = &self.context else {
            return Ok(self.login.clone());
        };
        Ok(context_login(&read_context(file)?, |text: &str| {
            expand_home(home, text)
        }))
    }

    /// The subject prefix of the JetStream API.
    pub fn api_prefix(&self) -> String {
        match &self.jetstream {
            JetStreamApi::Local => "$JS.API".to_owned(),
            JetStreamApi::Domain(domain) => format!("$JS.{domain}.API"),
            JetStreamApi::Prefix(prefix) => prefix.clone(),
        }
    }
}

fn context_file(
    setting: &Setting,
    home: &Path,
    env: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<PathBuf> {
    let name = &setting.value;
    if name.starts_with('.') || name.contains(['/', '\\']) {
        return Err(setting.refuse_value("is not a context name", "production"));
    }
    let base = env("XDG_CONFIG_HOME")
        .filter(|base| !base.is_empty())
        .map(PathBuf::from);
    let file = base
        .unwrap_or_else(|| home.join(".config"))
        .join("nats/context")
        .join(format!("{name}.json"));
    if !file.is_file() {
        let what = format!("there is no NATS context `{name}` at {}", file.display());
        return Err(setting.refuse_with_hint(what, "list the contexts: nats context ls".to_owned()));
    }
    Ok(file)
}

fn read_context(file: &Path) -> anyhow::Result<ContextFile> {
    let text =
        std::fs::read(file).with_context(|| format!("read the NATS context {}", file.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("parse the NATS context {}", file.display()))
}

fn servers(setting: &Setting) -> anyhow::Result<Vec<String>> {
    let servers: Vec<String> = setting
        .value
        .split(',')
        .map(|server| server.trim().to_owned())
        .collect();
    for server in &servers {
        let (scheme, place) = server.split_once("://").unwrap_or(("nats", server));
        if !["nats", "tls"].contains(&scheme) {
            let what = format!("`{scheme}://` is not a supported scheme; use nats or tls");
            return Err(setting.refuse(what, "nats://127.0.0.1:4222"));
        }
        if place.is_empty() || place.contains(char::is_whitespace) {
            return Err(setting.refuse("it names no server", "nats://127.0.0.1:4222"));
        }
    }
    Ok(servers)
}

fn existing_file(setting: &Setting, path: PathBuf) -> anyhow::Result<PathBuf> {
    if path.is_file() {
        return Ok(path);
    }
    Err(setting.refuse(format!("there is no file {}", path.display()), "host.creds"))
}

impl Nats {
    /// The servers without passwords, for display.
    pub fn redacted(&self) -> String {
        let shown = self
            .servers
            .iter()
            .map(|server| match server.split_once("://") {
                Some(_) => without_password(server),
                None => without_password(&format!("nats://{server}")),
            });
        shown.collect::<Vec<_>>().join(",")
    }
}

impl std::fmt::Debug for Nats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nats")
            .field("servers", &self.redacted())
            .field("login", &self.login)
            .finish_non_exhaustive()
    }
}
