//! Where NATS is and as whom to connect: a URL, a context of the `nats` tool, a credentials file.

use std::path::{Path, PathBuf};

use anyhow::Context;
use percent_encoding::percent_decode_str;
use serde::Deserialize;

use crate::config::sources::{Given, Sources};
use crate::config::{Secret, without_password};

/// How to reach NATS.
#[derive(Clone, PartialEq, Eq)]
pub struct Nats {
    /// At least one; each `nats://…`, `tls://…` or `host:port`. They may hold a password.
    pub servers: Vec<String>,
    pub login: Login,
    /// A certificate authority's certificate, in PEM.
    pub root_certificate: Option<PathBuf>,
    /// The client's own certificate and key, in PEM.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
}

/// As whom to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    /// As nobody.
    None,
    Password {
        user: String,
        password: Secret,
    },
    Token(Secret),
    /// A file with the seed of an nkey.
    Nkey(PathBuf),
    /// A credentials file: a JWT and the seed of its nkey.
    Credentials(PathBuf),
}

/// A context as the `nats` tool keeps it; what is empty there is not set.
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
}

/// The context first; `nats` and `nats_creds` take the place of what it says.
pub(super) fn resolve(sources: &Sources<'_>, env: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Nats> {
    let home = env("HOME").map(PathBuf::from).unwrap_or_default();
    let given = sources.get("nats_context");
    let context = given.as_ref().map(|given| read_context(given, &home, env)).transpose()?.unwrap_or_default();
    let path = |text: &str| text.strip_prefix("~/").map_or_else(|| PathBuf::from(text), |rest| home.join(rest));
    let present = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());

    let url = sources.get("nats").or_else(|| {
        let of_context = given.clone().zip(present(&context.url));
        of_context.map(|(given, url)| given.holding(url))
    });
    let servers = servers(&url.unwrap_or_else(|| Given::default_of("nats", "nats://127.0.0.1:4222")))?;
    let login = match sources.get("nats_creds") {
        Some(given) => Login::Credentials(existing_file(&given, given.path())?),
        None => login_in_url(&servers).unwrap_or_else(|| login(&context, path)),
    };
    Ok(Nats {
        servers,
        login,
        root_certificate: present(&context.ca).map(|text| path(&text)),
        client_certificate: present(&context.cert).zip(present(&context.key)).map(|(c, k)| (path(&c), path(&k))),
    })
}

/// The first login that stands in a URL: `user:password@`, or a token alone. The NATS client itself looks at none.
fn login_in_url(servers: &[String]) -> Option<Login> {
    let place = |server: &str| server.split_once("://").map_or(server, |(_, place)| place).to_owned();
    let login = servers.iter().find_map(|server| Some(place(server).rsplit_once('@')?.0.to_owned()))?;
    let plain = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some(match login.split_once(':') {
        Some((user, password)) => Login::Password { user: plain(user), password: Secret::new(plain(password)) },
        None => Login::Token(Secret::new(plain(&login))),
    })
}

fn login(context: &ContextFile, path: impl Fn(&str) -> PathBuf) -> Login {
    if !context.creds.is_empty() {
        Login::Credentials(path(&context.creds))
    } else if !context.nkey.is_empty() {
        Login::Nkey(path(&context.nkey))
    } else if !context.token.is_empty() {
        Login::Token(Secret::new(&context.token))
    } else if !context.user.is_empty() {
        Login::Password { user: context.user.clone(), password: Secret::new(&context.password) }
    } else {
        Login::None
    }
}

fn read_context(given: &Given, home: &Path, env: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<ContextFile> {
    let name = &given.value;
    if name.starts_with('.') || name.contains(['/', '\\']) {
        return Err(given.refuse_value("is not the name of a context", "production"));
    }
    let base = env("XDG_CONFIG_HOME").filter(|base| !base.is_empty()).map(PathBuf::from);
    let file = base.unwrap_or_else(|| home.join(".config")).join("nats/context").join(format!("{name}.json"));
    if !file.is_file() {
        let what = format!("there is no NATS context `{name}` at {}", file.display());
        return Err(given.refuse_with_hint(what, "list those there are: nats context ls".to_owned()));
    }
    let text = std::fs::read(&file).with_context(|| format!("read the NATS context {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("understand the NATS context {}", file.display()))
}

fn servers(given: &Given) -> anyhow::Result<Vec<String>> {
    let servers: Vec<String> = given.value.split(',').map(|server| server.trim().to_owned()).collect();
    for server in &servers {
        let (scheme, place) = server.split_once("://").unwrap_or(("nats", server));
        if !["nats", "tls"].contains(&scheme) {
            let what = format!("`{scheme}://` is no way to NATS here; there are nats and tls");
            return Err(given.refuse(what, "nats://127.0.0.1:4222"));
        }
        if place.is_empty() || place.contains(char::is_whitespace) {
            return Err(given.refuse("it names no server", "nats://127.0.0.1:4222"));
        }
    }
    Ok(servers)
}

fn existing_file(given: &Given, path: PathBuf) -> anyhow::Result<PathBuf> {
    if path.is_file() {
        return Ok(path);
    }
    Err(given.refuse(format!("there is no file {}", path.display()), "host.creds"))
}

impl Nats {
    /// For people: the servers, without passwords.
    pub fn shown(&self) -> String {
        let shown = self.servers.iter().map(|server| match server.split_once("://") {
            Some(_) => without_password(server),
            None => without_password(&format!("nats://{server}")),
        });
        shown.collect::<Vec<_>>().join(",")
    }
}

impl std::fmt::Debug for Nats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nats").field("servers", &self.shown()).field("login", &self.login).finish_non_exhaustive()
    }
}
