//! The login to the console with an OpenID Connect provider, and the public URL of the console.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use axum::http::Uri;

use super::Secret;
use super::manifest::SecretReference;
use super::sources::{Setting, Sources};
use crate::model::hint::WithHint;
use crate::model::role::Role;
use crate::model::units;

const ISSUER_EXAMPLE: &str = "https://login.example.com/realms/ops";
const CONSOLE_EXAMPLE: &str = "https://oncely.example.com";
const ROLES_EXAMPLE: &str = "on-call=operate, platform=deploy, staff=view";
const SECRET_EXAMPLE: &str = "file:/etc/oncely/oidc-secret";

/// The settings that a login needs, besides the issuer.
const NEEDED: [(&str, &str); 3] = [
    ("oidc_client_id", "oncely"),
    ("oidc_roles", ROLES_EXAMPLE),
    ("console_url", CONSOLE_EXAMPLE),
];

/// The settings that mean nothing without an issuer.
const DEPENDENT: [&str; 6] = [
    "oidc_client_id",
    "oidc_client_secret",
    "oidc_scopes",
    "oidc_claim",
    "oidc_roles",
    "oidc_session",
];

/// The longest session.
const SESSION_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The provider, this client of it, and the roles of its users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OidcSettings {
    /// The URL of the provider, exactly as its tokens name it.
    pub issuer: String,
    /// The id of the console at the provider.
    pub client_id: String,
    /// The secret of the console at the provider; `None` for a public client.
    pub client_secret: Option<Secret>,
    /// The file of the secret, if it is in one.
    pub client_secret_file: Option<PathBuf>,
    /// The requested scopes, `openid` among them.
    pub scopes: Vec<String>,
    /// The claim with the values that have roles: a name, or a JSON pointer such as `/a/b`.
    pub claim: String,
    /// The role of each value.
    pub roles: Vec<(String, Role)>,
    /// How long a session lasts.
    pub session: Duration,
}

impl OidcSettings {
    /// The issuer without its scheme, for display and as a part of names.
    pub fn issuer_short(&self) -> &str {
        let (_, rest) = self.issuer.split_once("://").unwrap_or_default();
        rest.trim_end_matches('/')
    }
}

/// The public URL of the console: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleUrl {
    /// Without a slash at its end.
    url: String,
    /// Host and port, as a `Host` header has them.
    pub authority: String,
    /// The name or the address, without brackets.
    pub host: String,
    /// Whether browsers use HTTPS.
    pub is_https: bool,
}

impl ConsoleUrl {
    /// The URL of a path that begins with a slash.
    pub fn join(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }
}

/// The provider and the URL of the console; each `None` if it is not set.
pub(super) fn resolve(
    sources: &Sources<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<(Option<OidcSettings>, Option<ConsoleUrl>)> {
    let url = sources.get("console_url");
    let url = url.map(|setting| console_url(&setting)).transpose()?;
    let Some(issuer) = sources.get("oidc_issuer") else {
        return match DEPENDENT.into_iter().find_map(|key| sources.get(key)) {
            Some(setting) => Err(setting.refuse_with_hint(
                "it has no effect without `oidc_issuer`",
                format!(
                    "set the URL of the provider, for example: oidc_issuer = \"{ISSUER_EXAMPLE}\""
                ),
            )),
            None => Ok((None, url)),
        };
    };
    for (key, example) in NEEDED {
        if sources.get(key).is_none() {
            let error = anyhow!("`oidc_issuer` is set, but `{key}` is not");
            return Err(error.hint(format!("set it, for example: {key} = \"{example}\"")));
        }
    }
    let get = |key| sources.get(key);
    let secret = get("oidc_client_secret");
    let secret = secret.map(|setting| client_secret(&setting, env));
    let (client_secret, client_secret_file) = secret.transpose()?.unzip();
    let settings = OidcSettings {
        issuer: self::issuer(&issuer)?,
        client_id: get("oidc_client_id")
            .map_or(Ok(String::new()), |setting| client_id(&setting))?,
        client_secret,
        client_secret_file: client_secret_file.flatten(),
        scopes: scopes(
            &get("oidc_scopes")
                .unwrap_or_else(|| Setting::default_of("oidc_scopes", "openid profile email")),
        )?,
        claim: get("oidc_claim").map_or_else(|| "groups".to_owned(), |setting| setting.value),
        roles: get("oidc_roles").map_or(Ok(Vec::new()), |setting| roles(&setting))?,
        session: get("oidc_session").map_or(Ok(Duration::from_secs(8 * 60 * 60)), |setting| {
            session(&setting)
        })?,
    };
    Ok((Some(settings), url))
}

/// A URL with a host, without a login, a query or a fragment, and with TLS unless it is of this
/// machine.
fn url_of(setting: &Setting, example: &str) -> anyhow::Result<Uri> {
    let uri: Uri = setting
        .value
        .parse()
        .map_err(|_| setting.refuse_value("is not a URL", example))?;
    let Some(host) = uri.host().filter(|host| !host.is_empty()) else {
        return Err(setting.refuse_value("is not a URL with a host", example));
    };
    let has_login = uri
        .authority()
        .is_some_and(|place| place.as_str().contains('@'));
    if has_login || uri.query().is_some() || setting.value.contains('#') {
        return Err(setting.refuse("it contains a login, a query or a fragment", example));
    }
    match uri.scheme_str() {
        Some("https") => Ok(uri),
        Some("http") if is_loopback(host) => Ok(uri),
        Some("http") => {
            Err(setting.refuse_value("has no TLS, which only this machine may", example))
        }
        _ => Err(setting.refuse_value("does not begin with https://", example)),
    }
}

/// Whether a host is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn console_url(setting: &Setting) -> anyhow::Result<ConsoleUrl> {
    let uri = url_of(setting, CONSOLE_EXAMPLE)?;
    if !matches!(uri.path(), "" | "/") {
        return Err(setting.refuse_value("has a path, which the console has not", CONSOLE_EXAMPLE));
    }
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    let scheme = uri.scheme_str().unwrap_or_default();
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    Ok(ConsoleUrl {
        url: format!("{scheme}://{authority}"),
        host: host.to_ascii_lowercase(),
        is_https: scheme == "https",
        authority,
    })
}

fn issuer(setting: &Setting) -> anyhow::Result<String> {
    url_of(setting, ISSUER_EXAMPLE)?;
    Ok(setting.value.clone())
}

fn client_id(setting: &Setting) -> anyhow::Result<String> {
    if setting
        .value
        .bytes()
        .all(|byte| (b' '..=b'~').contains(&byte))
    {
        return Ok(setting.value.clone());
    }
    Err(setting.refuse_value("is not printable ASCII", "oncely"))
}

/// The secret, and its file.
fn client_secret(
    setting: &Setting,
    env: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<(Secret, Option<PathBuf>)> {
    // The value may be the secret itself, so it is not repeated.
    let place = setting.value.split_once(':');
    let reference = match place {
        Some(("env", name)) if !name.is_empty() => SecretReference::Variable(name.to_owned()),
        Some(("file", path)) if !path.is_empty() => {
            SecretReference::File(setting.resolve_path(path))
        }
        _ => return Err(setting.refuse("it is neither env:NAME nor file:PATH", SECRET_EXAMPLE)),
    };
    let secret = reference
        .resolve(&|name| env(name).map(Into::into))
        .map_err(|error| setting.refuse(format!("{error:#}"), SECRET_EXAMPLE))?;
    match reference {
        SecretReference::File(path) => Ok((secret, Some(path))),
        SecretReference::Variable(_) => Ok((secret, None)),
    }
}

fn scopes(setting: &Setting) -> anyhow::Result<Vec<String>> {
    let scopes = setting.value.split_whitespace().map(str::to_owned);
    let scopes: Vec<String> = scopes.collect();
    let is_plain = |scope: &String| scope.bytes().all(|byte| byte.is_ascii_graphic());
    if scopes.iter().any(|scope| scope == "openid") && scopes.iter().all(is_plain) {
        return Ok(scopes);
    }
    Err(setting.refuse_value(
        "is not a list of scopes with `openid`, separated by spaces",
        "openid profile email groups",
    ))
}

/// `value=role`, separated by commas. The last `=` counts, because a value can contain one.
fn roles(setting: &Setting) -> anyhow::Result<Vec<(String, Role)>> {
    let pair = |text: &str| -> anyhow::Result<(String, Role)> {
        let refused = |what: String| setting.refuse(what, ROLES_EXAMPLE);
        let text = text.trim();
        let (value, name) = text
            .rsplit_once('=')
            .filter(|(value, _)| !value.trim().is_empty())
            .ok_or_else(|| refused(format!("`{text}` is not value=role")))?;
        let role = Role::parse(name.trim()).ok_or_else(|| {
            refused(format!(
                "`{}` is none of the roles view, operate and deploy",
                name.trim()
            ))
        })?;
        Ok((value.trim().to_owned(), role))
    };
    setting.value.split(',').map(pair).collect()
}

fn session(setting: &Setting) -> anyhow::Result<Duration> {
    let least = Duration::from_secs(5 * 60);
    match units::parse_duration(&setting.value) {
        Ok(session) if (least..=SESSION_MAX).contains(&session) => Ok(session),
        _ => Err(setting.refuse_value("is not a duration between 5m and 24h", "8h")),
    }
}
