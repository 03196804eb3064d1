//! One POST to a webhook: a connection of its own, a timeout, and a signature as in Standard
//! Webhooks.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use ring::hmac;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::config::{Secret, Webhook, webhook_key};

/// The timeout of one POST, from name resolution to the answer.
const POST_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of a POST.
pub(super) enum PostResult {
    /// 2xx.
    Accepted,
    /// 4xx, except for statuses that call for a retry.
    Rejected(String),
    /// No answer, or any other status.
    Failed(String),
}

/// Posts to one webhook.
pub struct WebhookClient {
    webhook: Webhook,
    key: Option<hmac::Key>,
    /// Set for https URLs.
    tls: Option<TlsConnector>,
}

impl WebhookClient {
    /// Creates a client, which signs its posts if there is a secret.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(webhook: Webhook, secret: Option<&Secret>) -> Result<Self> {
        let key = secret
            .and_then(webhook_key)
            .map(|key| hmac::Key::new(hmac::HMAC_SHA256, &key));
        let tls = if webhook.is_tls {
            Some(tls().context("set up TLS")?)
        } else {
            None
        };
        Ok(WebhookClient { webhook, key, tls })
    }

    /// Sends `body` under an id that is the same for each attempt.
    pub(super) async fn post(&self, id: &str, body: Bytes, now: Timestamp) -> PostResult {
        match tokio::time::timeout(POST_TIMEOUT, self.send(id, body, now)).await {
            Ok(Ok(status)) => classify(status),
            Ok(Err(error)) => PostResult::Failed(format!("{error:#}")),
            Err(_) => PostResult::Failed(format!("no answer within {POST_TIMEOUT:?}")),
        }
    }

    async fn send(&self, id: &str, body: Bytes, now: Timestamp) -> Result<StatusCode> {
        let Webhook { host, port, .. } = &self.webhook;
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), *port)).await;
        let stream = stream.with_context(|| format!("connect to {}", self.webhook.redacted()))?;
        let request = self.request(id, body, now)?;
        match &self.tls {
            None => send_request(stream, request).await,
            Some(tls) => {
                let name = host.trim_matches(['[', ']']).to_owned();
                let name = ServerName::try_from(name).context("parse the webhook's host name")?;
                let stream = tls.connect(name, stream).await;
                send_request(
                    stream
                        .with_context(|| format!("start TLS with {}", self.webhook.redacted()))?,
                    request,
                )
                .await
            }
        }
    }

    fn request(&self, id: &str, body: Bytes, now: Timestamp) -> Result<Request<Full<Bytes>>> {
        let timestamp = now.as_second();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(&self.webhook.path)
            .header(HOST, &self.webhook.authority)
            .header(USER_AGENT, concat!("oncely/", env!("CARGO_PKG_VERSION")))
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp);
        if let Some(key) = &self.key {
            request = request.header("webhook-signature", signature(key, id, timestamp, &body));
        }
        request.body(Full::new(body)).context("build the request")
    }
}

/// Signs `{id}.{timestamp}.{body}`, as Standard Webhooks specify.
fn signature(key: &hmac::Key, id: &str, timestamp: i64, body: &[u8]) -> String {
    let mut signing = hmac::Context::with_key(key);
    signing.update(format!("{id}.{timestamp}.").as_bytes());
    signing.update(body);
    format!("v1,{}", STANDARD.encode(signing.sign()))
}

/// Sends a request on a connection and returns the status. The body of the answer is ignored.
async fn send_request(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<StatusCode> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answer = sender.send_request(request);
    tokio::pin!(answer);
    tokio::select! {
        // Drives the request; it ends before the answer only when the connection breaks.
        ended = connection => match ended {
            Ok(()) => Ok(answer.await.context("read the answer")?.status()),
            Err(error) => Err(error).context("send an alarm"),
        },
        answer = &mut answer => Ok(answer.context("send an alarm")?.status()),
    }
}

fn classify(status: StatusCode) -> PostResult {
    const PATIENCE: [StatusCode; 3] = [
        StatusCode::REQUEST_TIMEOUT,
        StatusCode::TOO_EARLY,
        StatusCode::TOO_MANY_REQUESTS,
    ];
    let why = format!("the webhook answered {status}");
    match status {
        _ if status.is_success() => PostResult::Accepted,
        _ if status.is_client_error() && !PATIENCE.contains(&status) => PostResult::Rejected(why),
        _ => PostResult::Failed(why),
    }
}

/// TLS with the root certificates of the operating system.
fn tls() -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        bail!(
            "no root certificates found in the operating system: {:?}",
            found.errors
        );
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("select the versions of TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checked against the example of the Standard Webhooks libraries.
    #[test]
    fn signatures_verify_as_standard_webhooks() {
        let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let signed = signature(
            &key,
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn webhook_responses_are_classified() {
        for (status, expected) in [
            (200, "accepted"),
            (204, "accepted"),
            (302, "failed"),
            (400, "rejected"),
            (401, "rejected"),
        ] {
            assert_eq!(classified(status), expected, "{status}");
        }
        for (status, expected) in [
            (408, "failed"),
            (425, "failed"),
            (429, "failed"),
            (500, "failed"),
            (503, "failed"),
        ] {
            assert_eq!(classified(status), expected, "{status}");
        }
    }

    fn classified(status: u16) -> &'static str {
        match classify(StatusCode::from_u16(status).unwrap()) {
            PostResult::Accepted => "accepted",
            PostResult::Rejected(_) => "rejected",
            PostResult::Failed(_) => "failed",
        }
    }
}
