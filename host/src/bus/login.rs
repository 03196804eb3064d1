//! Credentials for a NATS server. They are read again for each connection, so a rotated file needs
//! no restart.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::config::{Login, Nats};

/// The authentication for one connection.
#[derive(Default)]
pub(super) struct ConnectAuth {
    pub user: Option<String>,
    pub password: Option<String>,
    pub token: Option<String>,
    pub jwt: Option<String>,
    pub nkey: Option<String>,
    /// The signature of the server's nonce.
    pub signature: Option<Vec<u8>>,
}

/// The authentication for a server that sent this nonce.
pub(super) async fn connect_auth(nats: &Nats, nonce: &[u8]) -> Result<ConnectAuth> {
    let (nats, nonce) = (nats.clone(), nonce.to_vec());
    tokio::task::spawn_blocking(move || connect_auth_blocking(&nats, &nonce))
        .await
        .context("read the login")?
}

fn connect_auth_blocking(nats: &Nats, nonce: &[u8]) -> Result<ConnectAuth> {
    Ok(match nats.current_login()? {
        Login::None => ConnectAuth::default(),
        Login::Password { user, password } => ConnectAuth {
            user: Some(user),
            password: Some(password.reveal().to_owned()),
            ..ConnectAuth::default()
        },
        Login::Token(token) => ConnectAuth {
            token: Some(token.reveal().to_owned()),
            ..ConnectAuth::default()
        },
        Login::Nkey(path) => {
            let key = key(&read_file(&path, "the nkey")?)?;
            ConnectAuth {
                nkey: Some(key.public_key()),
                signature: Some(sign(&key, nonce)?),
                ..ConnectAuth::default()
            }
        }
        Login::Credentials(path) => {
            let text = read_file(&path, "the credentials")?;
            let mut sections = sections(&text);
            let (jwt, seed) = (sections.next(), sections.next());
            let (Some(jwt), Some(seed)) = (jwt, seed) else {
                bail!("{} lacks a JWT or a seed", path.display())
            };
            ConnectAuth {
                jwt: Some(jwt.to_owned()),
                signature: Some(sign(&key(seed)?, nonce)?),
                ..ConnectAuth::default()
            }
        }
        Login::Jwt { jwt, seed } => {
            let seed = seed.map(|path| read_file(&path, "the nkey")).transpose()?;
            let signature = seed.map(|seed| sign(&key(&seed)?, nonce)).transpose()?;
            ConnectAuth {
                jwt: Some(jwt.reveal().to_owned()),
                signature,
                ..ConnectAuth::default()
            }
        }
    })
}

fn read_file(path: &Path, kind: &str) -> Result<String> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("read {kind} {}", path.display()))?;
    Ok(text)
}

/// The text between the delimiters of a credentials file: the JWT, then the seed.
fn sections(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(str::trim);
    lines
        .scan(false, |inside, line| {
            let is_delimiter = line.starts_with("---");
            *inside = if is_delimiter {
                line.contains("BEGIN ")
            } else {
                *inside
            };
            Some((*inside && !is_delimiter && !line.is_empty()).then_some(line))
        })
        .flatten()
}

fn key(seed: &str) -> Result<nkeys::KeyPair> {
    nkeys::KeyPair::from_seed(seed.trim())
        .map_err(|error| anyhow::anyhow!("parse the seed of an nkey: {error}"))
}

fn sign(key: &nkeys::KeyPair, nonce: &[u8]) -> Result<Vec<u8>> {
    key.sign(nonce)
        .map_err(|error| anyhow::anyhow!("sign with an nkey: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credentials_file_holds_a_jwt_and_a_seed() {
        let text = "-----BEGIN NATS USER JWT-----\neyJ0.abc\n------END NATS USER JWT------\n\n\
            ************************* IMPORTANT *************************\n  NKEY Seed printed below\n\n\
            -----BEGIN USER NKEY SEED-----\nSUABC\n------END USER NKEY SEED------\n\n****\n";
        assert_eq!(sections(text).collect::<Vec<_>>(), ["eyJ0.abc", "SUABC"]);
    }
}
