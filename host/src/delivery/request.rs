//! One request over HTTP becomes one transaction: its key, the effects, the outputs and the answer, all or none.
//!
//! An answer of 400 and above says that it did not work: what the handler wrote is taken back, and the answer is kept. A
//! handler that was cut off answered nothing: its transaction is rolled back, and whoever asks again runs it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use uuid::Uuid;

use super::{CONFLICTS_MAX, Delivery, HAND_OVER_LEASE, Lent, house_error, tell};
use crate::cache::Began;
use crate::fault;
use crate::guest::{CallFailure, FailureKind, Outcome, RequestCall};
use crate::metrics::Metrics;
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{self, Message};
use crate::model::request::{HttpAnswer, HttpRequest, RequestKey};
use crate::store::conflict::pause_after;
use crate::store::{ClaimedRequest, OutboxRow, StoreError, Tx};

/// A request and what is known of it.
#[derive(Debug, Clone)]
pub struct Asked {
    pub request: HttpRequest,
    /// Its key, and for how long the answer is kept; none for a request that may be handled again.
    pub key: Option<(RequestKey, Duration)>,
}

/// What a request came to.
#[derive(Debug)]
pub enum Handled {
    Answered {
        answer: HttpAnswer,
        /// Whether it was given before.
        replayed: bool,
        /// Committed outputs that are to be published now, in order; their leases began at `since` or later.
        outputs: Vec<OutboxRow>,
        since: Instant,
    },
    /// Its key belongs to another request.
    OtherRequest,
    /// Another host handles it just now.
    InFlight,
    /// The handler was cut off, or broke a rule. Nothing took effect.
    Failed(CallFailure),
    /// The commit was sent, and nobody said what became of it: asking again with the same key tells.
    Unclear(anyhow::Error),
}

impl Handled {
    fn answered(answer: HttpAnswer, replayed: bool) -> Self {
        Handled::Answered { answer, replayed, outputs: Vec::new(), since: Instant::now() }
    }
}

impl Delivery {
    /// Handles a request. An error means that nothing happened. The future must run to its end, as that of
    /// [`Delivery::deliver`].
    pub async fn handle(&self, asked: &Asked) -> Result<Handled, StoreError> {
        let mut conflicts = 0;
        loop {
            let cause = match self.handle_once(asked).await {
                Ok(Ok(handled)) => return Ok(handled),
                Ok(Err(why)) => anyhow::anyhow!(why),
                Err(StoreError::Conflict(cause)) => cause,
                Err(error) => return Err(error),
            };
            self.metrics.conflict(&self.worker.name);
            conflicts += 1;
            if conflicts > CONFLICTS_MAX {
                return Err(StoreError::Conflict(cause));
            }
            pause_after(conflicts).await;
        }
    }

    /// Keeps `answer` for a request that has no other one, in a transaction of its own.
    pub async fn keep_answer(&self, asked: &Asked, answer: HttpAnswer) -> Result<Handled, StoreError> {
        let Some((key, keep)) = &asked.key else { return Ok(Handled::answered(answer, false)) };
        let tx = self.store.begin(&self.worker.name, self.worker.limits.time).await?;
        let mut tx = match claim(tx, asked).await? {
            Claim::Ours(tx) => tx,
            Claim::Settled(settled) => return Ok(settled),
        };
        if let Err(error) = tx.answer_request(key, &answer, *keep).await {
            tx.rollback().await;
            return match error {
                StoreError::Refused(cause) => Ok(refused(&cause)),
                error => Err(error),
            };
        }
        commit(tx, Handled::answered(answer, false), &self.metrics, &self.worker.name).await
    }

    /// The inner error says what stood in its way.
    async fn handle_once(&self, asked: &Asked) -> Result<Result<Handled, String>, StoreError> {
        let may_write = !asked.request.is_safe();
        let (name, time) = (&self.worker.name, self.worker.limits.time);
        let began = self.cache.begin(name);
        let tx = match may_write {
            true => self.store.begin(name, time).await?,
            false => self.store.begin_reading(name, time).await?,
        };
        fault::point(fault::AFTER_BEGIN);
        let tx = match claim(tx, asked).await? {
            Claim::Ours(tx) => tx,
            Claim::Settled(settled) => return Ok(Ok(settled)),
        };
        fault::point(fault::AFTER_CLAIM);
        let lent = Lent::new(self.store.dialect(), tx);
        lent.begin_member().await;
        let message = stand_in(&asked.request);
        let id = asked.key.as_ref().map(|(key, _)| key.invocation_id(name));
        let call = RequestCall { request: asked.request.clone(), id, may_write };
        let outcome = self.call(vec![Arc::clone(&message)], 1, &lent, BatchState::default(), None, Some(call)).await;
        fault::point(fault::AFTER_GUEST);
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                lent.take_back().await?.rollback().await;
                return Err(house_error(error));
            }
        };
        tell(name, &message.event_id, &outcome.logs);
        self.conclude_request(asked, &message.event_id, outcome, lent, began).await
    }

    /// Writes what the handler left, and its answer, and commits.
    async fn conclude_request(
        &self,
        asked: &Asked,
        event_id: &str,
        mut outcome: Outcome,
        lent: Lent,
        began: Began,
    ) -> Result<Result<Handled, String>, StoreError> {
        let answer = match what_it_said(&mut outcome) {
            Said::Answer(answer) => answer,
            Said::Conflict(why) => {
                lent.take_back().await?.rollback().await;
                return Ok(Err(why));
            }
            Said::Nothing(failure) => {
                lent.take_back().await?.rollback().await;
                return Ok(Ok(Handled::Failed(failure)));
            }
        };
        let has_worked = answer.status < 400;
        let is_undone = has_worked || !outcome.ran_sql || lent.undo_member().await.map_err(house_error)?;
        let mut tx = lent.take_back().await?;
        let cache = if has_worked { std::mem::take(&mut outcome.cache) } else { CacheWrites::default() };
        if asked.request.is_safe() || (!has_worked && asked.key.is_none()) {
            tx.rollback().await;
            // Whoever only reads may leave what it read.
            self.cache.commit(&self.worker.name, &cache, began, None).await;
            return Ok(Ok(Handled::answered(answer, false)));
        }
        if !is_undone {
            tx.rollback().await;
            return self.keep_answer(asked, answer).await.map(Ok);
        }
        let told = self.told(Some(event_id), &cache)?;
        let id = told.as_ref().map(|told| told.id.clone());
        outcome.outputs.extend(told);
        let since = Instant::now();
        match self.write(asked, &answer, outcome, has_worked, tx.as_mut()).await {
            Ok(outputs) => {
                let handled = Handled::Answered { answer, replayed: false, outputs, since };
                let handled = commit(tx, handled, &self.metrics, &self.worker.name).await?;
                match &handled {
                    Handled::Answered { .. } => {
                        self.cache.commit(&self.worker.name, &cache, began, id.as_deref()).await;
                    }
                    Handled::Unclear(_) => self.doubt(&cache).await,
                    _ => {}
                }
                Ok(Ok(handled))
            }
            Err(error) => {
                tx.rollback().await;
                match error {
                    StoreError::Refused(cause) => Ok(Ok(refused(&cause))),
                    error => Err(error),
                }
            }
        }
    }

    async fn write(
        &self,
        asked: &Asked,
        answer: &HttpAnswer,
        mut outcome: Outcome,
        has_worked: bool,
        tx: &mut dyn Tx,
    ) -> Result<Vec<OutboxRow>, StoreError> {
        let mut rows = Vec::new();
        if has_worked {
            outcome.state.keep();
            let writes = outcome.state.writes();
            if !writes.is_empty() {
                tx.save_state(&writes).await?;
            }
            if !outcome.outputs.is_empty() {
                rows = tx.append_outputs(&outcome.outputs, HAND_OVER_LEASE).await?;
            }
        }
        if let Some((key, keep)) = &asked.key {
            tx.answer_request(key, answer, *keep).await?;
        }
        Ok(rows)
    }
}

/// Commits, and only then believes in the answer. The error says that nothing happened.
pub(crate) async fn commit(
    tx: Box<dyn Tx>,
    handled: Handled,
    metrics: &Metrics,
    worker: &str,
) -> Result<Handled, StoreError> {
    fault::point(fault::BEFORE_COMMIT);
    match tx.commit().await {
        Ok(_) => {
            fault::point(fault::AFTER_COMMIT);
            Ok(handled)
        }
        Err(StoreError::Unavailable(cause)) => {
            metrics.commit_unclear(worker);
            Ok(Handled::Unclear(cause))
        }
        Err(StoreError::Refused(cause)) => Ok(refused(&cause)),
        Err(error) => Err(error),
    }
}

/// What the handler came to.
enum Said {
    Answer(HttpAnswer),
    /// Another transaction stood in its way.
    Conflict(String),
    Nothing(CallFailure),
}

/// A handler that was told of a failed statement and answers that it did not work has its answer: nothing of it takes effect.
fn what_it_said(outcome: &mut Outcome) -> Said {
    let result = std::mem::replace(&mut outcome.result, Ok(Vec::new()));
    let failure = match result.map(|answers| answers.into_iter().find_map(Result::err)) {
        Ok(failure) => failure,
        Err(failure) => Some(failure),
    };
    match (failure, outcome.answer.take()) {
        (Some(failure), _) if failure.kind == FailureKind::Conflict => Said::Conflict(failure.message),
        (Some(failure), Some(answer)) if answer.status >= 400 && failure.kind == FailureKind::Retry => {
            Said::Answer(answer)
        }
        (Some(failure), _) => Said::Nothing(failure),
        (None, Some(answer)) => Said::Answer(answer),
        (None, None) => {
            Said::Nothing(CallFailure::new(FailureKind::Retry, "no-answer", "the handler returned without an answer"))
        }
    }
}

fn refused(cause: &anyhow::Error) -> Handled {
    Handled::Failed(CallFailure::new(FailureKind::Retry, "commit-refused", format!("{cause:#}")))
}

/// Who handles a request.
pub(crate) enum Claim {
    /// This transaction, which has the key, if there is one.
    Ours(Box<dyn Tx>),
    /// Somebody did, or does; the transaction is over.
    Settled(Handled),
}

/// Takes the key of a request, if it has one. After an error the transaction is over, too.
pub(crate) async fn claim(mut tx: Box<dyn Tx>, asked: &Asked) -> Result<Claim, StoreError> {
    let Some((key, _)) = &asked.key else { return Ok(Claim::Ours(tx)) };
    let settled = match tx.claim_request(key).await {
        Ok(ClaimedRequest::Fresh) => return Ok(Claim::Ours(tx)),
        Ok(ClaimedRequest::Answered(answer)) => Ok(Claim::Settled(Handled::answered(answer, true))),
        Ok(ClaimedRequest::OtherRequest) => Ok(Claim::Settled(Handled::OtherRequest)),
        Ok(ClaimedRequest::InFlight) => Ok(Claim::Settled(Handled::InFlight)),
        Err(error) => Err(error),
    };
    tx.rollback().await;
    settled
}

/// The message that stands for a request: outputs name its id as their cause, and theirs are made of it.
fn stand_in(request: &HttpRequest) -> Arc<Message> {
    // A valid one is ASCII; the bytes of any other would not be those that came.
    let trace = message::header(&request.headers, "traceparent").filter(|trace| trace.is_ascii());
    Arc::new(Message {
        event_id: Uuid::now_v7().to_string(),
        subject: format!("{} {}", request.method, request.path_and_query),
        headers: trace.map(|trace| ("traceparent".to_owned(), trace.to_owned())).into_iter().collect(),
        body: Bytes::new(),
        origin: None,
        redriven: None,
    })
}
