//! One operation: its request, key and deadline.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Url};
use serde::Serialize;

use crate::client::{Client, header};
use crate::key::{self, Key};
use crate::retry::Operation;
use crate::{Error, Failure, Response};

/// One operation, which is sent under one key on every try. It is created by [`Client::publish`]
/// and [`Client::call`]. [`Request::send`] returns the errors of its builder methods.
#[must_use = "the request is sent by `send`"]
pub struct Request {
    client: Client,
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Bytes,
    key: Option<Key>,
    deadline: Option<Duration>,
    error: Option<Error>,
}

impl Request {
    pub(crate) fn new(client: &Client, method: Method, url: Result<Url, Error>) -> Self {
        let key = Key::generate_for(&method);
        let client = client.clone();
        let headers = client.inner.headers.clone();
        let (url, error) = match url {
            Ok(url) => (url, None),
            Err(error) => (client.base().clone(), Some(error)),
        };
        Request {
            client,
            method,
            url,
            headers,
            body: Bytes::new(),
            key,
            deadline: None,
            error,
        }
    }

    /// Sets the `Idempotency-Key` of the operation: 1 to 255 printable ASCII characters that no
    /// other operation uses, for example an order id. A key that the program stores survives a
    /// crash: send the operation again under the same key. A generated key does not survive.
    ///
    /// By default, requests whose method is not idempotent (POST, PATCH) get a random UUID, others
    /// none.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(Key::Provided(key.into()));
        self
    }

    /// Sends no key. For servers that do not support keys: a POST or PATCH is then tried only once.
    pub fn without_key(mut self) -> Self {
        self.key = None;
        self
    }

    /// Sets the body, unchanged.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// Sets the body as JSON, with its `content-type`.
    pub fn json(mut self, body: &impl Serialize) -> Self {
        match serde_json::to_vec(body) {
            Ok(body) => self.body = body.into(),
            Err(error) => self.set_error(Error::Invalid(format!(
                "failed to serialize the body as JSON: {error}"
            ))),
        }
        self.headers
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self
    }

    /// Sets a header, in place of one with the same name.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match header(name, value) {
            Ok((name, value)) => _ = self.headers.insert(name, value),
            Err(error) => self.set_error(error),
        }
        self
    }

    /// Sets the time limit of this operation with all its tries and waits, in place of the
    /// client's.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sends the request, and retries it if that is safe and may help, until the response is 2xx or
    /// 304. It needs a tokio runtime with time. Dropping the future stops the retries; a request
    /// that was sent may still be carried out.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn send(mut self) -> Result<Response, Error> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        if let Some(key) = &self.key {
            self.headers.insert(key::HEADER, key.header()?);
        }
        let operation = Operation {
            method: self.method.clone(),
            path: self.url.path().to_owned(),
            key: self.key.clone(),
            deadline: self.deadline,
        };
        self.client
            .inner
            .retrier
            .run(&operation, || self.send_once())
            .await
    }

    /// Makes one try: sends the request, and reads the response to its end.
    async fn send_once(&self) -> Result<Response, Failure> {
        let http = &self.client.inner.http;
        let mut request = http
            .request(self.method.clone(), self.url.clone())
            .headers(self.headers.clone());
        if !self.body.is_empty() || !self.method.is_safe() {
            request = request.body(self.body.clone());
        }
        // URLs may contain passwords, and errors are logged.
        let connection_error = |error: reqwest::Error| Failure::Connection(error.without_url());
        let mut response = request.send().await.map_err(connection_error)?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let body = response.bytes().await.map_err(connection_error)?;
        Ok(Response::new(status, headers, body))
    }

    /// Keeps the first error, which `send` returns.
    fn set_error(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }
}

/// Omits headers and body, which may hold secrets.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut request = f.debug_struct("Request");
        request
            .field("method", &self.method)
            .field("path", &self.url.path())
            .field("key", &self.key);
        request.finish_non_exhaustive()
    }
}
