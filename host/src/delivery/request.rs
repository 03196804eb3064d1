//! An HTTP request becomes one transaction: its idempotency key, its effects, its outputs and its
//! response are committed together or not at all.
//!
//! A response with a status of 400 or above means failure. The writes of the handler are rolled
//! back, and the response is stored. A handler that was stopped has no response. Its transaction is
//! rolled back, and a retry of the request runs the handler again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use uuid::Uuid;

use super::{CONFLICTS_MAX, Delivery, HAND_OVER_LEASE, SharedTx, log_guest_output, store_error};
use crate::cache::ReadVersion;
use crate::fault;
use crate::guest::{CallFailure, CallOutcome, FailureKind, RequestCall};
use crate::metrics::Metrics;
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{self, Message};
use crate::model::request::{HttpRequest, HttpResponse, RequestKey};
use crate::store::conflict::pause_after;
use crate::store::{ClaimedRequest, OutboxRow, StoreError, Tx};

/// A request with its idempotency key.
#[derive(Debug, Clone)]
pub struct IncomingRequest {
    /// The request, read to its end.
    pub request: HttpRequest,
    /// The key, and how long the response is kept. `None` for a request that may be handled again.
    pub key: Option<(RequestKey, Duration)>,
}

impl IncomingRequest {
    /// The inputs of the handler of `worker`.
    pub(crate) fn call(&self, worker: &str) -> RequestCall {
        let key = self.key.as_ref();
        RequestCall {
            request: self.request.clone(),
            id: key.map(|(key, _)| key.invocation_id(worker)),
            may_write: !self.request.is_safe(),
        }
    }
}

/// The outcome of a request.
#[derive(Debug)]
pub enum RequestOutcome {
    /// The request has a response, which may also be that of a failed handler.
    Responded {
        /// The response to send to the caller.
        response: HttpResponse,
        /// Whether this is the stored response of an earlier request.
        replayed: bool,
        /// Committed outputs to publish now, in order. Their leases began at `leased_at` or later.
        outputs: Vec<OutboxRow>,
        /// Not later than the start of the first of these leases.
        leased_at: Instant,
    },
    /// The key belongs to a different request.
    OtherRequest,
    /// Another host is handling the request.
    InFlight,
    /// The handler was stopped or violated a rule. Nothing took effect.
    Failed(CallFailure),
    /// The commit was sent and its outcome is unknown. A retry with the same key returns the
    /// outcome.
    Unclear(anyhow::Error),
}

impl RequestOutcome {
    fn responded(response: HttpResponse, replayed: bool) -> Self {
        RequestOutcome::Responded {
            response,
            replayed,
            outputs: Vec::new(),
            leased_at: Instant::now(),
        }
    }
}

impl Delivery {
    /// Handles a request. The future must run to completion, like that of [`Delivery::deliver`].
    ///
    /// # Errors
    /// Nothing took effect.
    pub async fn handle(&self, incoming: &IncomingRequest) -> Result<RequestOutcome, StoreError> {
        let mut conflicts = 0;
        loop {
            let cause = match self.handle_once(incoming).await {
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

    /// Stores `response` for a request that has no other one, in a transaction of its own.
    ///
    /// # Errors
    /// Nothing was stored.
    pub async fn store_response(
        &self,
        incoming: &IncomingRequest,
        response: HttpResponse,
    ) -> Result<RequestOutcome, StoreError> {
        let Some((key, keep)) = &incoming.key else {
            return Ok(RequestOutcome::responded(response, false));
        };
        let tx = self
            .store
            .begin(&self.worker.name, self.worker.limits.time)
            .await?;
        let mut tx = match claim(tx, incoming).await? {
            RequestClaim::Acquired(tx) => tx,
            RequestClaim::HandledElsewhere(outcome) => return Ok(outcome),
        };
        if let Err(error) = tx.store_response(key, &response, *keep).await {
            tx.rollback().await;
            return match error {
                StoreError::Refused(cause) => Ok(commit_refused(&cause)),
                error => Err(error),
            };
        }
        commit(
            tx,
            RequestOutcome::responded(response, false),
            &self.metrics,
            &self.worker.name,
        )
        .await
    }

    /// The inner error is the message of a conflict with another transaction.
    async fn handle_once(
        &self,
        incoming: &IncomingRequest,
    ) -> Result<Result<RequestOutcome, String>, StoreError> {
        // Claim the idempotency key.
        let may_write = !incoming.request.is_safe();
        let (name, time) = (&self.worker.name, self.worker.limits.time);
        let read_version = self.cache.read_version(name);
        let tx = match may_write {
            true => self.store.begin(name, time).await?,
            false => self.store.begin_read_only(name, time).await?,
        };
        fault::point(fault::AFTER_BEGIN);
        let tx = match claim(tx, incoming).await? {
            RequestClaim::Acquired(tx) => tx,
            RequestClaim::HandledElsewhere(outcome) => return Ok(Ok(outcome)),
        };
        fault::point(fault::AFTER_CLAIM);

        // Run the handler.
        let shared_tx = SharedTx::new(self.store.dialect(), tx);
        shared_tx.begin_item().await;
        let message = request_message(&incoming.request);
        let call = incoming.call(name);
        let outcome = self
            .call(
                vec![Arc::clone(&message)],
                1,
                &shared_tx,
                BatchState::default(),
                None,
                Some(call),
            )
            .await;
        fault::point(fault::AFTER_GUEST);
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                shared_tx.take_tx().await?.rollback().await;
                return Err(store_error(error));
            }
        };

        // Commit its effects.
        log_guest_output(name, &message.event_id, &outcome.logs);
        self.commit_request(
            incoming,
            &message.event_id,
            outcome,
            shared_tx,
            read_version,
        )
        .await
    }

    /// Writes the effects of the handler and its response, and commits.
    async fn commit_request(
        &self,
        incoming: &IncomingRequest,
        event_id: &str,
        mut outcome: CallOutcome,
        shared_tx: SharedTx,
        read_version: ReadVersion,
    ) -> Result<Result<RequestOutcome, String>, StoreError> {
        let response = match HandlerOutcome::of(&mut outcome) {
            HandlerOutcome::Response(response) => response,
            HandlerOutcome::Conflict(why) => {
                shared_tx.take_tx().await?.rollback().await;
                return Ok(Err(why));
            }
            HandlerOutcome::Failure(failure) => {
                shared_tx.take_tx().await?.rollback().await;
                return Ok(Ok(RequestOutcome::Failed(failure)));
            }
        };

        // Roll back the effects of a failed request.
        let is_success = response.is_success();
        let can_commit =
            is_success || !outcome.ran_sql || shared_tx.undo_item().await.map_err(store_error)?;
        let mut tx = shared_tx.take_tx().await?;
        let cache = if is_success {
            std::mem::take(&mut outcome.cache)
        } else {
            CacheWrites::default()
        };

        // A read-only request, or a failed one without a key, has nothing to commit.
        if incoming.request.is_safe() || (!is_success && incoming.key.is_none()) {
            tx.rollback().await;
            // A read-only request may still put cache values.
            self.cache
                .commit(&self.worker.name, &cache, read_version, None)
                .await;
            return Ok(Ok(RequestOutcome::responded(response, false)));
        }

        // The transaction cannot be rolled back in part. Store the response in another one.
        if !can_commit {
            tx.rollback().await;
            return self.store_response(incoming, response).await.map(Ok);
        }

        // Write, commit and update the cache.
        let invalidation = self.invalidation_output(event_id, &cache)?;
        let id = invalidation
            .as_ref()
            .map(|invalidation| invalidation.id.clone());
        outcome.outputs.extend(invalidation);
        let leased_at = Instant::now();
        match self
            .write(incoming, &response, outcome, is_success, &mut tx)
            .await
        {
            Ok(outputs) => {
                let handled = RequestOutcome::Responded {
                    response,
                    replayed: false,
                    outputs,
                    leased_at,
                };
                let handled = commit(tx, handled, &self.metrics, &self.worker.name).await?;
                match &handled {
                    RequestOutcome::Responded { .. } => {
                        self.cache
                            .commit(&self.worker.name, &cache, read_version, id.as_deref())
                            .await;
                    }
                    RequestOutcome::Unclear(_) => {
                        self.invalidate_after_unclear_commit(&cache).await
                    }
                    _ => {}
                }
                Ok(Ok(handled))
            }
            Err(error) => {
                tx.rollback().await;
                match error {
                    StoreError::Refused(cause) => Ok(Ok(commit_refused(&cause))),
                    error => Err(error),
                }
            }
        }
    }

    /// Writes the effects of a successful handler and the response of a request with a key.
    async fn write(
        &self,
        incoming: &IncomingRequest,
        response: &HttpResponse,
        mut outcome: CallOutcome,
        is_success: bool,
        tx: &mut Tx,
    ) -> Result<Vec<OutboxRow>, StoreError> {
        let mut rows = Vec::new();
        if is_success {
            outcome.state.keep();
            let writes = outcome.state.writes();
            if !writes.is_empty() {
                tx.save_state(&writes).await?;
            }
            if !outcome.outputs.is_empty() {
                rows = tx.append_outputs(&outcome.outputs, HAND_OVER_LEASE).await?;
            }
        }
        if let Some((key, keep)) = &incoming.key {
            tx.store_response(key, response, *keep).await?;
        }
        Ok(rows)
    }
}

/// Commits, and returns the response only after the commit is confirmed.
///
/// # Errors
/// Nothing took effect.
pub(crate) async fn commit(
    tx: Tx,
    handled: RequestOutcome,
    metrics: &Metrics,
    worker: &str,
) -> Result<RequestOutcome, StoreError> {
    fault::point(fault::BEFORE_COMMIT);
    match tx.commit().await {
        Ok(_) => {
            fault::point(fault::AFTER_COMMIT);
            Ok(handled)
        }
        Err(StoreError::Unavailable(cause)) => {
            metrics.commit_unclear(worker);
            Ok(RequestOutcome::Unclear(cause))
        }
        Err(StoreError::Refused(cause)) => Ok(commit_refused(&cause)),
        Err(error) => Err(error),
    }
}

/// The outcome of a handler.
pub(crate) enum HandlerOutcome {
    Response(HttpResponse),
    /// A conflict with another transaction.
    Conflict(String),
    Failure(CallFailure),
}

impl HandlerOutcome {
    /// Determines the outcome of a call. An error response of the handler to a failed statement is
    /// kept, although the delivery is doomed.
    pub(crate) fn of(outcome: &mut CallOutcome) -> HandlerOutcome {
        let result = std::mem::replace(&mut outcome.result, Ok(Vec::new()));
        let failure = match result.map(|results| results.into_iter().find_map(Result::err)) {
            Ok(failure) => failure,
            Err(failure) => Some(failure),
        };
        match (failure, outcome.response.take()) {
            (Some(failure), _) if failure.kind == FailureKind::Conflict => {
                HandlerOutcome::Conflict(failure.message)
            }
            (Some(failure), Some(response))
                if !response.is_success() && failure.kind == FailureKind::Retry =>
            {
                HandlerOutcome::Response(response)
            }
            (Some(failure), _) => HandlerOutcome::Failure(failure),
            (None, Some(response)) => HandlerOutcome::Response(response),
            (None, None) => HandlerOutcome::Failure(CallFailure::new(
                FailureKind::Retry,
                "no-response",
                "the handler returned without a response",
            )),
        }
    }
}

fn commit_refused(cause: &anyhow::Error) -> RequestOutcome {
    RequestOutcome::Failed(CallFailure::new(
        FailureKind::Retry,
        "commit-refused",
        format!("{cause:#}"),
    ))
}

/// The result of claiming a request.
pub(crate) enum RequestClaim {
    /// This transaction handles the request, and holds its key if there is one.
    Acquired(Tx),
    /// The request is or was handled elsewhere. The transaction has ended.
    HandledElsewhere(RequestOutcome),
}

/// Claims the key of a request, if it has one.
///
/// # Errors
/// The claim failed. The transaction has ended.
pub(crate) async fn claim(
    mut tx: Tx,
    incoming: &IncomingRequest,
) -> Result<RequestClaim, StoreError> {
    let Some((key, _)) = &incoming.key else {
        return Ok(RequestClaim::Acquired(tx));
    };
    let claim = match tx.claim_request(key).await {
        Ok(ClaimedRequest::Fresh) => return Ok(RequestClaim::Acquired(tx)),
        Ok(ClaimedRequest::Answered(response)) => Ok(RequestClaim::HandledElsewhere(
            RequestOutcome::responded(response, true),
        )),
        Ok(ClaimedRequest::OtherRequest) => {
            Ok(RequestClaim::HandledElsewhere(RequestOutcome::OtherRequest))
        }
        Ok(ClaimedRequest::InFlight) => {
            Ok(RequestClaim::HandledElsewhere(RequestOutcome::InFlight))
        }
        Err(error) => Err(error),
    };
    tx.rollback().await;
    claim
}

/// The message that stands for a request. Outputs have its id as their cause, and their ids are
/// derived from it.
pub(crate) fn request_message(request: &HttpRequest) -> Arc<Message> {
    // A valid trace parent is ASCII. Other bytes would not survive the conversion.
    let trace = message::header(&request.headers, "traceparent").filter(|trace| trace.is_ascii());
    Arc::new(Message {
        event_id: Uuid::now_v7().to_string(),
        subject: format!("{} {}", request.method, request.path_and_query),
        headers: trace
            .map(|trace| ("traceparent".to_owned(), trace.to_owned()))
            .into_iter()
            .collect(),
        body: Bytes::new(),
        origin: None,
        redriven: None,
    })
}
