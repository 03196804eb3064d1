//! The requests of `oncely test`, read and refused as those of a host.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::body::Body;
use axum::extract::Request;

use super::head;
use super::incoming::{self, ReadRules};
use super::permanent_response;
use super::problem::Problem;
use super::response::respond;
use super::route_table::RouteTable;
use crate::config::manifest::{Route, Worker};
use crate::delivery::request::IncomingRequest;
use crate::guest::{CallFailure, FailureKind, header_to_bytes, header_to_text};
use crate::model::request::{HttpRequest, HttpResponse};

/// The ingress of one worker without a host.
pub struct TestRequests {
    table: RouteTable<()>,
}

/// A request that a route accepts.
pub struct AdmittedRequest {
    pub incoming: IncomingRequest,
    route: Arc<Route>,
}

impl TestRequests {
    /// The ingress with the routes of `worker`.
    pub fn new(worker: &Worker) -> Self {
        TestRequests {
            table: RouteTable::of([(Arc::new(()), worker.routes.clone())]),
        }
    }

    /// Reads a request. The inner error is the response of a refusal.
    ///
    /// # Errors
    /// The request is not valid HTTP.
    pub async fn admit(
        &self,
        request: &HttpRequest,
    ) -> Result<std::result::Result<AdmittedRequest, HttpResponse>> {
        let request = server_request(request)?;
        let admitted = self.read(request).await;
        Ok(admitted.map_err(|problem| problem.response()))
    }

    async fn read(&self, request: Request) -> std::result::Result<AdmittedRequest, Problem> {
        let (mut parts, body) = request.into_parts();
        head::normalize(&mut parts, None)?;
        let found = self.table.find(parts.method.as_str(), parts.uri.path())?;
        let rules = ReadRules::of_route(&found.route, &parts);
        Ok(AdmittedRequest {
            incoming: incoming::read(rules, None, parts, body).await?,
            route: Arc::clone(&found.route),
        })
    }

    /// The response to a key that belongs to another request.
    pub fn key_reused() -> HttpResponse {
        Problem::key_reused().response()
    }

    /// The response to a failed handler.
    pub fn failed(failure: &CallFailure) -> HttpResponse {
        Problem::failed(failure.code.as_deref()).response()
    }

    /// The response as it is sent.
    ///
    /// # Errors
    /// Its body cannot be read.
    pub async fn sent(response: HttpResponse, replayed: bool) -> Result<HttpResponse> {
        let (parts, body) = respond(response, replayed).into_parts();
        let headers = parts.headers.iter();
        let headers = headers.map(|(name, value)| {
            let value = header_to_text(value.as_bytes());
            (name.to_string(), value)
        });
        Ok(HttpResponse {
            status: parts.status.as_u16(),
            headers: headers.collect(),
            body: axum::body::to_bytes(body, usize::MAX)
                .await
                .context("read the body of a response")?,
        })
    }
}

impl AdmittedRequest {
    /// The response to a failed handler, and the one that is stored under the key, if any.
    pub fn failed(&self, failure: &CallFailure) -> (HttpResponse, Option<HttpResponse>) {
        let problem = match failure.kind {
            FailureKind::Conflict => return (Problem::unavailable().response(), None),
            _ => Problem::failed(failure.code.as_deref()),
        };
        let permanent = permanent_response(&problem, &self.route, &self.incoming);
        let response = permanent.clone().unwrap_or_else(|| problem.response());
        (response, permanent)
    }
}

/// The request as the HTTP server passes it on.
fn server_request(request: &HttpRequest) -> Result<Request> {
    let mut builder = Request::builder()
        .method(request.method.as_str())
        .uri(&request.path_and_query)
        .header("host", &request.authority);
    for (name, value) in &request.headers {
        builder = builder.header(name, header_to_bytes(value));
    }
    builder
        .body(Body::from(request.body.clone()))
        .with_context(|| format!("read {} {}", request.method, request.path_and_query))
}
