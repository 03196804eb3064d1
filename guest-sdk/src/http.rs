//! HTTP requests and responses; see [`http_handler!`](crate::http_handler).

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use wasip2::http::types::{
    Fields, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam,
};
use wasip2::io::streams::StreamError;

use crate::failure::Failure;

/// A request that was read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The method in upper case, such as `POST`.
    pub method: String,
    /// The path with its query, such as `/accounts/7?at=now`.
    pub path_and_query: String,
    /// The headers, in order. Names are lower case.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body; empty when there is none.
    pub body: Vec<u8>,
}

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status, 200 to 599. From 400 on, the effects of the handler are rolled back.
    pub status: u16,
    /// The headers, in order.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body; empty for none.
    pub body: Vec<u8>,
}

impl Request {
    /// The path, without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        self.path_and_query.split('?').next().unwrap_or_default()
    }

    /// The segments of the path between its slashes, not percent-decoded.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.path().split('/').filter(|segment| !segment.is_empty())
    }

    /// The first value of a query parameter, not percent-decoded.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.path_and_query.split_once('?')?;
        query
            .split('&')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// The first value of a header; the name is not case-sensitive. None when the header is absent
    /// or not UTF-8.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok()
    }

    /// The body, parsed as JSON.
    ///
    /// # Errors
    /// A 400 response with the code `malformed-body` and the position of the error.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Response> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Response::problem(
                400,
                "malformed-body",
                &format!("the body is not the expected JSON: {error}"),
            )
        })
    }
}

impl Response {
    /// A response without a body.
    #[must_use]
    pub fn new(status: u16) -> Self {
        Response {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// A response whose body is `value` as JSON; 500 when `value` cannot be serialized as JSON.
    #[must_use]
    pub fn json(status: u16, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Response {
                body,
                ..Response::new(status).header("content-type", "application/json")
            },
            Err(error) => Response::problem(500, "not-serializable", &error.to_string()),
        }
    }

    /// Problem details (RFC 9457). `code` is a short, stable name.
    #[must_use]
    pub fn problem(status: u16, code: &str, detail: &str) -> Self {
        let body = serde_json::json!({
            "type": "about:blank", "status": status, "code": code, "detail": detail,
        });
        Response {
            body: body.to_string().into_bytes(),
            ..Response::new(status).header("content-type", "application/problem+json")
        }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// A failure becomes a 500 response, and the effects of the handler are rolled back.
impl From<Failure> for Response {
    fn from(failure: Failure) -> Self {
        crate::log::error!("{failure}");
        Response::problem(
            500,
            failure.code.as_deref().unwrap_or("failed"),
            "the request could not be handled",
        )
    }
}

macro_rules! from_error {
    ($($error:ty),*) => {$(
        impl From<$error> for Response {
            fn from(error: $error) -> Self {
                Failure::from(error).into()
            }
        }
    )*};
}
from_error!(
    crate::cache::Error,
    crate::sql::Error,
    crate::sql::ColumnError,
    crate::state::Error,
    crate::outbox::Error
);

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status, String::from_utf8_lossy(&self.body))
    }
}

/// Handles a request of the host.
#[doc(hidden)]
pub fn run(
    request: &IncomingRequest,
    out: ResponseOutparam,
    handle: impl FnOnce(Request) -> Result<Response, Response>,
) {
    crate::log::install_panic_hook();
    let response = handle(read(request)).unwrap_or_else(|response| response);
    write(response, out);
}

fn read(request: &IncomingRequest) -> Request {
    let mut body = Vec::new();
    if let Ok(incoming) = request.consume()
        && let Ok(stream) = incoming.stream()
    {
        loop {
            match stream.blocking_read(64 << 10) {
                Ok(bytes) => body.extend(bytes),
                Err(StreamError::Closed) => break,
                Err(StreamError::LastOperationFailed(_)) => {
                    host_error("read the body of the request")
                }
            }
        }
    }
    Request {
        method: method(request.method()),
        path_and_query: request.path_with_query().unwrap_or_else(|| "/".to_owned()),
        headers: request.headers().entries(),
        body,
    }
}

fn method(method: Method) -> String {
    let name = match method {
        Method::Get => "GET",
        Method::Head => "HEAD",
        Method::Post => "POST",
        Method::Put => "PUT",
        Method::Delete => "DELETE",
        Method::Connect => "CONNECT",
        Method::Options => "OPTIONS",
        Method::Trace => "TRACE",
        Method::Patch => "PATCH",
        Method::Other(other) => return other,
    };
    name.to_owned()
}

/// The most bytes that `wasi:io` accepts in one write.
const CHUNK_SIZE: usize = 4096;

fn write(response: Response, out: ResponseOutparam) {
    // Status and headers
    let Ok(headers) = Fields::from_list(&response.headers) else {
        host_error("create the response headers")
    };
    let outgoing = OutgoingResponse::new(headers);
    if outgoing.set_status_code(response.status).is_err() {
        host_error("set the response status");
    }
    let Ok(body) = outgoing.body() else {
        host_error("open the response body")
    };
    ResponseOutparam::set(out, Ok(outgoing));

    // Body
    let Ok(stream) = body.write() else {
        host_error("write the response body")
    };
    for bytes in response.body.chunks(CHUNK_SIZE) {
        if stream.blocking_write_and_flush(bytes).is_err() {
            host_error("write the response body");
        }
    }
    drop(stream);
    if OutgoingBody::finish(body, None).is_err() {
        host_error("finish the response body");
    }
}

#[allow(clippy::panic, reason = "no response can be sent; the host rolls back")]
fn host_error(operation: &str) -> ! {
    panic!("the host refused to {operation}");
}
