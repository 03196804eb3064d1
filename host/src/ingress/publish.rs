//! `POST /publish/{subject}`: a message goes to the outbox in the transaction of its key, and from there to its stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use super::problem::Problem;
use crate::delivery::HAND_OVER_LEASE;
use crate::delivery::request::{Asked, Claim, Handled, claim, commit};
use crate::message::Output;
use crate::metrics::Metrics;
use crate::request::HttpAnswer;
use crate::store::{Store, StoreError, Tx};
use crate::subject;

/// What paths begin with.
pub(super) const PATH: &str = "/publish/";

/// In whose name keys and outputs stand. No worker can be called so.
pub const PUBLISHER: &str = "oncely:publish";

/// For how long the same key publishes nothing again.
pub const PUBLISH_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// How long one statement may take.
const TIME: Duration = Duration::from_secs(10);

/// Headers of the request that go with the message.
const KEPT_HEADERS: [&str; 3] = ["content-type", "traceparent", "tracestate"];

/// What precedes the name of a header that is to be the message's.
const HEADER_PREFIX: &str = "x-message-";

pub(super) struct Publishing {
    pub store: Arc<dyn Store>,
    /// The largest payload the broker takes, in bytes.
    pub payload_max: usize,
    pub metrics: Arc<Metrics>,
}

/// The subject of a path, if it may be published to.
pub(super) fn subject(path: &str, granted: &[String]) -> Result<String, Problem> {
    let subject = percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned();
    subject::check_subject(&subject).map_err(|why| Problem::subject_refused(400, why.to_string()))?;
    if subject::is_reserved(&subject) || !granted.iter().any(|pattern| subject::matches(pattern, &subject)) {
        let why = "this host does not let it be published over HTTP (its setting `http_publish` says what it lets)";
        return Err(Problem::subject_refused(403, why));
    }
    Ok(subject)
}

impl Publishing {
    /// Publishes the body of a request, once for each key. An error means that nothing happened.
    pub(super) async fn publish(&self, subject: &str, asked: &Asked) -> Result<Handled, StoreError> {
        let tx = self.store.begin(PUBLISHER, TIME).await?;
        let mut tx = match claim(tx, asked).await? {
            Claim::Ours(tx) => tx,
            Claim::Settled(settled) => return Ok(settled),
        };
        match self.write(subject, asked, tx.as_mut()).await {
            Ok(handled) => commit(tx, handled, &self.metrics, PUBLISHER).await,
            Err(error) => {
                tx.rollback().await;
                Err(error)
            }
        }
    }

    async fn write(&self, subject: &str, asked: &Asked, tx: &mut dyn Tx) -> Result<Handled, StoreError> {
        let id = Uuid::now_v7().to_string();
        let since = Instant::now();
        let outputs = tx.append_outputs(&[output(&id, subject, asked)], HAND_OVER_LEASE).await?;
        let answer = HttpAnswer {
            status: 202,
            headers: vec![("content-type".to_owned(), "application/json".to_owned())],
            body: json!({"id": id, "subject": subject}).to_string().into(),
        };
        if let Some((key, keep)) = &asked.key {
            tx.answer_request(key, &answer, *keep).await?;
        }
        Ok(Handled::Answered { answer, replayed: false, outputs, since })
    }
}

fn output(id: &str, subject: &str, asked: &Asked) -> Output {
    let kept = |name: &str| KEPT_HEADERS.contains(&name).then(|| name.to_owned());
    let own = |name: &str| name.strip_prefix(HEADER_PREFIX).map(str::to_owned);
    let headers = asked.request.headers.iter().filter_map(|(name, value)| {
        let name = own(name).or_else(|| kept(name))?;
        let is_ours = name.starts_with("nats-") || name.starts_with("oncely-") || name.is_empty();
        (!is_ours).then(|| (name, value.clone()))
    });
    Output {
        id: id.to_owned(),
        event_id: id.to_owned(),
        ordinal: 0,
        subject: subject.to_owned(),
        headers: headers.collect(),
        body: asked.request.body.clone(),
        ordering_key: None,
        delay: Duration::ZERO,
    }
}
