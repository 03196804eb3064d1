//! Credentials for a NATS server. They are read again for each connection, so a rotated file needs no restart.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::config::{Login, Nats};

/// The proof for one connection.
#[derive(Default)]
pub(super) struct Proof {
    pub user: Option<String>,
    pub password: Option<String>,
    pub token: Option<String>,
    pub jwt: Option<String>,
    pub nkey: Option<String>,
    /// Of the server's nonce.
    pub signature: Option<Vec<u8>>,
}

/// The proof for a server that gave this nonce.
pub(super) async fn prove(nats: &Nats, nonce: &[u8]) -> Result<Proof> {
    let (nats, nonce) = (nats.clone(), nonce.to_vec());
    tokio::task::spawn_blocking(move || proof(&nats, &nonce)).await.context("read the login")?
}

fn proof(nats: &Nats, nonce: &[u8]) -> Result<Proof> {
    Ok(match nats.login_now()? {
        Login::None => Proof::default(),
        Login::Password { user, password } => {
            Proof { user: Some(user), password: Some(password.reveal().to_owned()), ..Proof::default() }
        }
        Login::Token(token) => Proof { token: Some(token.reveal().to_owned()), ..Proof::default() },
        Login::Nkey(path) => {
            let key = key(&read(&path, "the nkey")?)?;
            Proof { nkey: Some(key.public_key()), signature: Some(sign(&key, nonce)?), ..Proof::default() }
        }
        Login::Credentials(path) => {
            let text = read(&path, "the credentials")?;
            let mut sections = sections(&text);
            let (jwt, seed) = (sections.next(), sections.next());
            let (Some(jwt), Some(seed)) = (jwt, seed) else { bail!("{} lacks a JWT or a seed", path.display()) };
            Proof { jwt: Some(jwt.to_owned()), signature: Some(sign(&key(seed)?, nonce)?), ..Proof::default() }
        }
        Login::Jwt { jwt, seed } => {
            let seed = seed.map(|path| read(&path, "the nkey")).transpose()?;
            let signature = seed.map(|seed| sign(&key(&seed)?, nonce)).transpose()?;
            Proof { jwt: Some(jwt.reveal().to_owned()), signature, ..Proof::default() }
        }
    })
}

fn read(path: &Path, what: &str) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {what} {}", path.display()))?;
    Ok(text)
}

/// The text between the marks of a credentials file: the JWT, then the seed.
fn sections(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(str::trim);
    lines
        .scan(false, |inside, line| {
            let is_mark = line.starts_with("---");
            *inside = if is_mark { line.contains("BEGIN ") } else { *inside };
            Some((*inside && !is_mark && !line.is_empty()).then_some(line))
        })
        .flatten()
}

fn key(seed: &str) -> Result<nkeys::KeyPair> {
    nkeys::KeyPair::from_seed(seed.trim()).map_err(|error| anyhow::anyhow!("read the seed of an nkey: {error}"))
}

fn sign(key: &nkeys::KeyPair, nonce: &[u8]) -> Result<Vec<u8>> {
    key.sign(nonce).map_err(|error| anyhow::anyhow!("sign with an nkey: {error}"))
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
