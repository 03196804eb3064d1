//! Requests to other servers over HTTP and HTTPS, each on a connection of its own.

use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderValue, USER_AGENT};
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// The most bytes of a proxy's answer.
const PROXY_ANSWER_MAX: usize = 16 << 10;

/// Sends requests. It follows no redirects and sets no timeouts.
#[derive(Default)]
pub struct HttpsClient {
    /// Made for the first server with TLS.
    tls: OnceLock<TlsConnector>,
    proxies: Option<Matcher>,
}

/// The server of a URL.
struct Origin<'u> {
    is_tls: bool,
    /// A name or an address, without brackets.
    host: &'u str,
    port: u16,
}

impl HttpsClient {
    /// A client that reaches servers with TLS through the proxies of the environment:
    /// `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.
    pub fn with_proxies() -> Self {
        HttpsClient {
            tls: OnceLock::new(),
            proxies: Some(Matcher::from_env()),
        }
    }

    /// TLS with the root certificates of the operating system.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn tls(&self) -> Result<&TlsConnector> {
        if let Some(tls) = self.tls.get() {
            return Ok(tls);
        }
        let tls = connector().context("set up TLS")?;
        Ok(self.tls.get_or_init(|| tls))
    }

    /// Sends a request to the server of its URL, and returns the response with its body unread.
    ///
    /// # Errors
    /// The server cannot be reached, or breaks the connection.
    pub async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let url = request.uri().clone();
        let origin = Origin::of(&url)?;
        let authority = url.authority().map_or("", |authority| authority.as_str());
        let agent = concat!("oncely/", env!("CARGO_PKG_VERSION"));
        let host = HeaderValue::from_str(authority).context("parse the host of the URL")?;
        let headers = request.headers_mut();
        headers.insert(HOST, host);
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        let path = url.path_and_query().map_or("/", PathAndQuery::as_str);
        *request.uri_mut() = path.parse().context("parse the path of the URL")?;

        let stream = self.connect(&url, &origin).await?;
        if !origin.is_tls {
            return exchange(stream, request).await;
        }
        let name = ServerName::try_from(origin.host.to_owned()).context("parse the host name")?;
        let stream = self.tls()?.connect(name, stream).await;
        exchange(
            stream.with_context(|| format!("start TLS with {authority}"))?,
            request,
        )
        .await
    }

    async fn connect(&self, url: &Uri, origin: &Origin<'_>) -> Result<TcpStream> {
        let proxies = self.proxies.as_ref().filter(|_| origin.is_tls);
        if let Some(proxy) = proxies.and_then(|proxies| proxies.intercept(url)) {
            return tunnel(&proxy, origin).await;
        }
        let stream = TcpStream::connect((origin.host, origin.port)).await;
        stream.with_context(|| format!("connect to {}", url.authority().map_or("", |a| a.as_str())))
    }
}

impl<'u> Origin<'u> {
    fn of(url: &'u Uri) -> Result<Self> {
        let is_tls = match url.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => bail!("the URL begins neither with https:// nor with http://"),
        };
        let host = url.host().context("find the host of the URL")?;
        Ok(Origin {
            is_tls,
            host: host.trim_matches(['[', ']']),
            port: url.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
        })
    }
}

/// Opens a connection to a server through a proxy.
async fn tunnel(proxy: &Intercept, origin: &Origin<'_>) -> Result<TcpStream> {
    let through = Origin::of(proxy.uri()).context("read the URL of the proxy")?;
    if through.is_tls {
        bail!("the proxy is reached over TLS; set HTTPS_PROXY to an http:// URL");
    }
    let shown = format!("{}:{}", through.host, through.port);
    let stream = TcpStream::connect((through.host, through.port)).await;
    let mut stream = stream.with_context(|| format!("connect to the proxy {shown}"))?;

    // The request for the tunnel.
    let host = match origin.host.contains(':') {
        true => format!("[{}]:{}", origin.host, origin.port),
        false => format!("{}:{}", origin.host, origin.port),
    };
    let mut request = format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n").into_bytes();
    if let Some(login) = proxy.basic_auth() {
        request.extend_from_slice(b"Proxy-Authorization: ");
        request.extend_from_slice(login.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    stream.write_all(&request).await.context("ask the proxy")?;

    // Its answer ends with an empty line, and the server speaks only after the client.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await.context("read the proxy's answer")?;
        answer.push(byte);
        if answer.len() > PROXY_ANSWER_MAX {
            bail!("the proxy {shown} does not answer as HTTP");
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.lines().next().unwrap_or_default();
    match status.split(' ').nth(1) {
        Some(code) if code.starts_with('2') => Ok(stream),
        _ => Err(anyhow!(
            "the proxy {shown} answered: {}",
            status.escape_debug()
        )),
    }
}

/// Sends a request on a connection. The connection ends with the response.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Its errors are those of the response.
    tokio::spawn(connection);
    sender
        .send_request(request)
        .await
        .context("read the answer")
}

fn connector() -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        bail!(
            "no root certificates found in the operating system: {:?}",
            found.errors
        );
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("select the versions of TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
