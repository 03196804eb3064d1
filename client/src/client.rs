//! The client and its builder: connections, retry policy, and a budget that clones share.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Url};

use crate::budget::Budget;
use crate::policy::Policy;
use crate::request::Request;
use crate::retry::Retrier;
use crate::{Error, key};

/// Sends requests to one server. Create one and clone it: clones share connections and the retry
/// budget.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    base: Url,
    pub headers: HeaderMap,
    pub http: reqwest::Client,
    pub retrier: Retrier,
}

impl Client {
    /// A client with the default policy for the server at `base`, such as `http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// [`Error::Invalid`], as for [`Builder::build`].
    pub fn new(base: &str) -> Result<Self, Error> {
        Client::builder(base).build()
    }

    /// A builder for a client with another policy.
    pub fn builder(base: &str) -> Builder {
        Builder {
            base: base.to_owned(),
            policy: Policy::default(),
            budget: (Budget::SHARE, Budget::RESERVE),
            headers: HeaderMap::new(),
            http: None,
            random: None,
            error: None,
        }
    }

    /// Publishes a message: `POST {base}/publish/{subject}` with the body of the message.
    pub fn publish(&self, subject: &str, body: impl Into<Bytes>) -> Request {
        let url = self.subject_url(subject);
        Request::new(self, Method::POST, url).body(body)
    }

    /// Any other request. `path` is appended to the base unchanged, begins with `/`, and may have a
    /// query.
    pub fn call(&self, method: Method, path: &str) -> Request {
        Request::new(self, method, self.path_url(path))
    }

    pub(crate) fn base(&self) -> &Url {
        &self.inner.base
    }

    fn subject_url(&self, subject: &str) -> Result<Url, Error> {
        let whole = |token: &str| !token.is_empty() && !matches!(token, "*" | ">");
        let readable = !subject.contains(|c: char| c.is_whitespace() || c.is_control());
        if !readable || !subject.split('.').all(whole) {
            return Err(Error::Invalid(format!(
                "invalid subject {subject:?}: expected tokens separated by dots, no wildcards"
            )));
        }
        let mut url = self.inner.base.clone();
        match url.path_segments_mut() {
            Ok(mut segments) => segments.pop_if_empty().push("publish").push(subject),
            Err(()) => {
                return Err(Error::Invalid("the base URL cannot have a path".to_owned()));
            }
        };
        Ok(url)
    }

    fn path_url(&self, path: &str) -> Result<Url, Error> {
        if !path.starts_with('/') {
            return Err(Error::Invalid(format!(
                "the path {path:?} does not begin with a slash"
            )));
        }
        let whole = format!("{}{path}", self.inner.base.as_str().trim_end_matches('/'));
        Url::parse(&whole)
            .map_err(|error| Error::Invalid(format!("invalid path {path:?}: {error}")))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("host", &self.inner.base.host_str())
            .finish_non_exhaustive()
    }
}

/// The settings of a client. The defaults suit an interactive service.
pub struct Builder {
    base: String,
    policy: Policy,
    budget: (f64, u32),
    headers: HeaderMap,
    http: Option<reqwest::Client>,
    random: Option<Box<dyn Fn() -> f64 + Send + Sync>>,
    error: Option<Error>,
}

impl Builder {
    /// The time limit of an operation with all its tries and waits: 30 s by default.
    /// [`Request::deadline`] overrides it. It must be shorter than the time for which the server
    /// keeps keys. The same is true of any code that sends an operation again under the same key.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.policy.deadline = deadline;
        self
    }

    /// The time limit of one try, from connecting to the last byte of the response: 10 s by
    /// default. The deadline of the operation also applies.
    pub fn try_timeout(mut self, timeout: Duration) -> Self {
        self.policy.try_timeout = timeout;
        self
    }

    /// The longest wait after the first failed try, 100 ms by default, and its upper bound, 5 s by
    /// default. The longest wait doubles with each failed try until it reaches `most`. The actual
    /// wait is uniformly distributed between zero and the longest wait (full jitter).
    pub fn backoff(mut self, first: Duration, most: Duration) -> Self {
        (self.policy.backoff, self.policy.backoff_max) = (first, most);
        self
    }

    /// The load that retries may add. In any ten seconds they are at most `share` of the operations
    /// begun in them, plus `reserve`, for the client and all its clones. The defaults are 0.2 and
    /// 30. `budget(0.0, 0)` never retries.
    pub fn budget(mut self, share: f64, reserve: u32) -> Self {
        self.budget = (share, reserve);
        self
    }

    /// Adds a header to every request, such as `authorization`.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match header(name, value) {
            Ok((name, value)) => _ = self.headers.insert(name, value),
            Err(error) => _ = self.error.get_or_insert(error),
        }
        self
    }

    /// Uses this HTTP client, for proxies, certificates and similar settings. It should not follow
    /// redirects (a redirected POST becomes a GET), and it should not retry.
    pub fn http(mut self, http: reqwest::Client) -> Self {
        self.http = Some(http);
        self
    }

    /// The source of jitter: uniformly distributed numbers from 0 up to 1. Tests use it for
    /// repeatable waits.
    pub fn random(mut self, random: impl Fn() -> f64 + Send + Sync + 'static) -> Self {
        self.random = Some(Box::new(random));
        self
    }

    /// Builds the client.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the base is not an `http` URL without query and fragment, or if a
    /// setting is out of range. `https` requires the feature `tls` or [`Builder::http`].
    pub fn build(self) -> Result<Client, Error> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.policy.check()?;
        let (share, reserve) = self.budget;
        if !share.is_finite() || share < 0.0 {
            return Err(Error::Invalid(format!(
                "invalid budget share {share}: it must be 0 or more"
            )));
        }
        let base = parse_base(&self.base, self.http.is_some())?;
        let http = match self.http {
            Some(http) => http,
            None => http_client(&base)?,
        };
        let retrier = Retrier {
            policy: self.policy,
            budget: Mutex::new(Budget::new(share, reserve)),
            random: self.random.unwrap_or_else(|| Box::new(rand::random::<f64>)),
        };
        Ok(Client {
            inner: Arc::new(Inner {
                base,
                headers: self.headers,
                http,
                retrier,
            }),
        })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("policy", &self.policy)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}

fn parse_base(text: &str, own_http: bool) -> Result<Url, Error> {
    let url = Url::parse(text)
        .map_err(|error| Error::Invalid(format!("invalid URL {text:?}: {error}")))?;
    let wrong = match url.scheme() {
        "http" if url.has_host() => None,
        "https" if own_http || cfg!(feature = "tls") => None,
        "https" => Some(
            "requires the feature `tls` of oncely-client or a client passed to `Builder::http`",
        ),
        _ => Some("is not the URL of a server, such as http://127.0.0.1:8080"),
    };
    let wrong = match url.query().or(url.fragment()) {
        Some(_) => wrong.or(Some(
            "has a query or a fragment; the base URL must have neither",
        )),
        None => wrong,
    };
    wrong.map_or(Ok(url), |wrong| {
        Err(Error::Invalid(format!("{text} {wrong}")))
    })
}

/// An HTTP client without redirects and without retries, so that tries are counted in one place.
fn http_client(base: &Url) -> Result<reqwest::Client, Error> {
    #[cfg(feature = "tls")]
    {
        // The first installed provider wins, so a provider of the program is kept.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
    let http = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never());
    let http = if is_on_this_machine(base) {
        http.no_proxy()
    } else {
        http
    };
    http.build()
        .map_err(|error| Error::Invalid(format!("failed to create the HTTP client: {error}")))
}

/// Whether a URL refers to this machine. Such a URL bypasses the proxies of the environment.
pub fn is_on_this_machine(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<std::net::IpAddr>();
    host == "localhost"
        || host.ends_with(".localhost")
        || address.is_ok_and(|address| address.is_loopback() || address.is_unspecified())
}

/// Parses a header. `Idempotency-Key` is refused: [`Request::key`] sets it.
pub(crate) fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), Error> {
    let invalid = |problem: &str| Error::Invalid(format!("the header {name:?} {problem}"));
    let header = HeaderName::try_from(name).map_err(|_| invalid("has an invalid name"))?;
    if header == key::HEADER {
        return Err(invalid("is set by `Request::key`"));
    }
    let value = HeaderValue::try_from(value).map_err(|_| invalid("has an invalid value"))?;
    Ok((header, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_needs_the_tls_feature_or_an_http_client() {
        let base = "https://example.com";
        assert_eq!(Client::new(base).is_ok(), cfg!(feature = "tls"));
        assert!(
            Client::builder(base)
                .http(reqwest::Client::new())
                .build()
                .is_ok()
        );
    }

    #[test]
    fn debug_of_a_request_holds_no_secrets() {
        let client = Client::builder("http://user:secret@127.0.0.1:9")
            .header("authorization", "secret")
            .build();
        let request = client.unwrap().call(Method::GET, "/x").body("secret");
        assert!(!format!("{request:?}").contains("secret"), "{request:?}");
    }
}
