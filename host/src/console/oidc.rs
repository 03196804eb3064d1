//! Login with an OpenID Connect provider: the way there, and the way back.
//!
//! The secrets of a login are in a cookie of the browser that began it, sealed with a key of this
//! process. So visitors who are not logged in fill no memory, and a login that began elsewhere is
//! refused.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use maud::{Markup, html};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

use super::Console;
use super::fields::Fields;
use super::guard::{cookie, session_cookie};
use super::links::encoded;
use super::login::{self, is_own_path};
use super::page::Page;
use super::parts::text;
use crate::api::Caller;
use crate::config::{ConsoleUrl, HostConfig};
use crate::model::hint::hints;
use crate::oidc::{Attempt, LoginError, Person, Provider};

/// The path that begins a login.
pub const BEGIN: &str = "/login/oidc";

/// The path to which the provider sends the browser back.
pub const CALLBACK: &str = "/login/oidc/callback";

/// The cookie of a login that is under way, and its lifetime in seconds.
const COOKIE: &str = "oncely-login";
const LIFETIME_SECS: u64 = 10 * 60;

/// The longest path to return to, in bytes. The cookie has to fit into 4 KiB.
const NEXT_MAX: usize = 1024;

/// The login with one provider.
pub struct Oidc {
    provider: Provider,
    url: ConsoleUrl,
    /// Seals the cookies of logins. A restart of the host ends them.
    key: LessSafeKey,
}

/// A login that is under way.
#[derive(Serialize, Deserialize)]
struct Login {
    attempt: Attempt,
    /// The path of the console to return to.
    next: String,
    /// The end of its validity, in seconds since the Unix epoch.
    end: u64,
}

impl Oidc {
    /// The login of these settings; `None` if there is none.
    pub fn of(config: &HostConfig) -> Option<Self> {
        let (settings, url) = config.oidc.clone().zip(config.console_url.clone())?;
        let key = UnboundKey::new(&CHACHA20_POLY1305, &rand::random::<[u8; 32]>()).ok()?;
        Some(Oidc {
            provider: Provider::new(settings, url.join(CALLBACK)),
            url,
            key: LessSafeKey::new(key),
        })
    }

    /// The link of the login page, which returns to a page afterwards.
    pub fn link(&self, next: Option<&str>) -> Markup {
        let path = match next.filter(|next| is_own_path(next)) {
            Some(next) => format!("{BEGIN}?next={}", encoded(next)),
            None => BEGIN.to_owned(),
        };
        let issuer = self.provider.settings().issuer_short();
        let name = issuer.split('/').next().unwrap_or(issuer);
        html! {
            p.provider { a.button.quiet href=(path) { "Sign in with " (text(name)) } }
        }
    }

    /// Encrypts a login for its browser.
    fn seal(&self, login: &Login) -> Option<String> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let mut sealed = serde_json::to_vec(login).ok()?;
        let unique = Nonce::assume_unique_for_key(nonce);
        self.key
            .seal_in_place_append_tag(unique, Aad::from(COOKIE), &mut sealed)
            .ok()?;
        Some(URL_SAFE_NO_PAD.encode([&nonce[..], &sealed].concat()))
    }

    /// The login in a cookie; `None` if it is another text, or too old.
    fn open(&self, sealed: &str) -> Option<Login> {
        let bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, sealed) = bytes.split_first_chunk::<NONCE_LEN>()?;
        let mut sealed = sealed.to_vec();
        let unique = Nonce::assume_unique_for_key(*nonce);
        let opened = self
            .key
            .open_in_place(unique, Aad::from(COOKIE), &mut sealed);
        let login: Login = serde_json::from_slice(opened.ok()?).ok()?;
        (login.end > now()).then_some(login)
    }

    /// The cookie of a login; an empty text deletes it. The way back comes from another site, so
    /// `SameSite` cannot be strict.
    fn cookie(&self, sealed: &str, lifetime_secs: u64) -> String {
        let secure = if self.url.is_https { "; Secure" } else { "" };
        format!(
            "{COOKIE}={sealed}; Path={BEGIN}; HttpOnly; SameSite=Lax; \
             Max-Age={lifetime_secs}{secure}"
        )
    }
}

/// Sends the browser to the provider.
pub async fn begin(State(console): State<Arc<Console>>, headers: HeaderMap, uri: Uri) -> Response {
    let Some(oidc) = &console.oidc else {
        return Redirect::to("/login").into_response();
    };
    let query = Fields::parse(uri.query().unwrap_or_default().as_bytes());
    let next = query.get("next").filter(|next| is_own_path(next));
    let next = next.filter(|next| next.len() <= NEXT_MAX).unwrap_or("/");

    // The provider sends the browser to the configured name, where it must have the cookie. A proxy
    // may hide that name, so there is one try.
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    if host != Some(oidc.url.authority.as_str()) && !query.is_set("here") {
        let path = format!("{BEGIN}?here=1&next={}", encoded(next));
        return Redirect::to(&oidc.url.join(&path)).into_response();
    }
    let (attempt, url) = match oidc.provider.begin().await {
        Ok(begun) => begun,
        Err(error) => return failed(&console, next, error),
    };
    let login = Login {
        attempt,
        next: next.to_owned(),
        end: now() + LIFETIME_SECS,
    };
    let sealed = oidc.seal(&login).unwrap_or_default();
    let cookie = oidc.cookie(&sealed, LIFETIME_SECS);
    ([(header::SET_COOKIE, cookie)], Redirect::to(&url)).into_response()
}

/// Completes a login with the code of the provider. A login can be completed once.
pub async fn complete(
    State(console): State<Arc<Console>>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let Some(oidc) = &console.oidc else {
        return Redirect::to("/login").into_response();
    };
    let query = Fields::parse(uri.query().unwrap_or_default().as_bytes());
    let login = cookie(&headers, COOKIE).and_then(|sealed| oidc.open(&sealed));
    let next = login.as_ref().map_or("/", |login| login.next.as_str());
    let mut response = match admit(&console, oidc, login.as_ref(), &query).await {
        Ok(person) => welcome(&console, oidc, &headers, &person, next),
        Err(error) => failed(&console, next, error),
    };
    if let Ok(gone) = HeaderValue::from_str(&oidc.cookie("", 0)) {
        response.headers_mut().append(header::SET_COOKIE, gone);
    }
    response
}

/// The person of a completed login.
async fn admit(
    console: &Console,
    oidc: &Oidc,
    login: Option<&Login>,
    query: &Fields,
) -> Result<Person, LoginError> {
    let refused = |why: &'static str| LoginError::Refused(anyhow!(why));
    let Some(Login { attempt, .. }) = login else {
        return Err(refused(
            "the login did not begin in this browser, or took too long",
        ));
    };
    if query.raw("state") != Some(attempt.state.as_str()) {
        return Err(refused(
            "the answer of the provider belongs to another login",
        ));
    }
    let (now, lifetime) = (Instant::now(), Duration::from_secs(LIFETIME_SECS));
    if !console
        .sessions
        .use_once(&attempt.state, now + lifetime, now)
    {
        return Err(refused("the login was completed before"));
    }
    if let Some(error) = query.get("error") {
        let detail = query.get("error_description").unwrap_or_default();
        let error = format!("the provider refused the login: {error} {detail}");
        return Err(LoginError::Refused(anyhow!(error.trim().to_owned())));
    }
    let code = query.raw("code").unwrap_or_default();
    oidc.provider.finish(attempt, code, query.raw("iss")).await
}

/// Begins the session of a person with a role.
fn welcome(
    console: &Console,
    oidc: &Oidc,
    headers: &HeaderMap,
    person: &Person,
    next: &str,
) -> Response {
    let Some(role) = person.role else {
        return without_role(oidc, person);
    };
    tracing::info!(
        actor = person.actor,
        role = role.as_str(),
        "logged in with the provider"
    );
    let caller = Caller::person(person.actor.clone(), person.shown.as_deref(), role);
    let lifetime = oidc.provider.settings().session;
    let id = console.sessions.begin_for(caller, lifetime, Instant::now());
    let mut cookie = session_cookie(headers, &id, lifetime.as_secs());
    if oidc.url.is_https && !cookie.ends_with("; Secure") {
        cookie.push_str("; Secure");
    }
    let next = if is_own_path(next) { next } else { "/" };

    // A redirect would still come from the provider's site, and the browser would not send the
    // strict cookie with it. A refresh comes from this page.
    let body = html! {
        section.panel.login {
            h1 { "Logged in" }
            p { a href=(next) { "Continue" } }
        }
    };
    let page = Page {
        title: "Logged in",
        section: None,
        visitor: None,
        flash: None,
        body,
    };
    let mut response = page.render().into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (header::SET_COOKIE, cookie),
        (header::REFRESH, format!("0; url={next}")),
    ] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.append(name, value);
        }
    }
    response
}

/// The page for a person who is known, and has no role.
fn without_role(oidc: &Oidc, person: &Person) -> Response {
    tracing::warn!(actor = person.actor, "login refused, no role");
    let settings = oidc.provider.settings();
    let body = html! {
        h1 { "No role" }
        section.panel.problem {
            p.lead {
                (text(person.shown.as_deref().unwrap_or(&person.actor)))
                " has no role in this console."
            }
            p { "Identity: " code { (text(&person.actor)) } }
            p {
                "Values of the claim " code { (text(&settings.claim)) } ": "
                @if person.values.is_empty() { "none" }
                @for value in &person.values { code { (text(value)) } " " }
            }
            p { "The administrator can grant a role to one of them with " code { "oidc_roles" } "." }
            p { a href="/login" { "Back to the login" } }
        }
    };
    let page = Page {
        title: "No role",
        section: None,
        visitor: None,
        flash: None,
        body,
    };
    (StatusCode::FORBIDDEN, page.render()).into_response()
}

/// The login page with the reason of a failure. The form for tokens is on it.
fn failed(console: &Console, next: &str, error: LoginError) -> Response {
    let (status, error) = match error {
        LoginError::Unavailable(error) => (StatusCode::SERVICE_UNAVAILABLE, error),
        LoginError::Refused(error) => (StatusCode::FORBIDDEN, error),
    };
    let mut shown = format!("{error:#}");
    for hint in hints(&error) {
        shown.push_str("; ");
        shown.push_str(hint);
    }
    tracing::warn!(reason = shown, "login with the provider failed");
    login::page(console, status, Some(next), Some(&shown))
}

/// The time in seconds since the Unix epoch.
fn now() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.map_or(0, |time| time.as_secs())
}
