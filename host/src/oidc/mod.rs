//! OpenID Connect: the login of a person at a provider, by the authorization code flow with PKCE.
//!
//! Three secrets bind a login to the browser that began it: `state` to the redirect, `nonce` to the
//! ID token, and the verifier of PKCE to the code. Each login has its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;

use crate::config::OidcSettings;
use crate::model::hint::WithHint as _;

mod claims;
mod discovery;
mod id_token;
mod requests;
mod signatures;

pub use claims::Person;
use discovery::Discovered;
use requests::Requests;

/// How long the answers of the provider to a discovery are used.
const DISCOVERED_FOR: Duration = Duration::from_secs(10 * 60);

/// How long a failed discovery is not repeated, so a flood of logins does not become one of
/// requests.
const FAILED_FOR: Duration = Duration::from_secs(2);

/// The next step while the provider does not work.
const TOKEN_HINT: &str = "log in with a token meanwhile; check the provider: oncely doctor";

/// One provider, and the console as its client.
pub struct Provider {
    settings: OidcSettings,
    /// The URL to which the provider sends the browser back.
    redirect_url: String,
    requests: Requests,
    known: Mutex<Known>,
}

/// The last discovery.
#[derive(Default)]
enum Known {
    #[default]
    Nothing,
    Discovered(Instant, Arc<Discovered>),
    /// The time of a failure, and its causes.
    Failed(Instant, String),
}

/// The secrets of one login. The browser keeps them sealed, the host keeps nothing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attempt {
    /// The text that the provider returns with the code.
    pub state: String,
    nonce: String,
    verifier: String,
}

/// The reason of a failed login.
#[derive(Debug)]
pub enum LoginError {
    /// The provider does not answer, or not as one.
    Unavailable(anyhow::Error),
    /// The code or the token is not valid.
    Refused(anyhow::Error),
}

type Result<T> = std::result::Result<T, LoginError>;

impl Provider {
    /// The provider of these settings. It is contacted at the first login.
    pub fn new(settings: OidcSettings, redirect_url: String) -> Self {
        signatures::install();
        Provider {
            settings,
            redirect_url,
            requests: Requests::default(),
            known: Mutex::default(),
        }
    }

    /// The settings.
    pub fn settings(&self) -> &OidcSettings {
        &self.settings
    }

    /// Begins a login. Returns its secrets, and the URL of the provider for the browser.
    ///
    /// # Errors
    /// The provider is unavailable.
    pub async fn begin(&self) -> Result<(Attempt, String)> {
        let discovered = self.discovered().await?;
        let attempt = Attempt {
            state: random(),
            nonce: random(),
            verifier: random(),
        };
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(attempt.verifier.as_bytes()));
        let scopes = self.settings.scopes.join(" ");
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs([
            ("response_type", "code"),
            ("client_id", self.settings.client_id.as_str()),
            ("redirect_uri", self.redirect_url.as_str()),
            ("scope", scopes.as_str()),
            ("state", attempt.state.as_str()),
            ("nonce", attempt.nonce.as_str()),
            ("code_challenge", challenge.as_str()),
            ("code_challenge_method", "S256"),
        ]);
        let endpoint = &discovered.endpoints.authorization_endpoint;
        let separator = if endpoint.contains('?') { '&' } else { '?' };
        let url = format!("{endpoint}{separator}{}", query.finish());
        Ok((attempt, url))
    }

    /// Completes a login with the code, and the issuer if there is one, that the provider sent by
    /// the browser. Returns the person, who may have no role.
    ///
    /// # Errors
    /// The provider is unavailable, or the code or the ID token is not valid.
    pub async fn finish(
        &self,
        attempt: &Attempt,
        code: &str,
        issuer: Option<&str>,
    ) -> Result<Person> {
        let mut discovered = self.discovered().await?;
        let needs_issuer = discovered
            .endpoints
            .authorization_response_iss_parameter_supported;
        if issuer.map_or(needs_issuer, |issuer| issuer != self.settings.issuer) {
            return Err(LoginError::Refused(anyhow!(
                "the code is of another provider"
            )));
        }
        let tokens = self
            .requests
            .exchange(
                &self.settings,
                &discovered.endpoints,
                &self.redirect_url,
                code,
                &attempt.verifier,
            )
            .await?;

        // The key may be newer than the last discovery.
        if !discovered.has_key_of(&tokens.id_token) {
            discovered = self.discover_again(&discovered).await?;
        }
        let mut claims = id_token::verified(
            &tokens.id_token,
            &self.settings,
            &discovered,
            &attempt.nonce,
        )
        .map_err(LoginError::Refused)?;

        // Some providers put further claims only into the answer about the user.
        if claims::find(&claims, &self.settings.claim).is_none()
            && let (Some(endpoint), Some(token)) = (
                &discovered.endpoints.userinfo_endpoint,
                &tokens.access_token,
            )
        {
            let more = self.requests.user_info(endpoint, token).await?;
            claims::add(&mut claims, more).map_err(LoginError::Refused)?;
        }
        Person::of(&claims, &self.settings).map_err(LoginError::Refused)
    }

    /// Contacts the provider, and returns the number of its keys for ID tokens.
    ///
    /// # Errors
    /// It does not answer as a provider of this issuer.
    pub async fn check(&self) -> anyhow::Result<usize> {
        let discovered = Discovered::read(&self.requests, &self.settings.issuer).await?;
        match discovered.keys.len() {
            0 => Err(anyhow!(
                "it has no key for ID tokens in a supported algorithm"
            )),
            keys => Ok(keys),
        }
    }

    /// The endpoints and keys of the provider. Concurrent logins wait for one discovery.
    async fn discovered(&self) -> Result<Arc<Discovered>> {
        let mut known = self.known.lock().await;
        match &*known {
            Known::Discovered(at, discovered) if at.elapsed() < DISCOVERED_FOR => {
                Ok(Arc::clone(discovered))
            }
            Known::Failed(at, causes) if at.elapsed() < FAILED_FOR => {
                Err(self.unavailable(anyhow!(causes.clone())))
            }
            _ => self.discover(&mut known).await,
        }
    }

    /// Reads the keys again, unless another login did since `old`.
    async fn discover_again(&self, old: &Arc<Discovered>) -> Result<Arc<Discovered>> {
        let mut known = self.known.lock().await;
        match &*known {
            Known::Discovered(_, newer) if !Arc::ptr_eq(newer, old) => Ok(Arc::clone(newer)),
            _ => self.discover(&mut known).await,
        }
    }

    async fn discover(&self, known: &mut Known) -> Result<Arc<Discovered>> {
        match Discovered::read(&self.requests, &self.settings.issuer).await {
            Ok(discovered) => {
                let discovered = Arc::new(discovered);
                *known = Known::Discovered(Instant::now(), Arc::clone(&discovered));
                Ok(discovered)
            }
            Err(error) => {
                *known = Known::Failed(Instant::now(), format!("{error:#}"));
                Err(self.unavailable(error))
            }
        }
    }

    fn unavailable(&self, error: anyhow::Error) -> LoginError {
        let error = error.context(format!(
            "the login provider {} is unavailable",
            self.settings.issuer_short()
        ));
        LoginError::Unavailable(error.hint(TOKEN_HINT))
    }
}

/// Contacts a provider for `oncely doctor`. Returns the number of its keys for ID tokens.
///
/// # Errors
/// It does not answer as a provider of this issuer.
pub async fn check(settings: &OidcSettings) -> anyhow::Result<usize> {
    let provider = Provider::new(settings.clone(), String::new());
    let issuer = settings.issuer_short();
    provider
        .check()
        .await
        .with_context(|| format!("discover the provider {issuer}"))
}

/// 256 random bits in hex.
fn random() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}
