//! The webhook for alarms: its URL, and the secret that signs its posts.

use std::fmt;

use axum::http::Uri;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Secret;
use super::sources::Setting;

/// The URL of the webhook. Its path and query are never shown, because they are often a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Webhook {
    /// Whether the scheme is `https`.
    pub is_tls: bool,
    /// Host and port as configured.
    pub authority: String,
    /// Path and query.
    pub path: String,
}

/// The prefix of secrets in Standard Webhooks.
const SECRET_PREFIX: &str = "whsec_";

const EXAMPLE: &str = "https://alarms.example.com/oncely";

pub(super) fn webhook(setting: &Setting) -> anyhow::Result<Webhook> {
    // The value may contain a secret, so it is not repeated.
    let uri: Uri = setting
        .value
        .parse()
        .map_err(|_| setting.refuse("it is not a URL", EXAMPLE))?;
    let is_tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => {
            return Err(setting.refuse("it begins neither with https:// nor with http://", EXAMPLE));
        }
    };

    // Host, without a login.
    let Some(authority) = uri
        .authority()
        .filter(|authority| !authority.host().is_empty())
    else {
        return Err(setting.refuse("it names no host", EXAMPLE));
    };
    if authority.as_str().contains('@') {
        return Err(setting.refuse(
            "it contains a user or password; put a token into its path or query",
            EXAMPLE,
        ));
    }
    Ok(Webhook {
        is_tls,
        authority: authority.to_string(),
        path: uri
            .path_and_query()
            .map_or_else(|| "/".to_owned(), ToString::to_string),
    })
}

/// Checks the secret that signs posts; [`key`] decodes it.
pub(super) fn secret(setting: &Setting) -> anyhow::Result<Secret> {
    let secret = Secret::new(setting.value.as_str());
    match key(&secret) {
        Some(key) if (24..=64).contains(&key.len()) => Ok(secret),
        _ => {
            let hint = format!("generate one: echo {SECRET_PREFIX}$(openssl rand -base64 32)");
            Err(setting.refuse_with_hint(
                format!("it is not `{SECRET_PREFIX}` followed by 24 to 64 bytes in Base64"),
                hint,
            ))
        }
    }
}

/// Decodes the key of a secret.
pub fn key(secret: &Secret) -> Option<Vec<u8>> {
    STANDARD
        .decode(secret.reveal().strip_prefix(SECRET_PREFIX)?)
        .ok()
}

impl Webhook {
    /// The URL. It must not be shown.
    pub fn url(&self) -> String {
        format!("{}{}", self.redacted(), self.path)
    }

    /// The URL without path and query, for display.
    pub fn redacted(&self) -> String {
        format!(
            "{}://{}",
            if self.is_tls { "https" } else { "http" },
            self.authority
        )
    }
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}
