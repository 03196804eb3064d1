//! The user's logins for registries, where `docker login` stores them.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::model::hint::WithHint;

/// A user and a password for one registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    user: String,
    password: String,
}

/// The file `config.json` of Docker.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct Auth {
    /// `user:password` in Base64.
    #[serde(default)]
    auth: String,
}

/// The answer of a helper.
#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username")]
    user: String,
    #[serde(rename = "Secret")]
    password: String,
}

impl Login {
    /// The login for a registry; `None` if there is none.
    ///
    /// # Errors
    /// The file or its helper fails.
    pub fn find(registry: &str) -> Result<Option<Login>> {
        let Some(path) = config_path().filter(|path| path.is_file()) else {
            return Ok(None);
        };
        let found = Login::in_file(&path, registry);
        found.with_context(|| format!("read the logins in {}", path.display()))
    }

    fn in_file(path: &Path, registry: &str) -> Result<Option<Login>> {
        let text = std::fs::read_to_string(path)?;
        // An error of the parser may quote a password.
        let config: DockerConfig = serde_json::from_str(&text)
            .map_err(|error| anyhow!("line {} is invalid", error.line()))?;
        if let Some(helper) = config.helper(registry)
            && let Some(login) = ask_helper(helper, registry)?
        {
            return Ok(Some(login));
        }
        let auth = config
            .auths
            .iter()
            .find(|(name, _)| host_of(name) == registry);
        match auth {
            Some((_, Auth { auth })) if !auth.is_empty() => Login::decode(auth).map(Some),
            _ => Ok(None),
        }
    }

    fn decode(auth: &str) -> Result<Login> {
        let decoded = STANDARD.decode(auth).ok();
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let (user, password) = decoded
            .as_deref()
            .and_then(|login| login.split_once(':'))
            .context("a login is not `user:password` in Base64")?;
        Ok(Login {
            user: user.to_owned(),
            password: password.trim_end_matches('\0').to_owned(),
        })
    }

    /// The value of the header `Authorization`.
    pub fn basic(&self) -> String {
        let login = format!("{}:{}", self.user, self.password);
        format!("Basic {}", STANDARD.encode(login))
    }
}

impl DockerConfig {
    /// The helper that stores the login for a registry.
    fn helper(&self, registry: &str) -> Option<&str> {
        let own = self.cred_helpers.get(registry);
        own.or(self.creds_store.as_ref())
            .map(String::as_str)
            .filter(|helper| !helper.is_empty())
    }
}

/// `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
fn config_path() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let folder = set("DOCKER_CONFIG").map(PathBuf::from);
    let folder = folder.or_else(|| set("HOME").map(|home| Path::new(&home).join(".docker")));
    folder.map(|folder| folder.join("config.json"))
}

/// The host of an entry, which may be a URL.
fn host_of(entry: &str) -> &str {
    let entry = entry.split_once("://").map_or(entry, |(_, rest)| rest);
    entry.split('/').next().unwrap_or(entry)
}

/// Asks the program `docker-credential-NAME`.
fn ask_helper(name: &str, registry: &str) -> Result<Option<Login>> {
    let program = format!("docker-credential-{name}");
    let started = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = started.with_context(|| format!("run the credential helper {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that ends early fails below.
        let _ = stdin.write_all(registry.as_bytes());
    }
    let output = child.wait_with_output().context("wait for the helper")?;
    if !output.status.success() {
        let answer = String::from_utf8_lossy(&output.stdout);
        return match answer.contains("credentials not found") {
            true => Ok(None),
            false => Err(anyhow!("{program} failed with {}", output.status)),
        };
    }
    let answer: HelperAnswer = serde_json::from_slice(&output.stdout)
        .map_err(|_| anyhow!("{program} answers without a login"))?;
    if answer.user == "<token>" {
        return Err(anyhow!(
            "{program} has an identity token, which is not supported"
        ))
        .hint(format!(
            "log in with a password or an access token: docker login {registry}"
        ));
    }
    Ok(Some(Login {
        user: answer.user,
        password: answer.password,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(config: &str, registry: &str) -> Result<Option<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        let login = Login::in_file(&path, registry)?;
        Ok(login.map(|login| format!("{}/{}", login.user, login.password)))
    }

    #[test]
    fn logins_are_those_of_the_registry() {
        let auth = STANDARD.encode("ci:pass:word");
        let config = format!(
            r#"{{"auths": {{"https://registry.example.com/v1/": {{"auth": "{auth}"}},
                 "localhost:5000": {{"auth": "{auth}"}}, "empty.example.com": {{}}}},
                 "HttpHeaders": {{}}}}"#
        );
        for (registry, expected) in [
            ("registry.example.com", Some("ci/pass:word")),
            ("localhost:5000", Some("ci/pass:word")),
            ("localhost", None),
            ("example.com", None),
            ("empty.example.com", None),
        ] {
            let found = find(&config, registry).unwrap();
            assert_eq!(found.as_deref(), expected, "{registry}");
        }
        assert_eq!(find("{}", "localhost").unwrap(), None);
    }

    #[test]
    fn errors_do_not_show_the_login() {
        let broken = r#"{"auths": {"localhost": {"auth": "c2VjcmV0"}}}"#;
        for config in [broken, r#"{"auths": {"localhost": {"auth": secret"#] {
            let error = format!("{:?}", find(config, "localhost").unwrap_err());
            assert!(
                !error.contains("secret") && !error.contains("c2Vj"),
                "{error}"
            );
        }
        let missing = r#"{"credsStore": "there-is-no-such-helper"}"#;
        let error = format!("{:#}", find(missing, "localhost").unwrap_err());
        assert!(
            error.contains("docker-credential-there-is-no-such-helper"),
            "{error}"
        );
    }
}
