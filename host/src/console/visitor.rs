//! The person who requests a page, and the form in which the answer is wanted.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use maud::{Markup, html};
use serde::Serialize;

use super::Console;
use super::fields::Fields;
use super::identity::{Flash, Session};
use super::page::{Page, Section};
use super::problem::Problem;
use crate::api::{Caller, StatedBy};

/// The answer of a page.
pub type Answer = Result<Response, Problem>;

/// A person who is logged in, and the request.
#[derive(Debug, Clone)]
pub struct Visitor {
    /// The holder of the token that logged in.
    pub caller: Caller,
    /// The session; none for a token in the header.
    session: Option<(String, String)>,
    actor: Option<String>,
    flash: Option<Flash>,
    is_json: bool,
    /// The query of the page.
    pub query: Fields,
}

impl Visitor {
    /// The visitor with a cookie.
    pub fn of_session(
        id: String,
        session: Session,
        flash: Option<Flash>,
        is_json: bool,
        uri: &Uri,
    ) -> Self {
        Visitor {
            caller: session.caller,
            session: Some((id, session.csrf)),
            actor: session.actor,
            flash,
            is_json,
            query: Fields::parse(uri.query().unwrap_or_default().as_bytes()),
        }
    }

    /// The visitor with a token, who can only read.
    pub fn of_token(caller: Caller, is_json: bool, uri: &Uri) -> Self {
        Visitor {
            caller,
            session: None,
            actor: None,
            flash: None,
            is_json,
            query: Fields::parse(uri.query().unwrap_or_default().as_bytes()),
        }
    }

    /// Whether a form belongs to this session. Tokens of forms are random, and as long as ids of
    /// sessions.
    pub fn owns_form(&self, given: &str) -> bool {
        self.session.as_ref().is_some_and(|(_, csrf)| {
            // Compare all bytes, so the timing reveals nothing.
            let pairs = csrf.bytes().zip(given.bytes());
            csrf.len() == given.len() && pairs.fold(0, |all, (a, b)| all | (a ^ b)) == 0
        })
    }

    /// Whether the request prefers JSON.
    pub fn is_json(&self) -> bool {
        self.is_json
    }

    /// Answers with JSON or with a page, as the request wants. Both show the same `view`.
    pub fn answer<V: Serialize>(
        &self,
        section: Section,
        title: &str,
        view: &V,
        body: impl FnOnce(&V) -> Markup,
    ) -> Answer {
        if self.is_json {
            return Ok(Json(view).into_response());
        }
        Ok(self.page(section, title, body(view)))
    }

    /// Answers with a page that has no JSON, such as a form.
    pub fn page(&self, section: Section, title: &str, body: Markup) -> Response {
        let page = Page {
            title,
            section: Some(section),
            visitor: Some(self),
            flash: self.flash.as_ref(),
            body,
        };
        page.render().into_response()
    }

    /// Answers with a page that asks for a correction.
    pub fn refusal(&self, section: Section, title: &str, text: &str, body: Markup) -> Response {
        let flash = Flash {
            is_error: true,
            text: text.to_owned(),
        };
        let page = Page {
            title,
            section: Some(section),
            visitor: Some(self),
            flash: Some(&flash),
            body,
        };
        (StatusCode::UNPROCESSABLE_ENTITY, page.render()).into_response()
    }

    /// Sends the visitor to another page, which shows the result of an action once.
    pub fn go(&self, console: &Console, to: &str, result: Result<String, String>) -> Answer {
        let (is_error, text) = match result {
            Ok(text) => (false, text),
            Err(text) => (true, text),
        };
        if let Some((id, _)) = &self.session {
            let flash = Flash { is_error, text };
            console.sessions.leave(id, flash, self.actor.clone());
        }
        Ok(Redirect::to(to).into_response())
    }

    /// The hidden field of each form.
    pub fn form_token(&self) -> Markup {
        let csrf = self.session.as_ref().map(|(_, csrf)| csrf.as_str());
        html! { input type="hidden" name="csrf" value=(csrf.unwrap_or_default()); }
    }

    /// The name that a form proposes for the audit.
    pub fn actor(&self) -> &str {
        let name = match self.caller.is_person {
            true => self.caller.actor.stated_name.as_deref(),
            false => self.actor.as_deref(),
        };
        name.unwrap_or(&self.caller.actor.name)
    }

    /// The name of this session, for actions whose form asks for none.
    pub fn stated(&self) -> StatedBy {
        StatedBy {
            actor: self.actor.clone(),
            note: None,
        }
    }

    /// The name and the note of a form. Later forms of the session propose the same name.
    pub fn attribution(&mut self, fields: &Fields) -> StatedBy {
        if !self.caller.is_person
            && let Some(actor) = fields.text("actor")
        {
            self.actor = Some(actor);
        }
        StatedBy {
            actor: Some(self.actor().to_owned()),
            note: fields.text("note"),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Visitor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let visitor = parts.extensions.get().cloned();
        visitor.ok_or_else(|| {
            let hint = "log in at /login";
            Problem::refused(StatusCode::UNAUTHORIZED, "not logged in", hint)
        })
    }
}

/// Whether a request prefers JSON to HTML.
pub fn wants_json(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let place = |kind: &str| accept.find(kind);
    match (place("application/json"), place("text/html")) {
        (Some(json), Some(html)) => json < html,
        (json, _) => json.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn json_is_sent_to_requests_that_prefer_it() {
        let wants = |accept| {
            let value = HeaderValue::from_static(accept);
            wants_json(&[(header::ACCEPT, value)].into_iter().collect())
        };
        assert!(wants("application/json"));
        assert!(wants("application/json, text/plain, */*"));
        assert!(!wants("text/html,application/xhtml+xml,*/*;q=0.8"));
        assert!(!wants("text/html, application/json;q=0.5"));
        assert!(!wants("*/*"));
    }
}
