//! An HTTP request and its outcome: its idempotency key, its effects, its outputs and its response
//! are committed together or not at all.
//!
//! A response with a status of 400 or above means failure. The writes of the handler are rolled
//! back, and the response is stored. A handler that was stopped has no response, and a retry of the
//! request runs the handler again. See [`super::request_group`] for the transaction.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use uuid::Uuid;

use super::{Delivery, RequestTrace};
use crate::fault;
use crate::guest::{CallFailure, CallOutcome, FailureKind, RequestCall};
use crate::metrics::Metrics;
use crate::model::failure_code::FailureCode;
use crate::model::message::{self, Message};
use crate::model::request::{HttpRequest, HttpResponse, RequestKey};
use crate::store::{ClaimedRequest, KeptResponse, OutboxRow, StoreError, Tx};

/// A request with its idempotency key.
#[derive(Debug, Clone)]
pub struct IncomingRequest {
    /// The request, read to its end.
    pub request: HttpRequest,
    /// The key, and how long the response is kept. `None` for a request that may be handled again.
    pub key: Option<(RequestKey, Duration)>,
    /// The span of the request, if traces are on.
    pub trace: Option<RequestTrace>,
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
    pub(super) fn responded(response: HttpResponse, replayed: bool) -> Self {
        RequestOutcome::Responded {
            response,
            replayed,
            outputs: Vec::new(),
            leased_at: Instant::now(),
        }
    }
}

impl Delivery {
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
        let kept = KeptResponse {
            request: key,
            response: &response,
            keep: *keep,
        };
        if let Err(error) = tx.store_responses(&[kept]).await {
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
                FailureCode::NoResponse,
                "the handler returned without a response",
            )),
        }
    }
}

pub(super) fn commit_refused(cause: &anyhow::Error) -> RequestOutcome {
    RequestOutcome::Failed(CallFailure::new(
        FailureKind::Retry,
        FailureCode::CommitRefused,
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
    let claimed = tx.claim_requests(&[key]).await;
    let claimed = claimed.map(|claimed| claimed.into_iter().next().and_then(handled_elsewhere));
    let outcome = match claimed {
        Ok(None) => return Ok(RequestClaim::Acquired(tx)),
        Ok(Some(outcome)) => Ok(RequestClaim::HandledElsewhere(outcome)),
        Err(error) => Err(error),
    };
    tx.rollback().await;
    outcome
}

/// The outcome of a request whose key is not free.
pub(super) fn handled_elsewhere(claimed: ClaimedRequest) -> Option<RequestOutcome> {
    match claimed {
        ClaimedRequest::Fresh => None,
        ClaimedRequest::Answered(response) => Some(RequestOutcome::responded(response, true)),
        ClaimedRequest::OtherRequest => Some(RequestOutcome::OtherRequest),
        ClaimedRequest::InFlight => Some(RequestOutcome::InFlight),
    }
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
