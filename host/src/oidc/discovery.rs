//! Discovery: the endpoints of a provider, and its keys for ID tokens.

use anyhow::{Context as _, Result, bail};
use hyper::Uri;
use jsonwebtoken::jwk::{Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

use super::id_token;
use super::requests::Requests;
use crate::config::is_loopback;

/// The end of a URL of a discovery document.
const DOCUMENT: &str = "/.well-known/openid-configuration";

/// The endpoints of a provider, from its discovery document.
#[derive(Deserialize)]
pub(super) struct Endpoints {
    issuer: String,
    pub authorization_endpoint: String,
    pub token_endpoint: String,
    pub userinfo_endpoint: Option<String>,
    jwks_uri: String,
    token_endpoint_auth_methods_supported: Option<Vec<String>>,
    /// Whether it puts its issuer beside each code.
    #[serde(default)]
    pub authorization_response_iss_parameter_supported: bool,
}

/// A provider at a time.
pub(super) struct Discovered {
    pub endpoints: Endpoints,
    /// The keys that can sign ID tokens.
    pub keys: Vec<Key>,
}

/// A public key of a provider.
pub(super) struct Key {
    id: Option<String>,
    /// The only algorithm, if the provider names one.
    algorithm: Option<KeyAlgorithm>,
    pub key: DecodingKey,
}

/// The keys, of which some may be of an unknown kind.
#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

impl Discovered {
    /// Reads the document and the keys.
    ///
    /// # Errors
    /// The provider does not answer, has another issuer, or an endpoint without TLS.
    pub async fn read(requests: &Requests, issuer: &str) -> Result<Self> {
        let url = format!("{}{DOCUMENT}", issuer.trim_end_matches('/'));
        let endpoints: Endpoints = requests.json(&url).await?;
        if endpoints.issuer != issuer {
            bail!(
                "{url} is of the issuer `{}`, and oidc_issuer is `{issuer}`",
                endpoints.issuer
            );
        }
        endpoints.check()?;
        let set: KeySet = requests.json(&endpoints.jwks_uri).await?;
        let keys = set.keys.into_iter().filter_map(Key::of).collect();
        Ok(Discovered { endpoints, keys })
    }

    /// The key of a token with this header: the one with its id. Without an id, the only one for
    /// the algorithm.
    pub fn key(&self, id: Option<&str>, algorithm: Algorithm) -> Option<&Key> {
        let mut fitting = self.keys.iter().filter(|key| key.fits(id, algorithm));
        let first = fitting.next()?;
        (id.is_some() || fitting.next().is_none()).then_some(first)
    }

    /// Whether there is a key of the algorithm and the id that an ID token names.
    pub fn has_key_of(&self, token: &str) -> bool {
        id_token::header(token)
            .is_ok_and(|header| self.key(header.kid.as_deref(), header.alg).is_some())
    }
}

impl Endpoints {
    /// Whether a client logs in by the header `Authorization`, which is the default.
    pub fn takes_basic_login(&self) -> bool {
        let methods = &self.token_endpoint_auth_methods_supported;
        methods.as_ref().is_none_or(|methods| {
            let has = |name: &str| methods.iter().any(|method| method == name);
            has("client_secret_basic") || !has("client_secret_post")
        })
    }

    /// Refuses endpoints without TLS. Secrets are sent to them.
    fn check(&self) -> Result<()> {
        let endpoints = [
            &self.authorization_endpoint,
            &self.token_endpoint,
            &self.jwks_uri,
        ];
        for url in endpoints.into_iter().chain(&self.userinfo_endpoint) {
            let uri: Uri = url
                .parse()
                .with_context(|| format!("parse the endpoint `{url}`"))?;
            let is_local = uri.host().is_some_and(is_loopback);
            if uri.scheme_str() != Some("https") && !is_local {
                bail!("the endpoint {url} of the provider has no TLS");
            }
        }
        Ok(())
    }
}

impl Key {
    /// The key of a JSON Web Key; `None` if it cannot verify an ID token here.
    fn of(value: Value) -> Option<Key> {
        let jwk: Jwk = serde_json::from_value(value).ok()?;
        let is_for_signatures = jwk
            .common
            .public_key_use
            .as_ref()
            .is_none_or(|purpose| *purpose == PublicKeyUse::Signature);
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        let is_usable = id_token::ALGORITHMS
            .iter()
            .any(|algorithm| algorithm.family() == key.family());
        (is_for_signatures && is_usable).then_some(Key {
            id: jwk.common.key_id,
            algorithm: jwk.common.key_algorithm,
            key,
        })
    }

    fn fits(&self, id: Option<&str>, algorithm: Algorithm) -> bool {
        let has_id = id.is_none() || self.id.as_deref() == id;
        let has_algorithm = self
            .algorithm
            .as_ref()
            .is_none_or(|own| *own == KeyAlgorithm::from(algorithm));
        has_id && has_algorithm && self.key.family() == algorithm.family()
    }
}
