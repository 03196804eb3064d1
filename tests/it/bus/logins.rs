//! Every login method, on both connections of a host: one publishes and acks, the other receives.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_nats::ConnectOptions;
use oncely::bus::{Bus, StreamSpec};
use oncely::config::{HostConfig, HostFlags, Login, Nats, Secret};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use support::eventually::eventually;
use support::nats::NatsServer;

use super::{message, next, outgoing, proof, pull_from};

/// Receives a message from a server with this configuration and acknowledges it.
async fn check_login(configuration: &str, options: ConnectOptions, nats: Nats) -> Result<()> {
    let server = NatsServer::start_secured(configuration, options).await?;
    let bus = Bus::connect(&Nats {
        servers: vec![server.url()],
        ..nats
    })
    .await?;
    bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
    let mut pull = pull_from(&bus).await?;
    server
        .publish_all(vec![message("in.a", &[("Nats-Msg-Id", "1")])])
        .await?;
    let pulled = next(&mut pull).await?;
    assert_eq!(pulled.message.event_id, "1");
    pulled.receipt.ack(&proof().await?).await?;
    assert!(bus.publish(vec![outgoing("in.b", "2")]).await[0].is_ok());
    Ok(())
}

fn nats(login: Login) -> Nats {
    Nats {
        login,
        ..Nats::default()
    }
}

#[tokio::test]
async fn a_password_logs_both_connections_in() -> Result<()> {
    let login = Login::Password {
        user: "me".to_owned(),
        password: Secret::new("a \"secret\""),
    };
    let configuration = r#"authorization { user: me, password: "a \"secret\"" }"#;
    let options =
        ConnectOptions::with_user_and_password("me".to_owned(), "a \"secret\"".to_owned());
    check_login(configuration, options, nats(login)).await
}

#[tokio::test]
async fn a_token_logs_both_connections_in() -> Result<()> {
    let options = ConnectOptions::with_token("t0k3n".to_owned());
    check_login(
        "authorization { token: t0k3n }",
        options,
        nats(Login::Token(Secret::new("t0k3n"))),
    )
    .await
}

#[tokio::test]
async fn an_nkey_logs_both_connections_in() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let key = nkeys::KeyPair::new_user();
    let seed = key.seed().map_err(|error| anyhow::anyhow!("{error}"))?;
    let file = folder.path().join("user.nk");
    std::fs::write(&file, format!("{seed}\n"))?;
    let configuration = format!(
        "authorization {{ users: [{{ nkey: {} }}] }}",
        key.public_key()
    );
    check_login(
        &configuration,
        ConnectOptions::with_nkey(seed),
        nats(Login::Nkey(file)),
    )
    .await
}

/// Certificates of a test authority.
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
            let certificate =
                CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &issuer)?;
            let files = (
                folder.join(format!("{name}.pem")),
                folder.join(format!("{name}.key")),
            );
            std::fs::write(&files.0, certificate.pem())?;
            std::fs::write(&files.1, key.serialize_pem())?;
            Ok(files)
        };
        Ok(Certificates {
            authority,
            server: issue("server")?,
            client: issue("client")?,
        })
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
    check_login(
        &certificates.configuration(),
        options.clone(),
        secured.clone(),
    )
    .await
    .context("with a certificate")?;
    let first = certificates
        .configuration()
        .replace("tls {", "tls { handshake_first: true,");
    let secured = Nats {
        tls_first: true,
        ..secured
    };
    check_login(&first, options.tls_first(), secured)
        .await
        .context("with TLS first")
}

/// The settings that a host derives from a context of the `nats` tool.
fn nats_from_context(folder: &Path, context: &serde_json::Value) -> Result<Nats> {
    let contexts = folder.join("nats/context");
    std::fs::create_dir_all(&contexts)?;
    std::fs::write(contexts.join("c.json"), context.to_string())?;
    let folder = folder.display().to_string();
    let env = |name: &str| match name {
        "XDG_CONFIG_HOME" => Some(folder.clone()),
        "ONCELY_NATS_CONTEXT" => Some("c".to_owned()),
        _ => None,
    };
    Ok(HostConfig::resolve(&HostFlags::default(), &env)?.nats)
}

fn password(password: &str) -> (String, ConnectOptions) {
    let configuration = format!("authorization {{ user: me, password: {password} }}");
    (
        configuration,
        ConnectOptions::with_user_and_password("me".to_owned(), password.to_owned()),
    )
}

/// Receives messages repeatedly while the server changes its login.
async fn check_rotation(
    (first, first_options): (String, ConnectOptions),
    (second, second_options): (String, ConnectOptions),
    nats: impl FnOnce(&NatsServer) -> Result<Nats>,
    rotate: impl FnOnce(&NatsServer) -> Result<()>,
) -> Result<()> {
    let mut server = NatsServer::start_secured(&first, first_options).await?;
    let bus = Bus::connect(&nats(&server)?).await?;
    bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
    let mut pull = pull_from(&bus).await?;
    server
        .publish_all(vec![message("in.a", &[("Nats-Msg-Id", "1")])])
        .await?;
    next(&mut pull).await?.receipt.ack(&proof().await?).await?;
    rotate(&server)?;
    server.restart_secured(&second, second_options).await?;
    server
        .publish_all(vec![message("in.a", &[("Nats-Msg-Id", "2")])])
        .await?;
    let pulled = next(&mut pull).await?;
    assert_eq!(pulled.message.event_id, "2");
    pulled.receipt.ack(&proof().await?).await?;
    eventually("publishing works again", || async {
        let answers = bus.publish(vec![outgoing("in.b", "3")]).await;
        Ok(answers[0].is_ok().then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_rotated_context_login_is_used_for_the_next_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let context = |server: &NatsServer, password: &str| serde_json::json!({ "url": server.url(), "user": "me", "password": password });
    check_rotation(
        password("first"),
        password("second"),
        |server| nats_from_context(folder.path(), &context(server, "first")),
        |server| nats_from_context(folder.path(), &context(server, "second")).map(drop),
    )
    .await
}

#[tokio::test]
async fn a_rotated_nkey_is_used_for_the_next_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("user.nk");
    let key = || -> Result<(String, String)> {
        let key = nkeys::KeyPair::new_user();
        let seed = key.seed().map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok((
            format!(
                "authorization {{ users: [{{ nkey: {} }}] }}",
                key.public_key()
            ),
            seed,
        ))
    };
    let ((first, first_seed), (second, second_seed)) = (key()?, key()?);
    std::fs::write(&file, &first_seed)?;
    let login = Login::Nkey(file.clone());
    check_rotation(
        (first, ConnectOptions::with_nkey(first_seed)),
        (second, ConnectOptions::with_nkey(second_seed.clone())),
        |server| {
            Ok(Nats {
                servers: vec![server.url()],
                ..nats(login)
            })
        },
        |_| Ok(std::fs::write(&file, second_seed)?),
    )
    .await
}

#[tokio::test]
async fn a_context_sets_the_jetstream_domain_and_inbox_prefix() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = NatsServer::start_with("jetstream { domain: hub }").await?;
    for (domain, prefix) in [("hub", ""), ("", "$JS.hub.API."), ("", "")] {
        let context = serde_json::json!({
            "url": server.url(), "jetstream_domain": domain, "jetstream_api_prefix": prefix, "inbox_prefix": "_MINE.a",
        });
        let bus = Bus::connect(&nats_from_context(folder.path(), &context)?).await?;
        bus.ensure_stream(&StreamSpec::new("IN", &["in.>"])).await?;
        let mut pull = pull_from(&bus).await?;
        let id = format!("{domain}{prefix}");
        server
            .publish_all(vec![message("in.a", &[("Nats-Msg-Id", &format!("m{id}"))])])
            .await?;
        let pulled = next(&mut pull).await?;
        assert_eq!(pulled.message.event_id, format!("m{id}"));
        pulled.receipt.ack(&proof().await?).await?;
    }
    let elsewhere = serde_json::json!({ "url": server.url(), "jetstream_domain": "leaf" });
    let error = Bus::connect(&nats_from_context(folder.path(), &elsewhere)?)
        .await
        .map(drop)
        .unwrap_err();
    assert!(format!("{error:#}").contains("JetStream"), "{error:#}");
    Ok(())
}

#[test]
fn a_context_with_unsupported_settings_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for setting in ["socks_proxy", "nsc", "windows_cert_store", "something_new"] {
        let context = serde_json::json!({ "url": "nats://a", setting: "x", "description": "d" });
        let error = nats_from_context(folder.path(), &context).unwrap_err();
        assert!(
            format!("{error:#}").contains(&format!("`{setting}`")),
            "{error:#}"
        );
    }
    Ok(())
}
