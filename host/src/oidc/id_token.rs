//! The checks of an ID token: signature, issuer, audience, times and nonce.

use anyhow::{Context as _, Result, anyhow, bail};
use jsonwebtoken::{Algorithm, Header, Validation, decode, decode_header};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::discovery::Discovered;
use crate::config::OidcSettings;

/// The accepted algorithms. None has a shared key, so no holder of the client's secret can sign.
pub(super) const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// The difference of clocks that is accepted, in seconds.
const LEEWAY_SECS: u64 = 60;

/// The header of a token, with an accepted algorithm. Nothing vouches for it.
pub(super) fn header(token: &str) -> Result<Header> {
    // An unknown algorithm, `none` among them, does not parse.
    let header = decode_header(token).context("read the header of the ID token")?;
    if !ALGORITHMS.contains(&header.alg) {
        bail!(
            "the algorithm {:?} of the ID token is not accepted",
            header.alg
        );
    }
    Ok(header)
}

/// The claims of a token of this issuer, for this client and this login.
///
/// # Errors
/// A check fails; the error names it.
pub(super) fn verified(
    token: &str,
    settings: &OidcSettings,
    discovered: &Discovered,
    nonce: &str,
) -> Result<Map<String, Value>> {
    let header = header(token)?;
    let key = discovered.key(header.kid.as_deref(), header.alg);
    let key = key.ok_or_else(|| anyhow!("no key of the provider fits the ID token"))?;
    let mut validation = Validation::new(header.alg);
    validation.leeway = LEEWAY_SECS;
    validation.validate_nbf = true;
    validation.set_issuer(&[&settings.issuer]);
    validation.set_audience(&[&settings.client_id]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    let claims = decode::<Map<String, Value>>(token, &key.key, &validation)
        .context("check the ID token")?
        .claims;
    check(&claims, settings, nonce)?;
    Ok(claims)
}

/// The checks that OpenID Connect adds to those of a token.
fn check(claims: &Map<String, Value>, settings: &OidcSettings, nonce: &str) -> Result<()> {
    let text = |name: &str| claims.get(name).and_then(Value::as_str);
    if text("iss") != Some(settings.issuer.as_str()) {
        bail!("the ID token is of another issuer");
    }

    // A token for several clients could be used by each of them.
    let client = settings.client_id.as_str();
    let is_only_audience = match claims.get("aud") {
        Some(Value::Array(all)) => all.iter().all(|each| each.as_str() == Some(client)),
        Some(one) => one.as_str() == Some(client),
        None => false,
    };
    if !is_only_audience
        || claims
            .get("azp")
            .is_some_and(|azp| azp.as_str() != Some(client))
    {
        bail!("the ID token is for another client, too");
    }

    // Digests are compared, so the timing reveals nothing.
    let digest = |text: &str| Sha256::digest(text.as_bytes());
    if text("nonce").map(digest) != Some(digest(nonce)) {
        bail!("the ID token belongs to another login: its nonce differs");
    }
    Ok(())
}
