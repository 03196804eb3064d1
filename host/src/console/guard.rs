//! The checks of each request before its page runs, and the headers of each response after it.
//!
//! No page can be reached without them: the guard wraps the whole router of the console.
#![allow(
    clippy::result_large_err,
    reason = "a refusal is a complete response, made at most once for a request"
)]

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};

use super::Console;
use super::fields::Fields;
use super::identity::Session;
use super::oidc;
use super::page;
use super::problem::{Problem, ProblemBody};
use super::visitor::{Visitor, wants_json};
use crate::api::{ApiError, Caller, bearer_token};
use crate::model::role::Role;

/// The largest form, in bytes. An edited body is in it, percent-encoded.
const FORM_MAX: usize = 4 << 20;

/// The paths that need no login.
const PUBLIC: [&str; 5] = [
    "/login",
    oidc::BEGIN,
    oidc::CALLBACK,
    page::STYLESHEET,
    page::ICON,
];

/// The name of the cookie. Another host on this machine has another port, and the same cookies.
const COOKIE: &str = "oncely-session";

/// The policy of a page: its own stylesheet, images and forms, and nothing else. No script runs.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; \
    form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// Admits a request, runs its page, shows its error, and adds the headers.
pub async fn guard(State(console): State<Arc<Console>>, request: Request, next: Next) -> Response {
    // Programs get the status, not the login.
    if request.uri().path().starts_with("/v1/") {
        return StatusCode::NOT_FOUND.into_response();
    }
    let is_json = wants_json(request.headers());
    let mut response = match admit(&console, request).await {
        Ok(request) => {
            let visitor = request.extensions().get::<Visitor>().cloned();
            let response = next.run(request).await;
            show_problem(response, visitor.as_ref(), is_json)
        }
        Err(refusal) => show_problem(refusal, None, is_json),
    };
    add_headers(&mut response);
    response
}

/// Checks the host, the origin, the login and the token of the form, in this order.
async fn admit(console: &Console, request: Request) -> Result<Request, Response> {
    check_host(request.headers(), &console.names)?;
    if !request.method().is_safe() {
        check_origin(request.headers())?;
    }
    let (mut parts, body) = request.into_parts();
    let is_public = PUBLIC.contains(&parts.uri.path());
    if !is_public {
        let visitor = log_in(console, &parts.headers, &parts.uri, &parts.method).await?;
        check_role(&visitor, &parts.method, parts.uri.path())?;
        parts.extensions.insert(visitor);
    }
    if parts.method.is_safe() {
        return Ok(Request::from_parts(parts, Body::empty()));
    }
    let fields = read_form(&parts.headers, body).await?;
    if let Some(visitor) = parts.extensions.get::<Visitor>() {
        check_form_token(visitor, &fields)?;
    }
    parts.extensions.insert(fields);
    Ok(Request::from_parts(parts, Body::empty()))
}

/// Refuses a name that is neither of this machine nor configured. So a page of another site whose
/// name was bound to this address again reaches nothing.
fn check_host(headers: &HeaderMap, names: &[String]) -> Result<(), Response> {
    let host = text(headers, header::HOST).unwrap_or_default();
    let name = host_name(host).to_ascii_lowercase();
    let is_address = name
        .trim_matches(['[', ']'])
        .parse::<std::net::IpAddr>()
        .is_ok_and(|address| address.is_loopback());
    if is_address || name == "localhost" || names.contains(&name) {
        return Ok(());
    }
    Err(Problem::refused(
        StatusCode::MISDIRECTED_REQUEST,
        "the console does not serve this host name",
        "use its address on this machine, or set the name with console_names",
    )
    .into_response())
}

/// The name or address of a `Host` header, without the port.
fn host_name(host: &str) -> &str {
    match host.split_once(']') {
        Some((address, _)) => address.strip_prefix('[').unwrap_or(address),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

/// Refuses a form of another site. Browsers send at least one of the two headers.
fn check_origin(headers: &HeaderMap) -> Result<(), Response> {
    let site = text(headers, header::HeaderName::from_static("sec-fetch-site"));
    let origin = text(headers, header::ORIGIN);
    let host = text(headers, header::HOST).unwrap_or_default();
    let is_own_site = site.is_none_or(|site| site == "same-origin");
    let is_own_origin = origin.is_none_or(|origin| {
        let authority = origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"));
        authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
    });
    if is_own_site && is_own_origin && (site.is_some() || origin.is_some()) {
        return Ok(());
    }
    Err(Problem::refused(
        StatusCode::FORBIDDEN,
        "the form does not come from this console",
        "open the console itself; programs use the control API below /v1",
    )
    .into_response())
}

/// The visitor of a session, or of a token in the `Authorization` header, which can only read. The
/// session of a token ends when the token does.
async fn log_in(
    console: &Console,
    headers: &HeaderMap,
    uri: &Uri,
    method: &Method,
) -> Result<Visitor, Response> {
    let is_json = wants_json(headers);
    let takes_flash = *method == Method::GET && !is_json;
    if let Some(id) = session_id(headers)
        && let Some((mut session, flash)) = console.sessions.find(&id, takes_flash, Instant::now())
        && let Some(caller) = renewed(console, &session).await?
    {
        session.caller = caller;
        return Ok(Visitor::of_session(id, session, flash, is_json, uri));
    }
    if method.is_safe()
        && let Some(caller) = identify(console, bearer_token(headers))
            .await
            .map_err(IntoResponse::into_response)?
    {
        return Ok(Visitor::of_token(caller, is_json, uri));
    }
    if is_json {
        let hint = "pass the host's token as Authorization: Bearer TOKEN";
        let problem = Problem::refused(StatusCode::UNAUTHORIZED, "not logged in", hint);
        return Err(problem.into_response());
    }
    Err(Redirect::to(&page::login_path(uri, method)).into_response())
}

/// The caller of a session, with its role of now.
async fn renewed(console: &Console, session: &Session) -> Result<Option<Caller>, Response> {
    let renewed = console.authenticator.renewed(session.caller.clone()).await;
    renewed.map_err(|error| Problem::from(ApiError::from(error)).into_response())
}

/// The holder of a token.
///
/// # Errors
/// The database is unavailable, so a named token cannot be checked.
pub async fn identify(console: &Console, token: &str) -> Result<Option<Caller>, Problem> {
    let caller = console.authenticator.caller(token).await;
    caller.map_err(|error| Problem::from(ApiError::from(error)))
}

/// The role that a request needs. A dry run executes the handler, so it is more than reading.
fn role_needed(method: &Method, path: &str) -> Role {
    let page = path.rsplit('/').next().unwrap_or_default();
    match (method.is_safe(), page) {
        (true, "dry-run") => Role::Operate,
        (true, _) if path == "/failures/redrive" => Role::Operate,
        (true, _) => Role::View,
        (false, "rollback" | "retire") => Role::Deploy,
        (false, "logout") => Role::View,
        (false, _) => Role::Operate,
    }
}

fn check_role(visitor: &Visitor, method: &Method, path: &str) -> Result<(), Response> {
    let needed = role_needed(method, path);
    if visitor.caller.role >= needed {
        return Ok(());
    }
    let refused = visitor.caller.refused(&format!("{method} {path}"), needed);
    Err(Problem::from(refused).into_response())
}

/// The id in the cookie.
pub fn session_id(headers: &HeaderMap) -> Option<String> {
    cookie(headers, COOKIE)
}

/// The value of a cookie.
pub fn cookie(headers: &HeaderMap, wanted: &str) -> Option<String> {
    let cookies = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|line| line.split(';'));
    pairs.find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == wanted).then(|| value.to_owned())
    })
}

/// The cookie of a session; an empty id deletes it. It needs HTTPS if a proxy says that the browser
/// used it.
pub fn session_cookie(headers: &HeaderMap, id: &str, lifetime_secs: u64) -> String {
    let proto = text(
        headers,
        header::HeaderName::from_static("x-forwarded-proto"),
    );
    let secure = if proto == Some("https") {
        "; Secure"
    } else {
        ""
    };
    format!("{COOKIE}={id}; Path=/; HttpOnly; SameSite=Strict; Max-Age={lifetime_secs}{secure}")
}

async fn read_form(headers: &HeaderMap, body: Body) -> Result<Fields, Response> {
    let content_type = text(headers, header::CONTENT_TYPE).unwrap_or_default();
    let is_form = content_type
        .split(';')
        .next()
        .is_some_and(|kind| kind.trim() == "application/x-www-form-urlencoded");
    if !is_form {
        return Err(Problem::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the request is not a form",
            "programs use the control API below /v1",
        )
        .into_response());
    }
    let body = to_bytes(body, FORM_MAX).await.map_err(|_| {
        Problem::refused(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the form is too large",
            "send a large body with: oncely dlq edit ID --body FILE --note NOTE",
        )
        .into_response()
    })?;
    Ok(Fields::parse(&body))
}

fn check_form_token(visitor: &Visitor, fields: &Fields) -> Result<(), Response> {
    if fields
        .get("csrf")
        .is_some_and(|given| visitor.owns_form(given))
    {
        return Ok(());
    }
    Err(Problem::refused(
        StatusCode::FORBIDDEN,
        "the form belongs to another session",
        "reload the page and send the form again",
    )
    .into_response())
}

/// Shows the error of a page as HTML or JSON.
fn show_problem(response: Response, visitor: Option<&Visitor>, is_json: bool) -> Response {
    match response.extensions().get::<ProblemBody>() {
        Some(problem) => problem.clone().show(response.status(), visitor, is_json),
        None => response,
    }
}

/// Headers of all responses, errors included.
fn add_headers(response: &mut Response) {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        // `no-referrer` would also hide the origin of the console's own forms.
        (header::REFERRER_POLICY, "same-origin"),
        (
            header::HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (
            header::HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            header::HeaderName::from_static("permissions-policy"),
            "camera=(), geolocation=(), microphone=()",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            let value = HeaderValue::from_str(value).unwrap();
            (header::HeaderName::from_static(name), value)
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn only_names_of_this_machine_and_configured_ones_are_served() {
        let names = ["ops.example.com".to_owned()];
        let is_served = |host| check_host(&headers(&[("host", host)]), &names).is_ok();
        for host in [
            "127.0.0.1:7420",
            "127.9.9.9",
            "localhost:7420",
            "LOCALHOST",
            "[::1]:7420",
            "ops.example.com",
            "Ops.Example.com:443",
        ] {
            assert!(is_served(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:7420",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "10.0.0.1:7420",
            "[::2]:80",
            "",
        ] {
            assert!(!is_served(host), "{host}");
        }
    }

    #[test]
    fn forms_of_other_sites_are_refused() {
        let is_taken = |pairs: &[(&'static str, &str)]| {
            let mut headers = headers(pairs);
            headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:7420"));
            check_origin(&headers).is_ok()
        };
        let own = ("origin", "http://127.0.0.1:7420");
        assert!(is_taken(&[own]));
        assert!(is_taken(&[own, ("sec-fetch-site", "same-origin")]));
        assert!(is_taken(&[("sec-fetch-site", "same-origin")]));
        assert!(!is_taken(&[]));
        assert!(!is_taken(&[("origin", "null")]));
        assert!(!is_taken(&[("origin", "http://127.0.0.1:7421")]));
        assert!(!is_taken(&[("origin", "http://evil.example")]));
        assert!(!is_taken(&[own, ("sec-fetch-site", "same-site")]));
        assert!(!is_taken(&[own, ("sec-fetch-site", "cross-site")]));
    }

    #[test]
    fn the_cookie_is_strict_and_secure_behind_https() {
        let plain = session_cookie(&HeaderMap::new(), "id", 60);
        assert_eq!(
            plain,
            "oncely-session=id; Path=/; HttpOnly; SameSite=Strict; Max-Age=60"
        );
        let behind = headers(&[("x-forwarded-proto", "https")]);
        assert!(session_cookie(&behind, "id", 60).ends_with("; Secure"));
        let sent = headers(&[("cookie", "a=b; oncely-session=id")]);
        assert_eq!(session_id(&sent).as_deref(), Some("id"));
    }
}
