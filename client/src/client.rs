//! The client and what it is made of: connections, retry policy, and a budget that its clones share.

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

/// Sends requests to one server. Make one and clone it: clones share connections and the retry budget.
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
    /// A client with the usual policy for the server at `base`, such as `http://127.0.0.1:8080`.
    ///
    /// Fails with [`Error::Invalid`] as [`Builder::build`] does.
    pub fn new(base: &str) -> Result<Self, Error> {
        Client::builder(base).build()
    }

    /// A client with a policy of your own.
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

    /// Publishes a message: `POST {base}/publish/{subject}` with the message's body.
    pub fn publish(&self, subject: &str, body: impl Into<Bytes>) -> Request {
        let url = self.subject_url(subject);
        Request::new(self, Method::POST, url).body(body)
    }

    /// Any other request. `path` follows the base as it is, begins with `/`, and may have a query.
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
                "{subject:?} is no subject to publish to: it is made of words with dots between them, without wildcards"
            )));
        }
        let mut url = self.inner.base.clone();
        match url.path_segments_mut() {
            Ok(mut segments) => segments.pop_if_empty().push("publish").push(subject),
            Err(()) => {
                return Err(Error::Invalid(
                    "the base has no path to publish below".to_owned(),
                ));
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
            .map_err(|error| Error::Invalid(format!("the path {path:?} makes no address: {error}")))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("host", &self.inner.base.host_str())
            .finish_non_exhaustive()
    }
}

/// The numbers of a client; each has a value that suits a service which people wait for.
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
    /// How long an operation may take with all its tries and waits: 30 s, unless [`Request::deadline`] says otherwise.
    /// Keep it (and whatever sends an operation again under the same key) shorter than the server remembers keys.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.policy.deadline = deadline;
        self
    }

    /// How long one try may take, from connecting to the last byte of the response: 10 s. The deadline cuts it, too.
    pub fn try_timeout(mut self, timeout: Duration) -> Self {
        self.policy.try_timeout = timeout;
        self
    }

    /// The most to wait after the first failed try, which doubles with each more until it reaches `most`: 100 ms and
    /// 5 s. The wait is evenly spread between nothing and that (full jitter).
    pub fn backoff(mut self, first: Duration, most: Duration) -> Self {
        (self.policy.backoff, self.policy.backoff_max) = (first, most);
        self
    }

    /// How much load retries may add: in any ten seconds at most `share` of the operations begun in them, plus
    /// `reserve`, for the client and all its clones. 0.2 and 30. `budget(0.0, 0)` never retries.
    pub fn budget(mut self, share: f64, reserve: u32) -> Self {
        self.budget = (share, reserve);
        self
    }

    /// A header of every request, such as `authorization`.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match header(name, value) {
            Ok((name, value)) => _ = self.headers.insert(name, value),
            Err(error) => _ = self.error.get_or_insert(error),
        }
        self
    }

    /// Connections made elsewhere, for proxies, certificates and the like. It should follow no redirects (a redirected
    /// POST becomes a GET) and retry nothing by itself.
    pub fn http(mut self, http: reqwest::Client) -> Self {
        self.http = Some(http);
        self
    }

    /// Where jitter comes from: numbers from 0 up to 1, evenly spread. For tests that want the same each time.
    pub fn random(mut self, random: impl Fn() -> f64 + Send + Sync + 'static) -> Self {
        self.random = Some(Box::new(random));
        self
    }

    /// Fails with [`Error::Invalid`] if the base is not an `http` address (or `https`, with the feature `tls` or
    /// [`Builder::http`]) without query and fragment, or if a number makes no sense.
    pub fn build(self) -> Result<Client, Error> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.policy.check()?;
        let (share, reserve) = self.budget;
        if !share.is_finite() || share < 0.0 {
            return Err(Error::Invalid(format!(
                "a budget is a share of 0 or more, not {share}"
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
        .map_err(|error| Error::Invalid(format!("{text:?} is no address: {error}")))?;
    let wrong = match url.scheme() {
        "http" if url.has_host() => None,
        "https" if own_http || cfg!(feature = "tls") => None,
        "https" => Some(
            "needs the feature `tls` of oncely-client, or connections of your own (`Builder::http`)",
        ),
        _ => Some("is no address of a server, such as http://127.0.0.1:8080"),
    };
    let wrong = match url.query().or(url.fragment()) {
        Some(_) => wrong.or(Some(
            "has a query or a fragment; the base is what stands before all paths",
        )),
        None => wrong,
    };
    wrong.map_or(Ok(url), |wrong| {
        Err(Error::Invalid(format!("{text} {wrong}")))
    })
}

/// Connections that follow no redirects and do not retry by themselves, so that tries are counted in one place.
fn http_client(base: &Url) -> Result<reqwest::Client, Error> {
    #[cfg(feature = "tls")]
    {
        // The first one to choose decides; if the program has, so be it.
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
        .map_err(|error| Error::Invalid(format!("connections cannot be set up: {error}")))
}

/// Whether a URL leads to this machine, before which no proxy of the environment stands.
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

/// A header, unless it is the one that [`Request::key`] is for.
pub(crate) fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), Error> {
    let invalid = |what: &str| Error::Invalid(format!("the header {name:?} {what}"));
    let header =
        HeaderName::try_from(name).map_err(|_| invalid("has a name that HTTP does not allow"))?;
    if header == key::HEADER {
        return Err(invalid("is set by `Request::key`"));
    }
    let value = HeaderValue::try_from(value)
        .map_err(|_| invalid("has a value that HTTP does not allow"))?;
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
