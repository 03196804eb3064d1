//! Requests to the repository of a registry: login, redirects, limits of size and time.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use hyper::{Request, Response, StatusCode, Uri};
use serde::Deserialize;

use super::challenge::Challenge;
use super::credentials::Login;
use crate::https::HttpsClient;
use crate::model::hint::WithHint;
use crate::model::oci::{Digest, MediaType, Reference};

/// How long a server may take for the head of a response, and for each part of a body.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The most redirects of one request.
const REDIRECTS_MAX: usize = 5;

/// The most bytes of a token and of an error.
const ANSWER_MAX: u64 = 256 << 10;

/// The most characters of a registry's error that are shown.
const SHOWN_MAX: usize = 200;

/// A repository, with the login of the user.
pub(super) struct Connection {
    client: HttpsClient,
    registry: String,
    /// `https://registry.example.com/v2/team/worker`.
    base: String,
    repository: String,
    login: Option<Login>,
    /// The header that the registry accepted.
    authorization: Option<HeaderValue>,
}

/// A token for a repository.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(alias = "access_token")]
    token: String,
}

/// The error of a registry.
#[derive(Deserialize)]
struct ErrorAnswer {
    errors: Vec<RegistryError>,
}

#[derive(Deserialize)]
struct RegistryError {
    code: String,
    #[serde(default)]
    message: String,
}

impl Connection {
    /// Prepares requests to a repository, and finds the login of its registry.
    ///
    /// # Errors
    /// The file with the logins cannot be read.
    pub fn open(reference: &Reference) -> Result<Self> {
        let scheme = match reference.is_on_this_machine() {
            true => "http",
            false => "https",
        };
        let (registry, repository) = (&reference.registry, &reference.repository);
        Ok(Connection {
            client: HttpsClient::with_proxies(),
            base: format!("{scheme}://{registry}/v2/{repository}"),
            login: Login::find(registry)?,
            registry: registry.clone(),
            repository: repository.clone(),
            authorization: None,
        })
    }

    /// A manifest by its tag or digest; `None` if there is none.
    pub async fn manifest(&mut self, name: &str, size_max: u64) -> Result<Option<Vec<u8>>> {
        let accept = [
            MediaType::MANIFEST,
            MediaType::INDEX,
            MediaType::DOCKER_MANIFEST,
            MediaType::DOCKER_INDEX,
        ];
        let path = format!("/manifests/{name}");
        let Some(response) = self.get(&path, &accept.join(", ")).await? else {
            return Ok(None);
        };
        let bytes = body(response, size_max)
            .await
            .context("read the manifest")?;
        Ok(Some(bytes))
    }

    /// A blob of this size by its digest; `None` if there is none.
    pub async fn blob(&mut self, digest: &Digest, size: u64) -> Result<Option<Vec<u8>>> {
        let path = format!("/blobs/{digest}");
        let Some(response) = self.get(&path, "*/*").await? else {
            return Ok(None);
        };
        let bytes = body(response, size).await;
        bytes.with_context(|| format!("read {digest}")).map(Some)
    }

    /// The response to a request; `None` for 404. It logs in if the registry asks for it.
    async fn get(&mut self, path: &str, accept: &str) -> Result<Option<Response<Incoming>>> {
        let url = format!("{}{path}", self.base);
        let mut response = self.follow(&url, accept).await?;
        if response.status() == StatusCode::UNAUTHORIZED && self.authorization.is_none() {
            self.log_in(&response).await?;
            response = self.follow(&url, accept).await?;
        }
        match response.status() {
            StatusCode::OK => Ok(Some(response)),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(self.refused(response).await),
        }
    }

    /// Sends a request and follows redirects. Only the server of the registry gets the login, and
    /// no redirect leads from TLS to a connection without it.
    async fn follow(&self, url: &str, accept: &str) -> Result<Response<Incoming>> {
        let first: Uri = url.parse().context("build the URL of the request")?;
        let mut url = first.clone();
        for _ in 0..=REDIRECTS_MAX {
            let mut request = Request::get(&url).header(ACCEPT, accept);
            if let Some(authorization) = &self.authorization
                && is_same_server(&url, &first)
            {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.send(request.body(Full::default())?).await?;
            let Some(location) = redirect(&response)? else {
                return Ok(response);
            };
            let next = resolve(&url, location)?;
            if url.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                bail!(
                    "the registry {} redirects to a URL without TLS",
                    self.registry
                );
            }
            url = next;
        }
        bail!(
            "the registry {} redirects more than {REDIRECTS_MAX} times",
            self.registry
        )
    }

    /// Sends a request within the time limit.
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let registry = &self.registry;
        let sent = tokio::time::timeout(TIMEOUT, self.client.send(request)).await;
        let sent = sent.unwrap_or_else(|_| Err(anyhow!("no answer within {TIMEOUT:?}")));
        sent.with_context(|| format!("reach the registry {registry}"))
            .hint("check the name of the registry and the network")
    }

    /// Answers the challenge of the registry with the login, or with a token for it.
    async fn log_in(&mut self, response: &Response<Incoming>) -> Result<()> {
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges = challenges.iter().filter_map(|value| value.to_str().ok());
        let challenge = challenges.filter_map(Challenge::parse).next();
        let authorization = match (challenge, &self.login) {
            (Some(Challenge::Basic), Some(login)) => login.basic(),
            (Some(Challenge::Basic), None) => return Err(self.needs_login()),
            (Some(Challenge::Bearer { realm, service }), _) => {
                let token = self.token(&realm, service.as_deref()).await;
                format!("Bearer {}", token.context("get a token for the registry")?)
            }
            (None, _) => bail!("the registry {} asks for an unknown login", self.registry),
        };
        let mut header = HeaderValue::from_str(&authorization).context("build the login")?;
        header.set_sensitive(true);
        self.authorization = Some(header);
        Ok(())
    }

    /// Gets a token to pull from the repository. The server of tokens is named by the registry, and
    /// gets the login for the registry.
    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String> {
        let encode = |text: &str| {
            percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
                .to_string()
        };
        let scope = encode(&format!("repository:{}:pull", self.repository));
        let service = service.map_or_else(String::new, |name| format!("service={}&", encode(name)));
        let separator = if realm.contains('?') { '&' } else { '?' };
        let url = format!("{realm}{separator}{service}scope={scope}");
        let url: Uri = url.parse().context("parse the URL for tokens")?;
        let is_plain = url.scheme_str() != Some("https");
        if is_plain && !self.base.starts_with("http://") {
            bail!(
                "the registry {} asks for a login without TLS",
                self.registry
            );
        }

        let mut request = Request::get(&url);
        if let Some(login) = &self.login {
            request = request.header(AUTHORIZATION, login.basic());
        }
        let response = self.send(request.body(Full::default())?).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refused(response).await);
        }
        let answer = body(response, ANSWER_MAX).await?;
        let answer: TokenAnswer =
            serde_json::from_slice(&answer).map_err(|_| anyhow!("the answer has no token"))?;
        Ok(answer.token)
    }

    /// The error for a response that is neither 200 nor 404.
    async fn refused(&self, response: Response<Incoming>) -> anyhow::Error {
        let status = response.status();
        let text = body(response, ANSWER_MAX).await.unwrap_or_default();
        let detail = detail(&text);
        let error = anyhow!("the registry {} answered {status}{detail}", self.registry);
        match status {
            StatusCode::UNAUTHORIZED if self.login.is_none() => self.needs_login().context(error),
            StatusCode::UNAUTHORIZED => {
                error.hint(format!("log in again: docker login {}", self.registry))
            }
            StatusCode::FORBIDDEN => error.hint("let this login pull from the repository"),
            _ => error,
        }
    }

    fn needs_login(&self) -> anyhow::Error {
        let registry = &self.registry;
        let error = anyhow!("the registry {registry} needs a login, and there is none for it");
        error.hint(format!(
            "docker login {registry}   (Oncely reads config.json in ~/.docker or DOCKER_CONFIG)"
        ))
    }
}

/// The body of a response, up to a size.
async fn body(response: Response<Incoming>, size_max: u64) -> Result<Vec<u8>> {
    let size_max = usize::try_from(size_max).unwrap_or(usize::MAX);
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    loop {
        let frame = tokio::time::timeout(TIMEOUT, body.frame()).await;
        let frame = frame.with_context(|| format!("wait {TIMEOUT:?} for the next part"))?;
        let Some(frame) = frame else {
            return Ok(bytes);
        };
        if let Ok(data) = frame.context("read the response")?.into_data() {
            if data.len() > size_max - bytes.len() {
                bail!("the registry sends more than {size_max} bytes");
            }
            bytes.extend_from_slice(&data);
        }
    }
}

/// The target of a redirect.
fn redirect(response: &Response<Incoming>) -> Result<Option<&str>> {
    if ![301, 302, 303, 307, 308].contains(&response.status().as_u16()) {
        return Ok(None);
    }
    let location = response.headers().get(LOCATION);
    let location = location.and_then(|location| location.to_str().ok());
    location.context("find the target of a redirect").map(Some)
}

/// The URL of a redirect, which may be a path on the same server.
fn resolve(base: &Uri, location: &str) -> Result<Uri> {
    let location = match location.starts_with('/') && !location.starts_with("//") {
        true => {
            let scheme = base.scheme_str().unwrap_or("https");
            let authority = base.authority().map_or("", |authority| authority.as_str());
            format!("{scheme}://{authority}{location}")
        }
        false => location.to_owned(),
    };
    location.parse().context("parse the target of a redirect")
}

fn is_same_server(one: &Uri, other: &Uri) -> bool {
    one.scheme() == other.scheme() && one.authority() == other.authority()
}

/// The first error in the answer of a registry, for display after its status.
fn detail(answer: &[u8]) -> String {
    let Ok(answer) = serde_json::from_slice::<ErrorAnswer>(answer) else {
        return String::new();
    };
    let Some(RegistryError { code, message }) = answer.errors.into_iter().next() else {
        return String::new();
    };
    let text = format!(": {code} {message}");
    text.trim_end()
        .chars()
        .take(SHOWN_MAX)
        .flat_map(char::escape_debug)
        .collect()
}
