//! Answers the requests of a case by the steps of a host's ingress and delivery.

use anyhow::{Result, bail};
use jiff::Timestamp;
use serde_json::{Map, Value as Json, json};

use super::content;
use super::runner::{Fault, Progress, Runner, TestCall, headers_text};
use crate::delivery::SharedTx;
use crate::delivery::request::{HandlerOutcome, request_message};
use crate::guest::{CallFailure, FailureKind};
use crate::ingress::{AdmittedRequest, TestRequests};
use crate::model::failure_code::FailureCode;
use crate::model::request::{HttpRequest, HttpResponse};
use crate::store::{ClaimedRequest, KeptResponse};

impl Runner {
    /// Answers one request: again after a fault, and until it has a response.
    ///
    /// # Errors
    /// The request is not valid HTTP, or the database fails.
    pub(super) async fn answer(
        &self,
        shared_tx: &SharedTx,
        progress: &mut Progress,
        request: &HttpRequest,
        now: Timestamp,
        mut fault: Option<Fault>,
    ) -> Result<()> {
        // Read the request, and claim its key.
        let admitted = match self.requests.admit(request).await? {
            Ok(admitted) => admitted,
            Err(refusal) => return respond_at_once(progress, refusal, false).await,
        };
        if let Some((key, _)) = &admitted.incoming.key {
            match shared_tx.claim_request(key).await? {
                ClaimedRequest::Fresh => {}
                ClaimedRequest::Answered(response) => {
                    return respond_at_once(progress, response, true).await;
                }
                ClaimedRequest::OtherRequest => {
                    return respond_at_once(progress, TestRequests::key_reused(), false).await;
                }
                ClaimedRequest::InFlight => bail!("the key is in use by another transaction"),
            }
        }

        // Run the handler.
        let handled = loop {
            let handled = self
                .handle(shared_tx, progress, &admitted, now, fault)
                .await?;
            if fault.take().is_none() {
                break handled;
            }
        };

        // Store the response, and respond.
        let (response, stored) = match handled {
            HandlerOutcome::Response(response) => (response.clone(), Some(response)),
            HandlerOutcome::Conflict(message) => {
                let failure =
                    CallFailure::new(FailureKind::Conflict, FailureCode::Conflict, message);
                admitted.failed(&failure)
            }
            HandlerOutcome::Failure(failure) => {
                let code = failure.code.as_deref().unwrap_or_default();
                let line = format!("request failed: {} ({code})\n", failure.message);
                progress.run.logs.push_str(&line);
                admitted.failed(&failure)
            }
        };
        if let (Some((key, window)), Some(stored)) = (&admitted.incoming.key, stored) {
            let kept = KeptResponse {
                request: key,
                response: &stored,
                keep: *window,
            };
            shared_tx.store_response(kept).await?;
        }
        progress.results.push(response_text(response, false).await?);
        Ok(())
    }

    /// Runs the handler once, and keeps its effects if it succeeds without a fault.
    async fn handle(
        &self,
        shared_tx: &SharedTx,
        progress: &mut Progress,
        admitted: &AdmittedRequest,
        now: Timestamp,
        fault: Option<Fault>,
    ) -> Result<HandlerOutcome> {
        // Run the handler.
        let incoming = &admitted.incoming;
        let reads_only = incoming.request.is_safe();
        match reads_only {
            true => shared_tx.begin_read_only_item().await?,
            false => shared_tx.begin_item().await,
        }
        let call = TestCall {
            message: request_message(&incoming.request),
            attempt: 1,
            request: Some(incoming.call(&self.worker.name)),
            now,
            fault,
        };
        let (mut outcome, statements) = self.call(shared_tx, progress, call).await?;
        progress.run.logs.push_str(&outcome.logs);
        progress.state = std::mem::take(&mut outcome.state);
        let handled = HandlerOutcome::of(&mut outcome);

        // Keep its effects, or roll them back.
        let is_success =
            matches!(&handled, HandlerOutcome::Response(response) if response.is_success());
        match is_success && fault.is_none() {
            true => {
                progress.state.keep();
                progress.outputs.append(&mut outcome.outputs);
            }
            false => progress.state.discard(),
        }
        if reads_only {
            shared_tx.end_read_only_item().await?;
        } else if (!is_success || fault.is_some()) && !shared_tx.undo_item().await? {
            bail!("the transaction did not survive a failed statement");
        }
        if fault.is_none() {
            progress.run.host_calls.push(outcome.host_calls);
            progress.run.statements.push(statements);
        }
        Ok(handled)
    }
}

/// The response to a request whose commit the database refuses.
pub(super) async fn refused_commit(failure: &CallFailure) -> Result<Json> {
    response_text(TestRequests::failed(failure), false).await
}

/// Responds to a request without its handler.
async fn respond_at_once(
    progress: &mut Progress,
    response: HttpResponse,
    replayed: bool,
) -> Result<()> {
    progress.run.host_calls.push(0);
    progress.run.statements.push(0);
    progress
        .results
        .push(response_text(response, replayed).await?);
    Ok(())
}

/// A response as the client receives it.
async fn response_text(response: HttpResponse, replayed: bool) -> Result<Json> {
    let response = TestRequests::sent(response, replayed).await?;
    let mut text = Map::new();
    text.insert("status".to_owned(), json!(response.status));
    if !response.headers.is_empty() {
        text.insert("headers".to_owned(), headers_text(&response.headers));
    }
    if !response.body.is_empty() {
        text.insert("body".to_owned(), content::from_bytes(&response.body));
    }
    Ok(Json::Object(text))
}
