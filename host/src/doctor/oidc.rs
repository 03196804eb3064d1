//! The check of the login provider of the console.

use super::checks::OIDC_PROVIDER;
use super::{Finding, failed};
use crate::config::HostConfig;
use crate::oidc;

/// Contacts the provider, if one is set.
pub async fn judge(config: &HostConfig) -> Option<Finding> {
    let settings = config.oidc.as_ref()?;
    let issuer = settings.issuer_short();
    Some(match oidc::check(settings).await {
        Ok(keys) => OIDC_PROVIDER.ok(format!(
            "{issuer} answers, and has {keys} keys for ID tokens"
        )),
        Err(error) => failed(
            OIDC_PROVIDER,
            &error,
            "check oidc_issuer and the network; tokens still log in to the console",
        ),
    })
}
