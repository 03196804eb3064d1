//! The connection for publications. A message goes over the connection that it was meant for, or is not sent: a stream that
//! lost its tail between two connections is looked at before anything new follows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use async_nats::StatusCode;
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::connection::{Connection, Listener, Message};
use super::readable::read_block;
use super::wire::Arrived;

/// How long a stream may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A message for a stream, as the server is told.
pub(super) struct Publication {
    pub subject: String,
    pub headers: Vec<u8>,
    pub body: Bytes,
}

/// What a stream answers.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ack {
    pub stream: String,
    pub seq: u64,
    pub duplicate: bool,
    pub error: Option<Refusal>,
}

/// Why a stream did not store a message.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Refusal {
    /// As in HTTP.
    pub code: u64,
    pub err_code: u64,
    pub description: String,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// It was not sent.
    NotSent,
    /// The subject has no subscriber.
    Unheard,
    /// The message may or may not be stored.
    Lost(String),
}

type Answer = Result<Ack, Unanswered>;

/// Sends messages and tells their answers apart. Cheap to clone.
#[derive(Clone)]
pub(super) struct Publisher {
    connection: Connection,
    inbox: Arc<str>,
    waiting: Arc<Mutex<Waiting>>,
    /// Ends with the last clone.
    _hearing: Arc<JoinSet<()>>,
}

/// The messages that have no answer yet, by the last token of where it goes.
#[derive(Default)]
struct Waiting {
    next: u64,
    open: HashMap<u64, Open>,
}

struct Open {
    /// The number of the connection that it was sent over.
    over: u64,
    answer: oneshot::Sender<Answer>,
}

impl Publisher {
    /// Answers come to subjects below `inbox`.
    pub fn new(connection: Connection, inbox: String) -> Self {
        let waiting = Arc::<Mutex<Waiting>>::default();
        let listener = connection.listen(&format!("{inbox}.*"));
        let mut hearing = JoinSet::new();
        hearing.spawn(hear(listener, connection.connections(), Arc::clone(&waiting)));
        Publisher { connection, inbox: inbox.into(), waiting, _hearing: Arc::new(hearing) }
    }

    /// Returns once there is, or was, a connection.
    pub async fn ready(&self) -> Result<()> {
        self.connection.ready().await
    }

    pub fn is_connected(&self) -> bool {
        self.connection.is_up()
    }

    /// Changes with each new connection.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connection.connections()
    }

    /// Whether the server denied a message to this subject just now.
    pub fn is_denied(&self, subject: &str) -> bool {
        self.connection.is_denied(subject)
    }

    /// Sends a message over the connection of this number, or not at all; the future ends with the answer. Messages leave in
    /// the order of these calls.
    pub fn send(&self, over: u64, publication: Publication) -> impl Future<Output = Answer> + use<> {
        let receiver = self.begin(over, publication);
        let waiting = Arc::clone(&self.waiting);
        async move {
            let (token, receiver) = receiver.ok_or(Unanswered::NotSent)?;
            let answer = tokio::time::timeout(ANSWER_WITHIN, receiver).await;
            answer.map_or_else(
                |_| {
                    waiting.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&token);
                    Err(Unanswered::Lost("the stream does not answer in time".to_owned()))
                },
                |answer| answer.unwrap_or_else(|_| Err(lost())),
            )
        }
    }

    fn begin(&self, over: u64, publication: Publication) -> Option<(u64, oneshot::Receiver<Answer>)> {
        // The number is read under the lock under which messages of earlier connections are taken out.
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_connected() || self.connection.number() != over {
            return None;
        }
        let token = waiting.next;
        waiting.next += 1;
        let (answer, receiver) = oneshot::channel();
        waiting.open.insert(token, Open { over, answer });
        let Publication { subject, headers, body } = publication;
        self.connection.publish(Message { over, subject, reply: format!("{}.{token}", self.inbox), headers, body });
        Some((token, receiver))
    }
}

/// Passes answers on until the connection is given up. Messages sent over a connection that is gone get no answer any more.
async fn hear(mut listener: Listener, mut connections: watch::Receiver<u64>, waiting: Arc<Mutex<Waiting>>) {
    loop {
        tokio::select! {
            // An answer that has arrived counts.
            biased;
            arrived = listener.next() => match arrived {
                Some(arrived) => answer(&arrived, &waiting),
                None => return,
            },
            changed = connections.changed() => match changed {
                Ok(()) => {
                    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    let now = *connections.borrow_and_update();
                    let gone: Vec<Open> = waiting.open.extract_if(|_, open| open.over != now).map(|(_, open)| open).collect();
                    drop(waiting);
                    gone.into_iter().for_each(|open| drop(open.answer.send(Err(lost()))));
                }
                Err(_) => return,
            },
        }
    }
}

fn answer(arrived: &Arrived, waiting: &Mutex<Waiting>) {
    let token = arrived.subject.rsplit(|byte| *byte == b'.').next().and_then(|token| std::str::from_utf8(token).ok());
    let Some(token) = token.and_then(|token| token.parse::<u64>().ok()) else { return };
    let Some(open) = waiting.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&token) else { return };
    let _ = open.answer.send(read(arrived));
}

fn read(arrived: &Arrived) -> Answer {
    let status = read_block(&arrived.headers).ok().and_then(|block| block.status);
    if status == Some(StatusCode::NO_RESPONDERS) {
        return Err(Unanswered::Unheard);
    }
    serde_json::from_slice(&arrived.body)
        .map_err(|error| Unanswered::Lost(format!("the answer makes no sense: {error}")))
}

fn lost() -> Unanswered {
    Unanswered::Lost("the connection to NATS was lost before the stream answered".to_owned())
}
