//! Named tokens in the control API: create, list and revoke them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::access::{Caller, TOKEN_PREFIX};
use super::activity::{on_object, recorded};
use super::{ApiError, ApiResult};
use crate::model::hint::WithHint;
use crate::model::role::{Role, check_token_name};
use crate::model::schema::Time;
use crate::runtime::Host;
use crate::store::{StoreError, TokenRecord};

/// The longest lifetime of a token: a hundred years.
const LIFETIME_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// A token to create.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct TokenRequest {
    pub name: String,
    pub role: Role,
    /// In milliseconds; `None` for a token that does not expire.
    pub lifetime_ms: Option<u64>,
}

/// A new token. Its secret is shown once.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct CreatedToken {
    pub secret: String,
    #[serde(flatten)]
    pub token: TokenRecord,
}

/// The caller's own name and role.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct WhoAmI {
    /// `host` for the host's own token.
    pub name: String,
    pub role: Role,
    #[schemars(with = "Option<Time>")]
    pub expires_at: Option<Timestamp>,
}

pub(super) async fn whoami(caller: Caller) -> ApiResult<WhoAmI> {
    Ok(Json(WhoAmI {
        name: caller.actor.name,
        role: caller.role,
        expires_at: caller.expires_at,
    }))
}

pub(super) async fn list(State(host): State<Arc<Host>>) -> ApiResult<Vec<TokenRecord>> {
    Ok(Json(host.services.store.tokens().await?))
}

pub(super) async fn create(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Json(request): Json<TokenRequest>,
) -> ApiResult<CreatedToken> {
    // Check the request.
    check_token_name(&request.name).map_err(|why| anyhow!(why))?;
    if !Role::GRANTABLE.contains(&request.role) {
        return Err(anyhow!("a named token has the role view, operate or deploy").into());
    }
    let lifetime = request.lifetime_ms.map(Duration::from_millis);
    if lifetime.is_some_and(|lifetime| lifetime.is_zero() || lifetime > LIFETIME_MAX) {
        return Err(anyhow!("the lifetime of a token is above 0 and at most 100 years").into());
    }

    // Create the token.
    let details = json!({ "role": request.role, "lifetime_ms": request.lifetime_ms });
    let activity = on_object("token create", &request.name, details);
    let (store, by) = (Arc::clone(&host.services.store), caller.actor.name.clone());
    let created = recorded(&host, &caller, activity, async move {
        let secret = format!("{TOKEN_PREFIX}{}", hex::encode(rand::random::<[u8; 32]>()));
        let sha256 = Sha256::digest(secret.as_bytes()).into();
        let token = store
            .create_token(&request.name, request.role, sha256, lifetime, &by)
            .await
            .map_err(|error| match error {
                StoreError::Refused(_) => {
                    anyhow::Error::from(error).hint(format!("oncely token revoke {}", request.name))
                }
                error => error.into(),
            })?;
        let recorded = json!({ "id": token.id });
        Ok((CreatedToken { secret, token }, recorded))
    });
    Ok(Json(created.await?))
}

pub(super) async fn revoke(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<TokenRecord> {
    let activity = on_object("token revoke", &name, json!({}));
    let (store, by) = (Arc::clone(&host.services.store), caller.actor.name.clone());
    let revoked = recorded(&host, &caller, activity, async move {
        let token = store.revoke_token(&name, &by).await?.ok_or_else(|| {
            let error = anyhow!("there is no token `{name}`, or it is revoked already");
            ApiError(StatusCode::NOT_FOUND, error.hint("oncely token list"))
        })?;
        let recorded = json!({ "id": token.id });
        Ok((token, recorded))
    });
    Ok(Json(revoked.await?))
}
