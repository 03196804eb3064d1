//! Requests to the provider, with bounds on time and size.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use form_urlencoded::Serializer;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Request, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::LoginError;
use super::discovery::Endpoints;
use crate::config::OidcSettings;
use crate::https::HttpsClient;
use crate::model::hint::WithHint as _;

/// The time limit of one request, and the size limit of its answer in bytes.
const TIMEOUT: Duration = Duration::from_secs(4);
const ANSWER_MAX: usize = 1 << 20;

/// Sends requests, without following redirects.
pub(super) struct Requests {
    client: HttpsClient,
}

/// The answer to a code.
#[derive(Deserialize)]
pub(super) struct Tokens {
    pub id_token: String,
    pub access_token: Option<String>,
}

/// The error of the provider to a refused request.
#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    error: String,
    #[serde(default)]
    error_description: String,
}

impl Default for Requests {
    fn default() -> Self {
        Requests {
            client: HttpsClient::with_proxies(),
        }
    }
}

impl Requests {
    /// A JSON document.
    pub async fn json<T: DeserializeOwned>(&self, url: &str) -> Result<T> {
        let request = Request::get(url).header(ACCEPT, "application/json");
        let request = request.body(Full::default()).context("build the request")?;
        let (status, body) = self
            .send(request)
            .await
            .with_context(|| format!("read {url}"))?;
        if status != StatusCode::OK {
            bail!("{url} answers {status}");
        }
        serde_json::from_slice(&body).with_context(|| format!("parse the answer of {url}"))
    }

    /// Exchanges a code for the tokens of its user.
    pub async fn exchange(
        &self,
        settings: &OidcSettings,
        endpoints: &Endpoints,
        redirect_url: &str,
        code: &str,
        verifier: &str,
    ) -> Result<Tokens, LoginError> {
        let request = code_request(settings, endpoints, redirect_url, code, verifier)?;
        let url = &endpoints.token_endpoint;
        let sent = self.send(request).await;
        let (status, body) = sent
            .with_context(|| format!("exchange the code at {url}"))
            .map_err(LoginError::Unavailable)?;
        if status.is_server_error() {
            return Err(LoginError::Unavailable(anyhow!("{url} answers {status}")));
        }
        if status != StatusCode::OK {
            return Err(LoginError::Refused(refused(status, &body)));
        }
        serde_json::from_slice(&body)
            .context("the answer to the code has no ID token")
            .map_err(LoginError::Refused)
    }

    /// Further claims about the user.
    pub async fn user_info(
        &self,
        endpoint: &str,
        token: &str,
    ) -> Result<Map<String, Value>, LoginError> {
        let request = Request::get(endpoint)
            .header(ACCEPT, "application/json")
            .header(AUTHORIZATION, sensitive(&format!("Bearer {token}"))?);
        let request = request.body(Full::default()).context("build the request");
        let sent = self.send(request.map_err(LoginError::Refused)?).await;
        let (status, body) = sent
            .with_context(|| format!("read the claims at {endpoint}"))
            .map_err(LoginError::Unavailable)?;
        if status != StatusCode::OK {
            return Err(LoginError::Unavailable(anyhow!(
                "{endpoint} answers {status}"
            )));
        }
        serde_json::from_slice(&body)
            .with_context(|| format!("parse the answer of {endpoint}"))
            .map_err(LoginError::Unavailable)
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes)> {
        let exchange = async {
            let response = self.client.send(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_MAX)
                .collect()
                .await;
            // The error of the limit is no `std::error::Error` with a known size.
            let body = body.map_err(|error| anyhow!("read the answer: {error}"))?;
            Ok((status, body.to_bytes()))
        };
        let sent = tokio::time::timeout(TIMEOUT, exchange).await;
        sent.unwrap_or_else(|_| Err(anyhow!("no answer within {TIMEOUT:?}")))
    }
}

/// The request that exchanges a code, with the login of the client.
fn code_request(
    settings: &OidcSettings,
    endpoints: &Endpoints,
    redirect_url: &str,
    code: &str,
    verifier: &str,
) -> Result<Request<Full<Bytes>>, LoginError> {
    let mut form = Serializer::new(String::new());
    form.extend_pairs([
        ("grant_type", "authorization_code"),
        ("code", code),
        ("redirect_uri", redirect_url),
        ("code_verifier", verifier),
    ]);
    let mut login = None;
    match &settings.client_secret {
        Some(secret) if endpoints.takes_basic_login() => {
            let pair = [&settings.client_id, secret.reveal()]
                .map(encoded)
                .join(":");
            login = Some(format!("Basic {}", STANDARD.encode(pair)));
        }
        secret => {
            form.append_pair("client_id", &settings.client_id);
            if let Some(secret) = secret {
                form.append_pair("client_secret", secret.reveal());
            }
        }
    }
    let url = &endpoints.token_endpoint;
    let mut request = Request::post(url)
        .header(ACCEPT, "application/json")
        .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
    if let Some(login) = login {
        request = request.header(AUTHORIZATION, sensitive(&login)?);
    }
    let request = request.body(Full::new(Bytes::from(form.finish())));
    let request = request.context("build the request");
    request.map_err(LoginError::Refused)
}

/// The id or the secret of a client as its login needs it.
fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// A header that is never logged.
fn sensitive(text: &str) -> Result<HeaderValue, LoginError> {
    let value = HeaderValue::from_str(text).context("build the login of a request");
    let mut value = value.map_err(LoginError::Refused)?;
    value.set_sensitive(true);
    Ok(value)
}

/// The error for a refused code, with the reason that the provider states.
fn refused(status: StatusCode, body: &[u8]) -> anyhow::Error {
    let Refusal {
        error,
        error_description,
    } = serde_json::from_slice(body).unwrap_or_default();
    let reason = match (error.as_str(), error_description.as_str()) {
        ("", _) => status.to_string(),
        (error, "") => error.to_owned(),
        (error, description) => format!("{error}: {description}"),
    };
    let refusal = anyhow!("the provider refused the code: {reason}");
    match error.as_str() {
        "invalid_client" | "unauthorized_client" => {
            refusal.hint("check oidc_client_id and oidc_client_secret")
        }
        _ => refusal.hint("log in again: a code is valid once, and for a short time"),
    }
}
