//! One operation: what to send, under which key, until when.

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

/// One operation, which is sent under one key however often it is tried. Made by [`Client::publish`] and
/// [`Client::call`]; mistakes in it come out of [`Request::send`].
#[must_use = "nothing is sent before `send`"]
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

    /// The operation's `Idempotency-Key`, 1 to 255 printable ASCII characters that no other operation has: an order
    /// id, say. A key that your program keeps outlives it, which one that is made here does not: after a crash, send
    /// again under the same.
    ///
    /// Without this, requests whose method is not idempotent (POST, PATCH) get a random UUID, the others none.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(Key::Provided(key.into()));
        self
    }

    /// Sends no key. For servers that do not know keys: a POST or PATCH is then sent once.
    pub fn without_key(mut self) -> Self {
        self.key = None;
        self
    }

    /// The body as it is.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// The body as JSON, with its `content-type`.
    pub fn json(mut self, body: &impl Serialize) -> Self {
        match serde_json::to_vec(body) {
            Ok(body) => self.body = body.into(),
            Err(error) => self.set_error(Error::Invalid(format!(
                "the body cannot be written as JSON: {error}"
            ))),
        }
        self.headers
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self
    }

    /// A header; it takes the place of one of the same name.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match header(name, value) {
            Ok((name, value)) => _ = self.headers.insert(name, value),
            Err(error) => self.set_error(error),
        }
        self
    }

    /// How long this operation may take with all its tries and waits, instead of the client's.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sends it, and again if that is safe and worth it, until there is a good response (2xx or 304). It needs a tokio
    /// runtime with time. Dropping the future stops it: what was sent may still be carried out.
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

    /// One try: sends, and reads the response to its end.
    async fn send_once(&self) -> Result<Response, Failure> {
        let http = &self.client.inner.http;
        let mut request = http
            .request(self.method.clone(), self.url.clone())
            .headers(self.headers.clone());
        if !self.body.is_empty() || !self.method.is_safe() {
            request = request.body(self.body.clone());
        }
        // Addresses may hold passwords, and errors are written down.
        let connection_error = |error: reqwest::Error| Failure::Connection(error.without_url());
        let mut response = request.send().await.map_err(connection_error)?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let body = response.bytes().await.map_err(connection_error)?;
        Ok(Response::new(status, headers, body))
    }

    /// The first mistake is the one to tell of.
    fn set_error(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }
}

/// Without headers and body, which may hold secrets.
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
