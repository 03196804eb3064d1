//! Normalizes the head of a request: one authority, one caller, one cookie line.
//!
//! Idempotency keys and cache keys are derived from these headers, and the handler sees the same
//! ones. An ambiguous head is refused: the key could follow one reading and the response the other.

use axum::http::header::{AUTHORIZATION, COOKIE, HOST};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Uri, Version};

use super::problem::Problem;

/// The authority of a request without one, which only HTTP/1.0 allows.
const NO_AUTHORITY: &str = "localhost";

/// The port of an authority without one: the host does not terminate TLS.
const DEFAULT_PORT: u16 = 80;

/// Normalizes the head. Afterwards `Host` is the single authority, and there is at most one
/// `Cookie` line.
///
/// `caller` is the configured header that identifies the caller.
///
/// # Errors
/// The head is ambiguous.
pub(super) fn normalize(parts: &mut Parts, caller: Option<&str>) -> Result<(), Problem> {
    let authority = authority(parts)?;
    if let Some(uri) = normalize_uri(&parts.uri) {
        parts.uri = uri;
    }
    parts.headers.insert(HOST, authority);
    join_cookies(&mut parts.headers);
    for name in [
        AUTHORIZATION.as_str(),
        caller.unwrap_or(AUTHORIZATION.as_str()),
    ] {
        if parts.headers.get_all(name).iter().nth(1).is_some() {
            return Err(Problem::caller_ambiguous(name));
        }
    }
    Ok(())
}

/// The target in normalized spelling; none if it has that spelling already.
///
/// Unreserved characters are not escaped (`7`, not `%37`), and other escapes are in upper case (RFC
/// 3986 sections 6.2.2.1 and 6.2.2.2). Escaped dots stay: unescaped, a plain segment could become
/// `..`.
fn normalize_uri(uri: &Uri) -> Option<Uri> {
    let target = uri
        .path_and_query()
        .filter(|target| target.as_str().contains('%'))?
        .as_str();
    let mut normalized = String::with_capacity(target.len());
    let mut rest = target;
    while let Some((before, after)) = rest.split_once('%') {
        normalized.push_str(before);
        let escape = after
            .get(..2)
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let byte = escape.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = after;
        match byte {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) => {
                normalized.push(char::from(byte))
            }
            Some(byte) => normalized.push_str(&format!("%{byte:02X}")),
            None => {
                normalized.push('%');
                continue;
            }
        }
        rest = after.get(2..).unwrap_or_default();
    }
    normalized.push_str(rest);
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(normalized.parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// The authority of the target if it has one, else that of `Host` (RFC 9112 section 3.2). Both must
/// name the same host.
fn authority(parts: &Parts) -> Result<HeaderValue, Problem> {
    let hosts: Vec<&HeaderValue> = parts.headers.get_all(HOST).iter().collect();
    let host = match hosts.as_slice() {
        [] if parts.version >= Version::HTTP_11 => {
            return Err(Problem::host_refused("there is no Host header"));
        }
        [] => None,
        [host] => Some(parse_authority(host.as_bytes())?),
        _ => return Err(Problem::host_refused("there are several Host headers")),
    };
    let target = parts
        .uri
        .authority()
        .map(|authority| parse_authority(authority.as_str().as_bytes()))
        .transpose()?;
    let authority = match (target, host) {
        (Some(target), Some(host)) if !is_same(&target, &host) => {
            return Err(Problem::host_refused(
                "the request target and the Host header name different hosts",
            ));
        }
        (Some(authority), _) | (None, Some(authority)) => authority,
        (None, None) => return Ok(HeaderValue::from_static(NO_AUTHORITY)),
    };
    HeaderValue::from_str(authority.as_str())
        .map_err(|_| Problem::host_refused("the host is not a valid authority"))
}

fn parse_authority(bytes: &[u8]) -> Result<Authority, Problem> {
    let authority = Authority::try_from(bytes)
        .map_err(|_| Problem::host_refused("the host is not a valid authority"))?;
    if authority.host().is_empty() || authority.as_str().contains('@') {
        return Err(Problem::host_refused("the host is not a valid authority"));
    }
    Ok(authority)
}

fn is_same(one: &Authority, other: &Authority) -> bool {
    let port = |authority: &Authority| authority.port_u16().unwrap_or(DEFAULT_PORT);
    one.host().eq_ignore_ascii_case(other.host()) && port(one) == port(other)
}

/// Joins several cookie lines into one, as in RFC 9113 section 8.2.3.
///
/// HTTP/2 front ends split cookies over several lines, possibly differently for each retry.
fn join_cookies(headers: &mut HeaderMap) {
    let lines: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if lines.len() < 2 {
        return;
    }
    // Valid values joined by a valid separator are valid.
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(b"; ".as_slice())) {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn normalized_headers(
        uri: &str,
        headers: &[(&str, &str)],
        caller: Option<&str>,
    ) -> Result<HeaderMap, String> {
        let mut builder = Request::builder().uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let (mut parts, ()) = builder.body(()).unwrap().into_parts();
        normalize(&mut parts, caller).map_err(|problem| problem.detail)?;
        Ok(parts.headers)
    }

    #[test]
    fn a_request_has_one_authority() {
        let host = |uri: &str, hosts: &[&str]| {
            let headers: Vec<(&str, &str)> = hosts.iter().map(|host| ("host", *host)).collect();
            normalized_headers(uri, &headers, None)
                .map(|headers| headers[HOST].to_str().unwrap().to_owned())
        };
        assert_eq!(host("/a", &["good.example"]), Ok("good.example".to_owned()));
        assert_eq!(host("/a", &["[::1]:7480"]), Ok("[::1]:7480".to_owned()));
        assert_eq!(
            host("http://good.example/a", &["good.example"]),
            Ok("good.example".to_owned())
        );
        assert_eq!(
            host("http://GOOD.example:80/a", &["good.example"]),
            Ok("GOOD.example:80".to_owned())
        );
        for (uri, hosts) in [
            ("/a", &[][..]),
            ("/a", &["good.example", "evil.example"]),
            ("/a", &["good.example", "good.example"]),
            ("/a", &[""]),
            ("/a", &["good.example/evil"]),
            ("/a", &["user@good.example"]),
            ("http://evil.example/a", &["good.example"]),
            ("http://good.example:81/a", &["good.example"]),
            ("http://user@good.example/a", &["good.example"]),
            ("http://good.example/a", &[]),
        ] {
            assert!(host(uri, hosts).is_err(), "{uri} {hosts:?}");
        }
    }

    #[test]
    fn a_target_has_one_spelling() {
        let target = |uri: &str| {
            normalize_uri(&uri.parse().unwrap())
                .map_or_else(|| uri.to_owned(), |uri| uri.to_string())
        };
        assert_eq!(target("/a/%37?q=%7e"), "/a/7?q=~");
        assert_eq!(target("/a/%2e%2e/b"), "/a/%2E%2E/b");
        assert_eq!(target("/a%2fb/%C3%bc%20"), "/a%2Fb/%C3%BC%20");
        assert_eq!(target("/a/7"), "/a/7");
        assert_eq!(target("/100%"), "/100%");
        assert_eq!(target("/%zz%41"), "/%zzA");
    }

    #[test]
    fn http_1_0_needs_no_host() {
        let request = Request::builder()
            .uri("/a")
            .version(Version::HTTP_10)
            .body(())
            .unwrap();
        let (mut parts, ()) = request.into_parts();
        normalize(&mut parts, None).unwrap();
        assert_eq!(parts.headers[HOST], NO_AUTHORITY);
    }

    #[test]
    fn cookie_lines_are_joined_and_caller_headers_are_single() {
        let host = ("host", "a");
        let headers = normalized_headers(
            "/",
            &[host, ("cookie", "a=1"), ("cookie", "b=2")],
            Some("cookie"),
        )
        .unwrap();
        assert_eq!(
            headers.get_all(COOKIE).iter().collect::<Vec<_>>(),
            ["a=1; b=2"]
        );
        let doubled =
            |name| normalized_headers("/", &[host, (name, "a"), (name, "a")], Some("x-user"));
        assert!(
            doubled("authorization")
                .unwrap_err()
                .contains("authorization")
        );
        assert!(doubled("x-user").unwrap_err().contains("x-user"));
        assert!(doubled("x-other").is_ok());
    }
}
