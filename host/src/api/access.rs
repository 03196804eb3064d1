//! Callers of the control API: their tokens and their roles.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header, request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use super::ApiError;
use crate::model::hint::WithHint;
use crate::model::role::{HOST_ACTOR, Role};
use crate::store::{ActiveToken, Actor, Attribution, Store, TokenRecord};

/// The header in which a client states the name of its user.
pub const STATED_NAME_HEADER: &str = "oncely-stated-name";

/// The maximum length of a stated name, in characters.
const STATED_NAME_MAX: usize = 128;

/// The beginning of each named token. A secret scanner can search for it.
pub const TOKEN_PREFIX: &str = "oncely_";

/// How long a host knows the tokens without reading them again. So long may a revoked one work.
const TOKENS_KNOWN_FOR: Duration = Duration::from_secs(1);

/// How often an unknown token makes the host read them again, at most.
const UNKNOWN_TOKEN_INTERVAL: Duration = Duration::from_millis(100);

/// A caller with a valid token.
#[derive(Debug, Clone)]
pub struct Caller {
    pub actor: Actor,
    pub role: Role,
    /// When its token expires.
    pub expires_at: Option<Timestamp>,
    /// Whether a login provider vouches for the person, instead of a token. Its name is theirs.
    pub is_person: bool,
}

/// Who makes a change and why, as the client states. Only the token is proof of the actor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StatedBy {
    /// The name of a person or a program; recorded beside the name of the token.
    pub actor: Option<String>,
    /// The reason.
    pub note: Option<String>,
}

impl Caller {
    /// The holder of the host's own token.
    pub fn host() -> Self {
        Caller {
            actor: Actor {
                name: HOST_ACTOR.to_owned(),
                token: None,
                stated_name: None,
            },
            role: Role::Admin,
            expires_at: None,
            is_person: false,
        }
    }

    /// A person that a login provider vouches for, with the name for display.
    pub fn person(name: String, shown: Option<&str>, role: Role) -> Self {
        Caller {
            actor: Actor {
                name,
                token: None,
                stated_name: shown.and_then(printable_name),
            },
            role,
            expires_at: None,
            is_person: true,
        }
    }

    /// The caller with the name that a request states, if it does. A person has the name that the
    /// provider states.
    pub fn stating(mut self, by: &StatedBy) -> Self {
        if self.is_person {
            return self;
        }
        let stated_name = by.actor.as_deref().and_then(printable_name);
        self.actor.stated_name = stated_name.or(self.actor.stated_name);
        self
    }

    /// The actor for the audit of a change, and the reason.
    pub fn attribution(&self, note: Option<String>) -> Attribution {
        Attribution {
            actor: self.actor.name.clone(),
            stated_name: self.actor.stated_name.clone(),
            note,
        }
    }
}

impl From<TokenRecord> for Caller {
    fn from(token: TokenRecord) -> Self {
        Caller {
            actor: Actor {
                name: token.name,
                token: Some(token.id),
                stated_name: None,
            },
            role: token.role,
            expires_at: token.expires_at,
            is_person: false,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(
        parts: &mut request::Parts,
        _state: &S,
    ) -> Result<Self, Self::Rejection> {
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.ok_or_else(|| ApiError(StatusCode::UNAUTHORIZED, anyhow!("the caller is unknown")))
    }
}

/// Checks tokens: the host's own one, and the named ones in the database.
pub struct Authenticator {
    /// SHA-256 of the host's own token.
    host_token: Vec<u8>,
    store: Arc<Store>,
    known: Mutex<KnownTokens>,
}

/// The active tokens by their SHA-256, and the time at which they were read.
#[derive(Default)]
struct KnownTokens {
    read_at: Option<Instant>,
    tokens: HashMap<Vec<u8>, TokenRecord>,
}

impl Authenticator {
    pub fn new(host_token: &str, store: Arc<Store>) -> Self {
        Authenticator {
            host_token: Sha256::digest(host_token.as_bytes()).to_vec(),
            store,
            known: Mutex::default(),
        }
    }

    /// The caller with this token; `None` if it is not valid. Digests are compared, so the timing
    /// reveals nothing about a token.
    ///
    /// # Errors
    /// The database is unavailable, so a named token cannot be checked.
    pub async fn caller(&self, token: &str) -> anyhow::Result<Option<Caller>> {
        let sha256 = Sha256::digest(token.as_bytes()).to_vec();
        if sha256 == self.host_token {
            return Ok(Some(Caller::host()));
        }
        if !token.starts_with(TOKEN_PREFIX) {
            return Ok(None);
        }
        let found = self.find(|known| known.get(&sha256)).await?;
        Ok(found.map(Caller::from))
    }

    /// A caller whose token was checked before, with its role of now; `None` if the token was
    /// revoked or has expired since. The role of a person is that of the login.
    ///
    /// # Errors
    /// The database is unavailable, so a named token cannot be checked.
    pub async fn renewed(&self, caller: Caller) -> anyhow::Result<Option<Caller>> {
        let Some(id) = caller.actor.token else {
            return Ok(Some(caller));
        };
        let found = self
            .find(|known| known.values().find(|token| token.id == id))
            .await?;
        Ok(found.map(Caller::from))
    }

    /// An active token. However many requests come, the tokens are read ten times per second at
    /// most; an unknown token waits for the next time.
    async fn find(
        &self,
        pick: impl Fn(&HashMap<Vec<u8>, TokenRecord>) -> Option<&TokenRecord>,
    ) -> anyhow::Result<Option<TokenRecord>> {
        let mut known = self.known.lock().await;
        let wait = known
            .read_at
            .and_then(|read_at| UNKNOWN_TOKEN_INTERVAL.checked_sub(read_at.elapsed()));
        if pick(&known.tokens).is_none()
            && let Some(wait) = wait
        {
            // It may have been created since the tokens were read.
            drop(known);
            tokio::time::sleep(wait).await;
            known = self.known.lock().await;
        }
        let may_be = match pick(&known.tokens).is_some() {
            true => TOKENS_KNOWN_FOR,
            false => UNKNOWN_TOKEN_INTERVAL,
        };
        if known
            .read_at
            .is_none_or(|read_at| read_at.elapsed() >= may_be)
        {
            let active = self.store.active_tokens().await?;
            let entry = |ActiveToken { sha256, token }| (sha256, token);
            known.tokens = active.into_iter().map(entry).collect();
            known.read_at = Some(Instant::now());
        }
        let is_valid = |token: &&TokenRecord| {
            token
                .expires_at
                .is_none_or(|expires_at| expires_at > Timestamp::now())
        };
        Ok(pick(&known.tokens).filter(is_valid).cloned())
    }
}

/// Lets requests with a valid token through, and adds their [`Caller`].
pub(super) async fn authenticate(
    State(authenticator): State<Arc<Authenticator>>,
    mut request: Request,
    next: Next,
) -> Response {
    let token = bearer_token(request.headers());
    let stated_name = stated_name(request.headers());
    match authenticator.caller(token).await {
        Ok(Some(mut caller)) => {
            caller.actor.stated_name = stated_name;
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Ok(None) => {
            let error = anyhow!("the token is missing, wrong, expired or revoked");
            let error = error.hint("pass a token with --token or ONCELY_TOKEN");
            ApiError(StatusCode::UNAUTHORIZED, error).into_response()
        }
        Err(error) => {
            let error = error.context("check the token");
            let error = error.hint("the host's own token needs no database");
            ApiError::from(error).into_response()
        }
    }
}

/// A kind of request and the role that it needs.
pub(super) struct RequestKind {
    pub method: Method,
    /// Below `/v1`, with parameters in braces.
    pub path: &'static str,
    pub role: Role,
}

/// Refuses requests of callers whose role is too low.
pub(super) async fn check_role(
    State(needed): State<Arc<RequestKind>>,
    caller: Caller,
    request: Request,
    next: Next,
) -> Response {
    if caller.role >= needed.role {
        return next.run(request).await;
    }
    let kind = format!("{} /v1{}", needed.method, needed.path);
    caller.refused(&kind, needed.role).into_response()
}

impl Caller {
    /// The refusal of a request that needs a higher role.
    pub fn refused(&self, request: &str, needed: Role) -> ApiError {
        let role = self.role;
        tracing::warn!(
            token = self.actor.name,
            role = role.as_str(),
            needed = needed.as_str(),
            request,
            "request refused, role too low"
        );
        let holder = if self.is_person { "" } else { "the token " };
        let error = anyhow!(
            "{holder}`{}` has the role `{}`, and `{request}` needs the role `{}`",
            self.actor.name,
            role.as_str(),
            needed.as_str()
        );
        if self.is_person {
            let hint = "the administrator can grant a role to one of your groups with oidc_roles";
            return ApiError(StatusCode::FORBIDDEN, error.hint(hint));
        }
        let hint = match needed {
            Role::Deploy => {
                "the administrator, who has the host's own token, can create one: \
                 oncely token create NAME --role deploy"
            }
            Role::View | Role::Operate => {
                "the administrator, who has the host's own token, can create one: \
                 oncely token create NAME --role operate"
            }
            Role::Admin => "use the host's own token, see docs/access.md",
        };
        ApiError(StatusCode::FORBIDDEN, error.hint(hint))
    }
}

/// The token in the `Authorization` header; empty if there is none.
pub fn bearer_token(headers: &HeaderMap) -> &str {
    headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default()
}

/// The name that the client states.
fn stated_name(headers: &HeaderMap) -> Option<String> {
    printable_name(headers.get(STATED_NAME_HEADER)?.to_str().ok()?)
}

/// A stated name as one printable line, cut at its maximum length; `None` if nothing is left.
fn printable_name(name: &str) -> Option<String> {
    let printable = name.chars().filter(|c| !c.is_control());
    let name: String = printable.take(STATED_NAME_MAX).collect();
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stated_name_is_one_short_line() {
        assert_eq!(printable_name(" ada\r\n "), Some("ada".to_owned()));
        assert_eq!(printable_name("\u{1b}\n "), None);
        let long = printable_name(&"ä".repeat(1_000)).unwrap_or_default();
        assert_eq!(long.chars().count(), STATED_NAME_MAX);
    }
}
