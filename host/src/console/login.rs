//! Login with a token or with a code, and logout.

use std::sync::Arc;
use std::time::Instant;

use anyhow::anyhow;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use maud::html;
use serde::{Deserialize, Serialize};

use super::Console;
use super::fields::Fields;
use super::guard::{identify, session_cookie, session_id};
use super::identity::{Flash, SESSION_LIFETIME};
use super::page::Page;
use crate::api::{ApiError, ApiResult, Caller, bearer_token};
use crate::model::hint::WithHint as _;

/// The form. With a valid code it logs in at once.
pub async fn form(State(console): State<Arc<Console>>, headers: HeaderMap, uri: Uri) -> Response {
    let query = Fields::parse(uri.query().unwrap_or_default().as_bytes());
    if let Some(code) = query.get("code") {
        return match console.sessions.redeem(code, Instant::now()) {
            Some(caller) => begin(&console, &headers, caller, "/"),
            // The link was used, and its session may still be the one of this browser.
            None if is_logged_in(&console, &headers) => Redirect::to("/").into_response(),
            None => page(
                &console,
                StatusCode::FORBIDDEN,
                query.get("next"),
                Some("the link was used before, or is too old"),
            ),
        };
    }
    page(&console, StatusCode::OK, query.get("next"), None)
}

/// Checks the token of the form.
pub async fn log_in(
    State(console): State<Arc<Console>>,
    headers: HeaderMap,
    fields: Fields,
) -> Response {
    match identify(&console, fields.get("token").unwrap_or_default()).await {
        Ok(Some(caller)) => {
            let next = fields.get("next").filter(|next| is_own_path(next));
            begin(&console, &headers, caller, next.unwrap_or("/"))
        }
        Err(problem) => problem.into_response(),
        Ok(None) => page(
            &console,
            StatusCode::FORBIDDEN,
            fields.get("next"),
            Some("the token is wrong"),
        ),
    }
}

/// A link that logs in once.
#[derive(Debug, Serialize, Deserialize)]
pub struct LoginLink {
    /// An address; from the host its path and query only.
    pub url: String,
}

/// A link for the holder of a token, who may not want to type it.
pub async fn link(State(console): State<Arc<Console>>, headers: HeaderMap) -> ApiResult<LoginLink> {
    let Some(caller) = console.authenticator.caller(bearer_token(&headers)).await? else {
        let error = anyhow!("the token is missing or wrong")
            .hint("pass a token with --token or ONCELY_TOKEN");
        return Err(ApiError(StatusCode::UNAUTHORIZED, error));
    };
    let url = console.login_path(caller);
    Ok(Json(LoginLink { url }))
}

/// Ends the session.
pub async fn log_out(State(console): State<Arc<Console>>, headers: HeaderMap) -> Response {
    if let Some(id) = session_id(&headers) {
        console.sessions.end(&id);
    }
    let cookie = session_cookie(&headers, "", 0);
    ([(header::SET_COOKIE, cookie)], Redirect::to("/login")).into_response()
}

fn is_logged_in(console: &Console, headers: &HeaderMap) -> bool {
    session_id(headers)
        .is_some_and(|id| console.sessions.find(&id, false, Instant::now()).is_some())
}

/// Begins a session with a new id, so an id that was known before is worth nothing.
fn begin(console: &Console, headers: &HeaderMap, caller: Caller, next: &str) -> Response {
    let id = console.sessions.begin(caller, Instant::now());
    let cookie = session_cookie(headers, &id, SESSION_LIFETIME.as_secs());
    ([(header::SET_COOKIE, cookie)], Redirect::to(next)).into_response()
}

/// Whether a path leads to this console: a browser reads `//` and `/\` as the start of a host.
pub fn is_own_path(path: &str) -> bool {
    path.starts_with('/')
        && !path.starts_with("//")
        && !path.contains('\\')
        && !path.contains(char::is_control)
}

/// The page with the form, which returns to `next`, and with the link to the provider.
pub fn page(
    console: &Console,
    status: StatusCode,
    next: Option<&str>,
    error: Option<&str>,
) -> Response {
    let flash = error.map(|error| Flash {
        is_error: true,
        text: error.to_owned(),
    });
    let body = html! {
        section.panel.login {
            h1 { span.mark aria-hidden="true" {} "Oncely" }
            form action="/login" method="post" {
                input type="hidden" name="next" value=(next.unwrap_or_default());
                label for="token" { "Token" }
                input #token type="password" name="token" required autofocus
                    autocomplete="current-password" aria-describedby="token-help";
                p.help #token-help {
                    "One of " code { "oncely token create" } ", or the host's own, which is in the "
                    "file " code { "host.json" } " of its data folder."
                }
                button type="submit" { "Log in" }
            }
            @if let Some(oidc) = &console.oidc { (oidc.link(next)) }
        }
    };
    let page = Page {
        title: "Log in",
        section: None,
        visitor: None,
        flash: flash.as_ref(),
        body,
    };
    (status, page.render()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_returns_to_pages_of_this_console_only() {
        for path in ["/", "/failures?worker=a", "/dead-letters/7"] {
            assert!(is_own_path(path), "{path}");
        }
        for path in [
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "x",
            "/a\nb",
        ] {
            assert!(!is_own_path(path), "{path}");
        }
    }
}
