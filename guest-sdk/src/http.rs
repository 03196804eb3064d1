//! Answer requests over HTTP; see [`http_handler!`](crate::http_handler).

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use wasip2::http::types::{
    Fields, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam,
};
use wasip2::io::streams::StreamError;

use crate::failure::Failure;

/// A request, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Upper case, such as `POST`.
    pub method: String,
    /// With its query, such as `/accounts/7?at=now`.
    pub path_and_query: String,
    /// In order; names are lower case.
    pub headers: Vec<(String, Vec<u8>)>,
    /// Empty when there is none.
    pub body: Vec<u8>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// 200 to 599. From 400 on nothing that the handler did takes effect.
    pub status: u16,
    /// In order.
    pub headers: Vec<(String, Vec<u8>)>,
    /// Empty for none.
    pub body: Vec<u8>,
}

impl Request {
    /// The path, without the query.
    #[must_use]
    pub fn path(&self) -> &str {
        self.path_and_query.split('?').next().unwrap_or_default()
    }

    /// The parts of the path between its slashes, as they were sent.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.path().split('/').filter(|segment| !segment.is_empty())
    }

    /// The first value of a name in the query, as it was sent.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.path_and_query.split_once('?')?;
        query
            .split('&')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// The first value of a header, its name compared without regard to case; none when it is not there, or not UTF-8.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// An answer of 400 that says what is wrong with it.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Response> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Response::problem(
                400,
                "malformed-body",
                &format!("the body cannot be read: {error}"),
            )
        })
    }
}

impl Response {
    /// An answer without a body.
    #[must_use]
    pub fn new(status: u16) -> Self {
        Response {
            status,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// An answer whose body is `value` as JSON; a value that has no such form is answered with 500.
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
        let body = serde_json::json!({ "type": "about:blank", "status": status, "code": code, "detail": detail });
        let answer = Response::new(status).header("content-type", "application/problem+json");
        Response {
            body: body.to_string().into_bytes(),
            ..answer
        }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// A failure ends a request with 500, and nothing of it takes effect.
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

/// Answers a request as the host gives it.
#[doc(hidden)]
pub fn run(
    request: &IncomingRequest,
    out: ResponseOutparam,
    handle: impl FnOnce(Request) -> Result<Response, Response>,
) {
    crate::log::install_panic_hook();
    let answer = handle(read(request)).unwrap_or_else(|answer| answer);
    write(answer, out);
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

/// What `wasi:io` takes at once, in bytes.
const CHUNK_SIZE: usize = 4096;

fn write(answer: Response, out: ResponseOutparam) {
    let Ok(headers) = Fields::from_list(&answer.headers) else {
        host_error("make the headers of the answer")
    };
    let response = OutgoingResponse::new(headers);
    if response.set_status_code(answer.status).is_err() {
        host_error("set the status of the answer");
    }
    let Ok(body) = response.body() else {
        host_error("begin the body of the answer")
    };
    ResponseOutparam::set(out, Ok(response));
    let Ok(stream) = body.write() else {
        host_error("write the body of the answer")
    };
    for bytes in answer.body.chunks(CHUNK_SIZE) {
        if stream.blocking_write_and_flush(bytes).is_err() {
            host_error("write the body of the answer");
        }
    }
    drop(stream);
    if OutgoingBody::finish(body, None).is_err() {
        host_error("finish the body of the answer");
    }
}

#[allow(
    clippy::panic,
    reason = "there is nobody to answer; the host rolls back"
)]
fn host_error(doing: &str) -> ! {
    panic!("the host did not let the handler {doing}");
}
