//! HTTP workers: calls `wasi:http/incoming-handler`, or `handler` of WASI 0.3, with one request and
//! reads its response.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use tokio::sync::oneshot;
use wasmtime::Store;
use wasmtime::component::{Accessor, Instance};
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::exports::wasi::http::incoming_handler;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::p3;
use wasmtime_wasi_http::p3::bindings::exports::wasi::http::handler as async_handler;

use super::failure::{CallFailure, FailureKind, HandlerResult};
use super::state::CallState;
use crate::model::failure_code::FailureCode;
use crate::model::message::Headers;
use crate::model::request::{HttpRequest, HttpResponse};

/// How long reading the rest of a response may take after its handler has returned. All of it is in
/// memory by then.
const BODY_TIMEOUT: Duration = Duration::from_millis(500);

/// Permitted statuses of a response. Lower ones are interim responses or change the protocol of the
/// connection. Higher ones have no meaning.
const FINAL_STATUSES: RangeInclusive<u16> = 200..=599;

type HandlerResponse = Result<hyper::Response<HyperOutgoingBody>, ErrorCode>;

/// Calls an async handler of WASI 0.3, and reads its response, whose body may follow after it has
/// returned.
///
/// # Errors
/// A trap of the handler, or a request that is not valid HTTP.
pub(super) async fn serve_async(
    store: &mut Store<CallState>,
    instance: &Instance,
    indices: &async_handler::GuestIndices,
) -> wasmtime::Result<(HandlerResult, Option<HttpResponse>)> {
    let most = response_max(store.data());
    let Some(call) = &store.data().call.request else {
        return Ok((Err(no_request()), None));
    };
    let mut request = hyper_request(&call.request)?;
    // A server names itself by scheme and authority, as far as the authority is one.
    let uri = format!(
        "http://{}{}",
        call.request.authority, call.request.path_and_query
    );
    if let Ok(uri) = uri.parse() {
        *request.uri_mut() = uri;
    }
    let view = store.data_mut().http();
    let (request, _) = p3::Request::from_http(view.hooks, request);
    let request = view.table.push(request)?;
    let handler = indices.load(&mut *store, instance)?;
    let call = async |accessor: &Accessor<CallState>| -> wasmtime::Result<_> {
        let response = match handler.call_handle(accessor, request).await? {
            Ok(response) => response,
            Err(code) => return Ok(Err(error_response(&code))),
        };
        let response = accessor.with(|mut access| {
            let response = access.data_mut().http().table.delete(response)?;
            response.into_http(access, async { Ok(()) })
        })?;
        Ok(read_parts(response, most).await)
    };
    Ok(match store.run_concurrent(call).await?? {
        Ok(response) => (Ok(()), Some(response)),
        Err(failure) => (Err(failure), None),
    })
}

fn response_max(state: &CallState) -> usize {
    usize::try_from(state.call.worker.limits.response_size).unwrap_or(usize::MAX)
}

fn no_request() -> CallFailure {
    let why = "an HTTP worker handles requests, not messages";
    CallFailure::new(FailureKind::Retry, FailureCode::NoRequest, why)
}

fn error_response(code: &impl std::fmt::Debug) -> CallFailure {
    let why = format!("the handler returned an error response: {code:?}");
    CallFailure::new(FailureKind::Retry, FailureCode::ErrorResponse, why)
}

/// Calls the handler and waits until it has returned and its response is complete.
///
/// # Errors
/// A trap of the handler, or a request that is not valid HTTP.
pub(super) async fn serve(
    store: &mut Store<CallState>,
    instance: &Instance,
    indices: &incoming_handler::GuestIndices,
) -> wasmtime::Result<(HandlerResult, Option<HttpResponse>)> {
    let most = response_max(store.data());
    let Some(call) = &store.data().call.request else {
        return Ok((Err(no_request()), None));
    };

    // Pass the request to the handler.
    let request = hyper_request(&call.request)?;
    let (sender, receiver) = oneshot::channel();
    let mut view = store.data_mut().http();
    let request = view.new_incoming_request(Scheme::Http, request)?;
    let outparam = view.new_response_outparam(sender)?;
    let handler = indices.load(&mut *store, instance)?;
    let mut handler_call = std::pin::pin!(handler.call_handle(&mut *store, request, outparam));
    let mut read = std::pin::pin!(read_response(receiver, most));

    // Read the response while the handler runs.
    let mut response = None;
    loop {
        tokio::select! {
            biased;
            returned = &mut handler_call => {
                returned?;
                break;
            }
            whole = &mut read, if response.is_none() => response = Some(whole),
        }
    }

    // Read the rest of the response after the handler has returned.
    let unfinished = || {
        let why = "the handler returned before it finished the body of its response";
        Err(CallFailure::new(
            FailureKind::Retry,
            FailureCode::UnfinishedResponse,
            why,
        ))
    };
    let response = match response {
        Some(response) => response,
        None => tokio::time::timeout(BODY_TIMEOUT, read)
            .await
            .unwrap_or_else(|_| unfinished()),
    };
    Ok(match response {
        Ok(response) => (Ok(()), Some(response)),
        Err(failure) => (Err(failure), None),
    })
}

/// Headers that only the host sets. Those of a handler are removed.
const HOST_HEADERS: [&str; 5] = [
    "idempotent-replayed",
    "cache-status",
    "age",
    "date",
    "server",
];

/// Reads a response with its body.
async fn read_response(
    receiver: oneshot::Receiver<HandlerResponse>,
    most: usize,
) -> Result<HttpResponse, CallFailure> {
    match receiver.await {
        Ok(Ok(response)) => read_parts(response, most).await,
        Ok(Err(code)) => Err(error_response(&code)),
        Err(_) => Err(CallFailure::new(
            FailureKind::Retry,
            FailureCode::NoResponse,
            "the handler returned without a response",
        )),
    }
}

/// Checks the status of a response, and reads its body.
async fn read_parts<B>(
    response: hyper::Response<B>,
    most: usize,
) -> Result<HttpResponse, CallFailure>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let failed = |code: FailureCode, why: String| CallFailure::new(FailureKind::Retry, code, why);
    let (parts, body) = response.into_parts();
    let status = parts.status.as_u16();
    if !FINAL_STATUSES.contains(&status) {
        let (least, most) = (FINAL_STATUSES.start(), FINAL_STATUSES.end());
        let why =
            format!("the handler returned the status {status}; {least} to {most} are allowed");
        return Err(failed(FailureCode::StatusRefused, why));
    }
    let body = Limited::new(body, most).collect().await.map_err(|error| {
        failed(FailureCode::ResponseTooLarge, format!(
            "failed to read the body of the response: {error}; at most {most} bytes are allowed \
             (`response_size` under [worker.limits])"
        ))
    })?;
    let own = parts
        .headers
        .iter()
        .filter(|(name, _)| !HOST_HEADERS.contains(&name.as_str()));
    let headers = own.map(|(name, value)| (name.to_string(), header_to_text(value.as_bytes())));
    Ok(HttpResponse {
        status,
        headers: headers.collect(),
        body: body.to_bytes(),
    })
}

fn hyper_request(request: &HttpRequest) -> wasmtime::Result<hyper::Request<Full<Bytes>>> {
    let mut builder = hyper::Request::builder()
        .method(request.method.as_str())
        .uri(&request.path_and_query);
    for (name, value) in with_host(request) {
        builder = builder.header(name, header_to_bytes(&value));
    }
    Ok(builder.body(Full::new(request.body.clone()))?)
}

/// The headers of a request. The authority is the first one, because wasmtime reads it from `host`.
fn with_host(request: &HttpRequest) -> Headers {
    let others = request
        .headers
        .iter()
        .filter(|(name, _)| !name.eq_ignore_ascii_case("host"))
        .cloned();
    std::iter::once(("host".to_owned(), request.authority.clone()))
        .chain(others)
        .collect()
}

/// Converts the bytes of a header to text, one character for each byte.
pub fn header_to_text(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

/// Reverses [`header_to_text`]. Characters above 255 are omitted.
pub fn header_to_bytes(text: &str) -> Vec<u8> {
    text.chars()
        .filter_map(|char| u8::try_from(u32::from(char)).ok())
        .collect()
}
