//! The export: batches of recorded spans go to the collector, and a collector that is down costs
//! spans only.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, StatusCode};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::Span;
use super::otlp::{self, Resource};
use crate::config::TraceEndpoint;
use crate::https::HttpsClient;
use crate::metrics::{Metrics, SpanOutcome};
use crate::model::retry::{Backoff, LastError};

/// Maximum number of spans of a request.
const BATCH_MAX: usize = 512;

/// How long spans are collected for one request.
const BATCH_INTERVAL: Duration = Duration::from_millis(500);

/// The timeout of a request, from name resolution to the answer.
const POST_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a batch is sent before its spans are dropped.
const TRIES: u32 = 4;

/// Sends spans to a collector.
pub(super) struct Exporter {
    endpoint: TraceEndpoint,
    resource: Resource,
    client: HttpsClient,
    metrics: Arc<Metrics>,
    last_error: LastError,
}

/// Exports spans until the last sender is gone.
pub(super) async fn run(
    mut exporter: Exporter,
    mut spans: mpsc::Receiver<Span>,
    mut flushes: mpsc::Receiver<oneshot::Sender<()>>,
) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    loop {
        // Collect a batch.
        let mut flushed = None;
        let mut send_at = None;
        while batch.len() < BATCH_MAX && flushed.is_none() {
            let due = async {
                match send_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let room = BATCH_MAX - batch.len();
            tokio::select! {
                received = spans.recv_many(&mut batch, room) => match received {
                    0 => break,
                    _ => send_at = send_at.or(Some(Instant::now() + BATCH_INTERVAL)),
                },
                () = due => break,
                Some(done) = flushes.recv() => flushed = Some(done),
            }
        }

        // A flush takes all that is recorded.
        if let Some(done) = flushed {
            loop {
                while batch.len() < BATCH_MAX
                    && let Ok(span) = spans.try_recv()
                {
                    batch.push(span);
                }
                if batch.is_empty() {
                    break;
                }
                exporter.send(std::mem::take(&mut batch)).await;
            }
            let _ = done.send(());
            continue;
        }
        if batch.is_empty() {
            return;
        }
        exporter.send(std::mem::take(&mut batch)).await;
    }
}

/// The result of a request to the collector.
enum Posted {
    Accepted,
    /// It may be accepted later.
    Failed(String),
    /// It would be rejected again.
    Rejected(String),
}

impl Exporter {
    /// Creates the exporter.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn new(endpoint: TraceEndpoint, resource: Resource, metrics: Arc<Metrics>) -> Result<Self> {
        let client = HttpsClient::default();
        if endpoint.is_tls() {
            client.tls()?;
        }
        Ok(Exporter {
            endpoint,
            resource,
            client,
            metrics,
            last_error: LastError::default(),
        })
    }

    /// Sends a batch, several times if necessary. Then its spans are dropped.
    async fn send(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let body = Bytes::from(otlp::body(&self.resource, spans));
        let mut backoff = Backoff::default();
        for _ in 0..TRIES {
            let posted = tokio::time::timeout(POST_TIMEOUT, self.post(body.clone())).await;
            let posted = posted
                .unwrap_or_else(|_| Posted::Failed(format!("no answer within {POST_TIMEOUT:?}")));
            let (why, is_final) = match posted {
                Posted::Accepted => {
                    self.last_error.clear();
                    return self.metrics.trace_spans(SpanOutcome::Exported, count);
                }
                Posted::Failed(why) => (why, false),
                Posted::Rejected(why) => (why, true),
            };
            if self.last_error.is_new(&why) {
                tracing::warn!(
                    endpoint = self.endpoint.redacted(),
                    error = why,
                    "failed to export spans"
                );
            }
            if is_final {
                break;
            }
            tokio::time::sleep(backoff.next(rand::random())).await;
        }
        self.metrics.trace_spans(SpanOutcome::Dropped, count);
    }

    async fn post(&self, body: Bytes) -> Posted {
        match self.try_post(body).await {
            Ok(status) if status.is_success() => Posted::Accepted,
            Ok(status) => {
                let why = format!("the collector answered {status}");
                // The statuses that the specification of OTLP calls retryable.
                match status.as_u16() {
                    429 | 502 | 503 | 504 => Posted::Failed(why),
                    _ => Posted::Rejected(why),
                }
            }
            Err(error) => Posted::Failed(format!("{error:#}")),
        }
    }

    async fn try_post(&self, body: Bytes) -> Result<StatusCode> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.endpoint.url())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(Full::new(body))
            .context("build the request")?;
        // The body of the answer is ignored.
        Ok(self.client.send(request).await?.status())
    }
}
