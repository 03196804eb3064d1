//! The ingress: HTTP requests that are safe to retry.
//!
//! `POST /publish/{subject}` publishes a message. All other paths belong to routes of HTTP workers.
//! A request with an `Idempotency-Key` is handled once: its effects, outputs and response commit in
//! one transaction, and a retry gets the stored response. The key follows the IETF draft
//! `draft-ietf-httpapi-idempotency-key-header`, errors follow RFC 9457. `docs/http.md` has the
//! table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::response::Response;
use tokio::sync::RwLock;
use tracing::Instrument;

use crate::bus::Bus;
use crate::cache::Cache;
use crate::config::manifest::{CachePolicy, Route, StoreFailures};
use crate::delivery::request::{IncomingRequest, RequestOutcome};
use crate::http_server::BodyMemory;
use crate::metrics::Metrics;
use crate::model::request::{Admission, HttpResponse};
use crate::relay::RelayHandle;
use crate::store::{Store, StoreError};
use crate::traces::Traces;

mod cached;
mod head;
mod http_worker;
mod incoming;
mod key;
mod problem;
mod problem_code;
mod publish;
mod response;
mod route_table;
mod single_flight;
mod test_requests;
mod trace;

pub use http_worker::HttpWorker;
use incoming::ReadRules;
use problem::Problem;
pub use problem_code::ProblemCode;
pub use publish::{PUBLISH_WINDOW, PUBLISHER};
use publish::{Publication, Publisher};
use response::respond;
use route_table::MatchedRoute;
pub use route_table::{RouteTable, check_routes};
use single_flight::{SingleFlight, SingleFlightEntry};
pub use test_requests::{AdmittedRequest, TestRequests};
use trace::RunningRequest;

/// How long a request is retried while its outcome is unclear or the database is unavailable.
const UNCLEAR_TIMEOUT: Duration = Duration::from_secs(3);

/// How often the claim of another host on a key is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(40);

/// Answers HTTP requests in this host.
pub struct Ingress {
    publisher: Publisher,
    admission: Admission,
    cache: Cache,
    metrics: Arc<Metrics>,
    traces: Traces,
    /// None once the host drains.
    relay: RwLock<Option<RelayHandle>>,
    table: RwLock<Arc<RouteTable>>,
    /// Set once the deployed workers run here.
    has_started: AtomicBool,
    single_flight: SingleFlight,
}

/// The handler of a request.
enum Target {
    Worker(MatchedRoute),
    Publish(Publication),
}

impl Ingress {
    pub fn new(
        store: Arc<Store>,
        relay: RelayHandle,
        metrics: Arc<Metrics>,
        bus: Bus,
        admission: Admission,
        cache: Cache,
        traces: Traces,
    ) -> Self {
        Ingress {
            publisher: Publisher {
                store,
                bus,
                metrics: Arc::clone(&metrics),
                traces: traces.clone(),
            },
            admission,
            cache,
            metrics,
            traces,
            relay: RwLock::new(Some(relay)),
            table: RwLock::default(),
            has_started: AtomicBool::new(false),
            single_flight: SingleFlight::default(),
        }
    }

    /// Replaces the routes.
    pub async fn set_routes(&self, table: RouteTable) {
        *self.table.write().await = Arc::new(table);
    }

    /// Completes the start: an unknown path is answered with 404 from now on.
    ///
    /// Before, its worker may still be starting.
    pub fn set_started(&self) {
        self.has_started.store(true, Ordering::Relaxed);
    }

    /// Drops the handle of the relay, so that the relay can end.
    pub async fn close(&self) {
        self.relay.write().await.take();
    }

    /// A router that handles all requests.
    pub fn router(self: Arc<Self>) -> Router {
        Router::new().fallback(handle).with_state(self)
    }

    /// The handler for this method and path.
    async fn target(&self, parts: &Parts) -> Result<Target, Problem> {
        let (method, path) = (parts.method.as_str(), parts.uri.path());
        if let Some(rest) = path.strip_prefix(publish::PATH) {
            return match method {
                "POST" => Publication::read(rest, parts, &self.admission.publish)
                    .await
                    .map(Target::Publish),
                _ => Err(Problem::method_not_allowed(&["POST".to_owned()])),
            };
        }
        let table = Arc::clone(&*self.table.read().await);
        match table.find(method, path) {
            Err(_) if !self.has_started.load(Ordering::Relaxed) => Err(Problem::starting()),
            found => found.map(Target::Worker),
        }
    }

    /// Reads the whole request.
    async fn read(
        &self,
        target: &Target,
        parts: Parts,
        body: Body,
    ) -> Result<IncomingRequest, Problem> {
        let rules = match target {
            Target::Worker(found) => ReadRules::of_route(&found.route, &parts),
            Target::Publish(_) => ReadRules {
                route: publish::PATH,
                requires_key: true,
                window: PUBLISH_WINDOW,
                body_max: self.publisher.bus.max_payload() as u64,
                method: parts.method.as_str().to_owned(),
            },
        };
        incoming::read(rules, self.admission.caller.as_deref(), parts, body).await
    }

    /// Handles a request and hands its outputs over to the relay.
    ///
    /// Returns the response, and whether it is a replay.
    async fn handle_request(
        &self,
        target: &Target,
        incoming: &Arc<IncomingRequest>,
    ) -> Result<(HttpResponse, bool), Problem> {
        let wait = match target {
            Target::Worker(found) => found.route.wait,
            Target::Publish(_) => Duration::from_secs(1),
        };

        // One request per key at a time.
        let _guard = match &incoming.key {
            Some((key, _)) => match self
                .single_flight
                .acquire(target.key_owner(), key, wait)
                .await
            {
                SingleFlightEntry::Acquired(guard) => Some(guard),
                SingleFlightEntry::InProgress => return Err(Problem::in_progress()),
                SingleFlightEntry::OtherRequest => return Err(Problem::key_reused()),
            },
            None => None,
        };

        let _in_flight = match target {
            Target::Worker(found) => Some(found.worker.enter()),
            Target::Publish(_) => None,
        };
        // Checked once the request counts as in flight: a drained worker handles none.
        if target.is_paused() {
            return Err(Problem::paused());
        }
        self.handle_until_settled(target, incoming, wait).await
    }

    /// Handles a request until its outcome is known, within the time limits.
    async fn handle_until_settled(
        &self,
        target: &Target,
        incoming: &Arc<IncomingRequest>,
        wait: Duration,
    ) -> Result<(HttpResponse, bool), Problem> {
        let mut first_end = None;
        loop {
            let handled = match target {
                Target::Worker(found) => {
                    let handled = found.worker.handle(incoming).await;
                    let handled = handled.ok_or_else(Problem::busy)?;
                    found.worker.delivery.report_health(&handled);
                    handled
                }
                Target::Publish(publication) => {
                    match self.publisher.publish(publication, incoming).await {
                        Ok(Err(problem)) => return Err(problem),
                        Ok(Ok(handled)) => Ok(handled),
                        Err(error) => Err(error),
                    }
                }
            };
            // The time in the queue does not count.
            let waited = first_end.get_or_insert_with(Instant::now).elapsed();
            match handled {
                Ok(RequestOutcome::Responded {
                    response,
                    replayed,
                    outputs,
                    leased_at: since,
                }) => {
                    if let Some(relay) = self.relay.read().await.clone() {
                        relay.hand_over(outputs, since).await;
                    }
                    return Ok((response, replayed));
                }
                Ok(RequestOutcome::OtherRequest) => return Err(Problem::key_reused()),
                Ok(RequestOutcome::InFlight) if waited < wait => {}
                Ok(RequestOutcome::InFlight) => return Err(Problem::in_progress()),
                Ok(RequestOutcome::Failed(failure)) => {
                    tracing::warn!(
                        worker = target.key_owner(),
                        error = failure.message,
                        code = failure.code.as_deref(),
                        "request failed"
                    );
                    return self
                        .store_failure(target, incoming, Problem::failed(failure.code.as_deref()))
                        .await;
                }
                // A retry with the same key finds the outcome.
                Ok(RequestOutcome::Unclear(_))
                    if incoming.key.is_some() && waited < UNCLEAR_TIMEOUT => {}
                Ok(RequestOutcome::Unclear(error)) => {
                    tracing::warn!(
                        worker = target.key_owner(),
                        error = format!("{error:#}"),
                        "request outcome unknown"
                    );
                    return Err(Problem::outcome_unknown(incoming.key.is_some()));
                }
                Err(StoreError::Unavailable(_) | StoreError::Conflict(_))
                    if waited < UNCLEAR_TIMEOUT => {}
                Err(error) => {
                    let error = anyhow::Error::from(error);
                    tracing::warn!(
                        worker = target.key_owner(),
                        error = format!("{error:#}"),
                        "request not handled"
                    );
                    return Err(Problem::unavailable());
                }
            }
            tokio::time::sleep(POLL_INTERVAL.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }

    /// Stores a failure under the key of its request, if the route stores all failures.
    ///
    /// The handler was cut off, so it stored no response.
    async fn store_failure(
        &self,
        target: &Target,
        incoming: &IncomingRequest,
        problem: Problem,
    ) -> Result<(HttpResponse, bool), Problem> {
        let Target::Worker(MatchedRoute { worker, route, .. }) = target else {
            return Err(problem);
        };
        let Some(permanent) = permanent_response(&problem, route, incoming) else {
            return Err(problem);
        };
        match worker.delivery.store_response(incoming, permanent).await {
            Ok(RequestOutcome::Responded {
                response, replayed, ..
            }) => Ok((response, replayed)),
            Ok(_) => Err(problem),
            Err(error) => {
                tracing::warn!(
                    worker = target.key_owner(),
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "failed to store a response"
                );
                Err(problem)
            }
        }
    }
}

impl Target {
    /// Whether an operator paused its worker.
    fn is_paused(&self) -> bool {
        match self {
            Target::Worker(found) => found.worker.is_paused(),
            Target::Publish(_) => false,
        }
    }

    /// The worker that owns the idempotency key; [`PUBLISHER`] for a publication.
    fn key_owner(&self) -> &str {
        match self {
            Target::Worker(found) => &found.worker.delivery.worker.name,
            Target::Publish(_) => PUBLISHER,
        }
    }

    /// The path of the route, as part of the key.
    fn route(&self) -> &str {
        match self {
            Target::Worker(found) => &found.route.path,
            Target::Publish(_) => publish::PATH,
        }
    }

    /// The cache policy for the response to such a request.
    fn cache_policy(&self, parts: &Parts) -> Option<&CachePolicy> {
        match self {
            Target::Worker(found) if matches!(parts.method.as_str(), "GET" | "HEAD") => {
                found.route.cache.as_ref()
            }
            _ => None,
        }
    }

    /// The tags of a response, with path parameters filled in.
    fn cache_tags(&self, policy: &CachePolicy) -> Vec<String> {
        let Target::Worker(MatchedRoute { params, .. }) = self else {
            return Vec::new();
        };
        let fill = |tag: &String| {
            params.iter().fold(tag.clone(), |tag, (name, value)| {
                tag.replace(&format!("{{{name}}}"), value)
            })
        };
        policy.tags.iter().map(fill).collect()
    }

    /// The version of the worker that handles the request.
    fn version(&self) -> u32 {
        match self {
            Target::Worker(found) => found.worker.delivery.version,
            Target::Publish(_) => 0,
        }
    }
}

/// The response to store for a failed handler, if the route stores all failures.
fn permanent_response(
    problem: &Problem,
    route: &Route,
    incoming: &IncomingRequest,
) -> Option<HttpResponse> {
    let is_stored = route.store_failures == StoreFailures::All && incoming.key.is_some();
    is_stored.then(|| problem.as_permanent().response())
}

/// Handles one request, from its head to its response.
async fn handle(State(ingress): State<Arc<Ingress>>, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    let began = Instant::now();
    if let Err(problem) = head::normalize(&mut parts, ingress.admission.caller.as_deref()) {
        return respond(problem.response(), false);
    }
    let target = match ingress.target(&parts).await {
        Ok(target) => Arc::new(target),
        Err(problem) => return respond(problem.response(), false),
    };

    // A paused worker answers no request, not even from the cache.
    if target.is_paused() {
        let problem = Problem::paused();
        ingress.metrics.request(
            target.key_owner(),
            target.route(),
            problem.status,
            false,
            began.elapsed(),
        );
        return respond(problem.response(), false);
    }

    // A cached route.
    let running = RunningRequest::start(&ingress.traces, &parts);
    if let Some(policy) = target.cache_policy(&parts) {
        let (metrics, traces) = (Arc::clone(&ingress.metrics), ingress.traces.clone());
        let response = ingress
            .respond_from_cache(Arc::clone(&target), policy, parts, body)
            .await;
        metrics.request(
            target.key_owner(),
            target.route(),
            response.status().as_u16(),
            false,
            began.elapsed(),
        );
        if let Some(running) = running {
            running.finish(&traces, &target, response.status().as_u16(), false);
        }
        return response;
    }

    // Any other route.
    let memory = parts.extensions.get::<BodyMemory>().cloned();
    let incoming = match ingress.read(&target, parts, body).await {
        Ok(incoming) => Arc::new(IncomingRequest {
            trace: running.as_ref().map(|running| running.trace.clone()),
            ..incoming
        }),
        Err(problem) => {
            ingress.metrics.request(
                target.key_owner(),
                target.route(),
                problem.status,
                false,
                began.elapsed(),
            );
            if let Some(running) = running {
                running.finish(&ingress.traces, &target, problem.status, false);
            }
            return respond(problem.response(), false);
        }
    };
    let span = tracing::debug_span!(
        "request",
        worker = target.key_owner(),
        route = target.route(),
        method = incoming.request.method,
    );
    // A task of its own: a client that disconnects does not interrupt the transaction.
    let handling = async move {
        let (response, replayed) = ingress
            .handle_request(&target, &incoming)
            .await
            .unwrap_or_else(|problem| (problem.response(), false));
        ingress.metrics.request(
            target.key_owner(),
            target.route(),
            response.status,
            replayed,
            began.elapsed(),
        );
        if let Some(running) = running {
            running.finish(&ingress.traces, &target, response.status, replayed);
        }
        // The body stays in memory until here.
        drop(memory);
        (response, replayed)
    };
    match tokio::spawn(handling.instrument(span)).await {
        Ok((response, replayed)) => respond(response, replayed),
        Err(_) => respond(Problem::unavailable().response(), false),
    }
}
