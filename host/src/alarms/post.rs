//! One POST to a webhook: a connection of its own, a timeout, and a signature as in Standard
//! Webhooks.

use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, StatusCode};
use jiff::Timestamp;
use ring::hmac;

use crate::config::{Secret, Webhook, webhook_key};
use crate::https::HttpsClient;

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
    client: HttpsClient,
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
        let client = HttpsClient::default();
        if webhook.is_tls {
            client.tls()?;
        }
        Ok(WebhookClient {
            webhook,
            key,
            client,
        })
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
        let request = self.request(id, body, now)?;
        let answer = self.client.send(request).await;
        let shown = || format!("post to {}", self.webhook.redacted());
        // The body of the answer is ignored.
        answer.map(|answer| answer.status()).with_context(shown)
    }

    fn request(&self, id: &str, body: Bytes, now: Timestamp) -> Result<Request<Full<Bytes>>> {
        let timestamp = now.as_second();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.webhook.url())
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
