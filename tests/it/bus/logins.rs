//! Every way to log in, on both connections of a host: one publishes and acknowledges, messages come by the other.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_nats::ConnectOptions;
use oncely::bus::{Bus, StreamSpec};
use oncely::config::{Login, Nats, Secret};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use support::nats::NatsServer;

use super::{message, next, outgoing, proof, pull_from};

/// Takes a message from a server with this configuration, and acknowledges it.
async fn takes_a_message(configuration: &str, options: ConnectOptions, nats: Nats) -> Result<()> {
    let server = NatsServer::start_secured(configuration, options).await?;
    let bus = Bus::connect(&Nats { servers: vec![server.url()], ..nats }).await?;
    bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
    let mut pull = pull_from(&bus).await?;
    server.publish_all(vec![message("in.a", &[("Nats-Msg-Id", "1")])]).await?;
    let pulled = next(&mut pull).await?;
    assert_eq!(pulled.message.event_id, "1");
    pulled.receipt.ack(&proof().await?).await?;
    assert!(bus.publish(vec![outgoing("in.b", "2")]).await[0].is_ok());
    Ok(())
}

fn nats(login: Login) -> Nats {
    Nats { servers: Vec::new(), login, root_certificate: None, client_certificate: None }
}

#[tokio::test]
async fn a_password_logs_both_connections_in() -> Result<()> {
    let login = Login::Password { user: "me".to_owned(), password: Secret::new("a \"secret\"") };
    let configuration = r#"authorization { user: me, password: "a \"secret\"" }"#;
    let options = ConnectOptions::with_user_and_password("me".to_owned(), "a \"secret\"".to_owned());
    takes_a_message(configuration, options, nats(login)).await
}

#[tokio::test]
async fn a_token_logs_both_connections_in() -> Result<()> {
    let options = ConnectOptions::with_token("t0k3n".to_owned());
    takes_a_message("authorization { token: t0k3n }", options, nats(Login::Token(Secret::new("t0k3n")))).await
}

#[tokio::test]
async fn an_nkey_logs_both_connections_in() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let key = nkeys::KeyPair::new_user();
    let seed = key.seed().map_err(|error| anyhow::anyhow!("{error}"))?;
    let file = folder.path().join("user.nk");
    std::fs::write(&file, format!("{seed}\n"))?;
    let configuration = format!("authorization {{ users: [{{ nkey: {} }}] }}", key.public_key());
    takes_a_message(&configuration, ConnectOptions::with_nkey(seed), nats(Login::Nkey(file))).await
}

/// Certificates of an authority of the test's own.
struct Certificates {
    authority: PathBuf,
    server: (PathBuf, PathBuf),
    client: (PathBuf, PathBuf),
}

impl Certificates {
    fn make(folder: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = folder.join("ca.pem");
        std::fs::write(&authority, issuer.pem())?;
        let issue = |name: &str| -> Result<(PathBuf, PathBuf)> {
            let key = KeyPair::generate()?;
            let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &issuer)?;
            let files = (folder.join(format!("{name}.pem")), folder.join(format!("{name}.key")));
            std::fs::write(&files.0, certificate.pem())?;
            std::fs::write(&files.1, key.serialize_pem())?;
            Ok(files)
        };
        Ok(Certificates { authority, server: issue("server")?, client: issue("client")? })
    }

    fn configuration(&self) -> String {
        let shown = |path: &Path| path.display().to_string();
        format!(
            "tls {{ cert_file: '{}', key_file: '{}', ca_file: '{}', verify: true }}",
            shown(&self.server.0),
            shown(&self.server.1),
            shown(&self.authority)
        )
    }
}

#[tokio::test]
async fn both_connections_use_tls_with_the_clients_certificate() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let certificates = Certificates::make(folder.path())?;
    let (certificate, key) = certificates.client.clone();
    let options = ConnectOptions::new()
        .add_root_certificates(certificates.authority.clone())
        .add_client_certificate(certificate, key)
        .require_tls(true);
    let secured = Nats {
        root_certificate: Some(certificates.authority.clone()),
        client_certificate: Some(certificates.client.clone()),
        ..nats(Login::None)
    };
    takes_a_message(&certificates.configuration(), options, secured).await.context("with a certificate")
}
