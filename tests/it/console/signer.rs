//! A provider that signs any ID token: for tests of wrong ones.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

/// The id and the secret of the console at the providers of the tests.
pub const CLIENT: &str = "oncely";
pub const SECRET: &str = "a secret+of/the:console";

/// A signing key with a name.
pub struct Key {
    id: &'static str,
    pair: EcdsaKeyPair,
}

impl Key {
    /// A new key with this name.
    pub fn new(id: &'static str) -> Result<Arc<Key>> {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let failed = |_| anyhow!("generate a key");
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).map_err(failed)?;
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random);
        let pair = pair.map_err(|error| anyhow!("read the key: {error}"))?;
        Ok(Arc::new(Key { id, pair }))
    }

    fn public(&self) -> Value {
        // A point: 4, then both coordinates.
        let point = self.pair.public_key().as_ref();
        let (x, y) = (&point[1..33], &point[33..65]);
        json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.id,
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        })
    }
}

/// An ID token before it is signed.
pub struct Token {
    pub header: Value,
    pub claims: Value,
    secret: Option<&'static str>,
}

impl Token {
    /// Says that there is no signature, and makes none.
    pub fn sign_with_none(&mut self) {
        self.header["alg"] = "none".into();
        self.secret = Some("");
    }

    /// Signs with a secret that both sides know.
    pub fn sign_with_secret(&mut self, secret: &'static str) {
        self.header["alg"] = "HS256".into();
        self.secret = Some(secret);
    }

    /// The token.
    pub fn signed(&self, key: impl AsRef<Key>) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        // A claim that is null is left out.
        let mut claims = self.claims.clone();
        if let Some(claims) = claims.as_object_mut() {
            claims.retain(|_, value| !value.is_null());
        }
        let message = format!("{}.{}", part(&self.header), part(&claims));
        let signature = match self.secret {
            Some("") => Vec::new(),
            Some(secret) => {
                let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
                ring::hmac::sign(&key, message.as_bytes()).as_ref().to_vec()
            }
            None => {
                let pair = &key.as_ref().pair;
                let signed = pair.sign(&SystemRandom::new(), message.as_bytes());
                signed
                    .map(|signed| signed.as_ref().to_vec())
                    .unwrap_or_default()
            }
        };
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// The provider. Its tasks end with the test.
pub struct Signer {
    issuer: String,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    issuer: String,
    /// The only published key.
    key: Arc<Key>,
    /// The ID token and the challenge of each unused code.
    codes: HashMap<String, (String, String)>,
}

impl Signer {
    /// Starts a provider with one key.
    pub async fn start(key: Arc<Key>) -> Result<Signer> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("bind")?;
        let issuer = format!("http://{}", listener.local_addr()?);
        let shared = Arc::new(Mutex::new(Shared {
            issuer: issuer.clone(),
            key,
            codes: HashMap::new(),
        }));
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(document))
            .route("/jwks", get(keys))
            .route("/token", post(exchange))
            .with_state(Arc::clone(&shared));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Signer { issuer, shared })
    }

    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The published key.
    pub fn key(&self) -> Arc<Key> {
        Arc::clone(&lock(&self.shared).key)
    }

    /// Replaces the published key.
    pub fn publish(&self, key: Arc<Key>) {
        lock(&self.shared).key = key;
    }

    /// A correct token of a person.
    pub fn token(&self, subject: &str, groups: &[&str], nonce: &str) -> Token {
        let now = jiff::Timestamp::now().as_second();
        Token {
            header: json!({ "alg": "ES256", "typ": "JWT", "kid": self.key().id }),
            claims: json!({
                "iss": self.issuer, "aud": CLIENT, "sub": subject, "groups": groups,
                "iat": now, "exp": now + 300, "nonce": nonce,
            }),
            secret: None,
        }
    }

    /// A code that is exchanged once for this ID token, with the verifier of this challenge.
    pub fn code(&self, token: &str, challenge: &str) -> String {
        let code = hex::encode(rand::random::<[u8; 16]>());
        let entry = (token.to_owned(), challenge.to_owned());
        lock(&self.shared).codes.insert(code.clone(), entry);
        code
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn document(State(shared): State<Arc<Mutex<Shared>>>) -> Json<Value> {
    let issuer = lock(&shared).issuer.clone();
    Json(json!({
        "issuer": issuer,
        "authorization_endpoint": format!("{issuer}/authorize"),
        "token_endpoint": format!("{issuer}/token"),
        "jwks_uri": format!("{issuer}/jwks"),
    }))
}

/// The key, and two of kinds that a console does not know.
async fn keys(State(shared): State<Arc<Mutex<Shared>>>) -> Json<Value> {
    let key = lock(&shared).key.public();
    Json(json!({ "keys": [{ "kty": "AKP", "alg": "ML-DSA-44", "pub": "AA" }, key, { "kty": 7 }] }))
}

async fn exchange(
    State(shared): State<Arc<Mutex<Shared>>>,
    headers: HeaderMap,
    body: String,
) -> Response {
    let parsed = reqwest::Url::parse(&format!("http://form/?{body}"));
    let form: HashMap<String, String> = parsed
        .map(|form| form.query_pairs().into_owned().collect())
        .unwrap_or_default();
    let refused = |error: &str| {
        let body = Json(json!({ "error": error }));
        (StatusCode::BAD_REQUEST, body).into_response()
    };
    let text = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();

    // The login of the client: both parts are encoded like fields of a form.
    let login = format!("{CLIENT}:a+secret%2Bof%2Fthe%3Aconsole");
    let login = format!("Basic {}", STANDARD.encode(login));
    if headers
        .get("authorization")
        .is_none_or(|value| value != login.as_str())
    {
        return refused("invalid_client");
    }
    let Some((token, challenge)) = lock(&shared).codes.remove(text("code")) else {
        return refused("invalid_grant");
    };
    let digest = Sha256::digest(text("code_verifier").as_bytes());
    let is_bound = URL_SAFE_NO_PAD.encode(digest) == challenge
        && text("redirect_uri").ends_with("/login/oidc/callback");
    if !is_bound || text("grant_type") != "authorization_code" {
        return refused("invalid_grant");
    }
    Json(json!({ "id_token": token, "access_token": "a", "token_type": "Bearer" })).into_response()
}
