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
use crate::{Answer, Error, Failure};

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
    wrong: Option<Error>,
}

impl Request {
    pub(crate) fn new(client: &Client, method: Method, url: Result<Url, Error>) -> Self {
        let key = Key::made_for(&method);
        let client = client.clone();
        let headers = client.inner.headers.clone();
        let (url, wrong) = match url {
            Ok(url) => (url, None),
            Err(error) => (client.base().clone(), Some(error)),
        };
        Request { client, method, url, headers, body: Bytes::new(), key, deadline: None, wrong }
    }

    /// The operation's `Idempotency-Key`, 1 to 255 printable ASCII characters that no other operation has: an order
    /// id, say. A key that your program keeps outlives it, which one that is made here does not: after a crash, send
    /// again under the same.
    ///
    /// Without this, requests whose method is not idempotent (POST, PATCH) get a random UUID, the others none.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(Key::Brought(key.into()));
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
            Err(error) => self.is_wrong(Error::Invalid(format!("the body cannot be written as JSON: {error}"))),
        }
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self
    }

    /// A header; it takes the place of one of the same name.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match header(name, value) {
            Ok((name, value)) => _ = self.headers.insert(name, value),
            Err(error) => self.is_wrong(error),
        }
        self
    }

    /// How long this operation may take with all its tries and waits, instead of the client's.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sends it, and again if that is safe and worth it, until there is a good answer (2xx or 304). It needs a tokio
    /// runtime with time. Dropping the future stops it: what was sent may still be carried out.
    pub async fn send(mut self) -> Result<Answer, Error> {
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
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
        self.client.inner.retrier.run(&operation, || self.once()).await
    }

    /// One try: sends, and reads the answer to its end.
    async fn once(&self) -> Result<Answer, Failure> {
        let http = &self.client.inner.http;
        let mut request = http.request(self.method.clone(), self.url.clone()).headers(self.headers.clone());
        if !self.body.is_empty() || !self.method.is_safe() {
            request = request.body(self.body.clone());
        }
        // Addresses may hold passwords, and errors are written down.
        let broken = |error: reqwest::Error| Failure::Broken(error.without_url());
        let mut response = request.send().await.map_err(broken)?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let body = response.bytes().await.map_err(broken)?;
        Ok(Answer::new(status, headers, body))
    }

    /// The first mistake is the one to tell of.
    fn is_wrong(&mut self, error: Error) {
        self.wrong.get_or_insert(error);
    }
}

/// Without headers and body, which may hold secrets.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut request = f.debug_struct("Request");
        request.field("method", &self.method).field("path", &self.url.path()).field("key", &self.key);
        request.finish_non_exhaustive()
    }
}
