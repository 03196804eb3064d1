//! Errors of the console, as a page or as JSON, with the same texts as in the control API.

use anyhow::anyhow;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use maud::html;

use super::page::Page;
use super::parts::{command, text};
use super::visitor::Visitor;
use crate::api::{ApiError, ErrorResponse};
use crate::model::hint::WithHint;

/// A refused request.
pub struct Problem(ApiError);

/// The texts of an error, which the guard shows.
#[derive(Clone)]
pub struct ProblemBody {
    error: String,
    causes: Vec<String>,
    hints: Vec<String>,
}

impl Problem {
    /// A refusal with the next step.
    pub fn refused(status: StatusCode, error: &str, hint: &str) -> Self {
        Problem(ApiError(
            status,
            anyhow!(error.to_owned()).hint(hint.to_owned()),
        ))
    }

    /// A page that does not exist.
    pub fn not_found(error: String, hint: &str) -> Self {
        Problem(ApiError(
            StatusCode::NOT_FOUND,
            anyhow!(error).hint(hint.to_owned()),
        ))
    }

    /// The error with its causes, in a line.
    pub fn line(&self) -> String {
        format!("{:#}", self.0.1)
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Problem(error)
    }
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        Problem(error.into())
    }
}

impl From<crate::store::StoreError> for Problem {
    fn from(error: crate::store::StoreError) -> Self {
        Problem(error.into())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let ErrorResponse {
            error,
            causes,
            hints,
        } = ErrorResponse::from(&self.0.1);
        let mut response = self.0.0.into_response();
        response.extensions_mut().insert(ProblemBody {
            error,
            causes,
            hints,
        });
        response
    }
}

impl ProblemBody {
    /// The response to a visitor.
    pub fn show(self, status: StatusCode, visitor: Option<&Visitor>, is_json: bool) -> Response {
        let ProblemBody {
            error,
            causes,
            hints,
        } = self;
        if is_json {
            let body = ErrorResponse {
                error,
                causes,
                hints,
            };
            return (status, Json(body)).into_response();
        }
        let title = status.canonical_reason().unwrap_or("Error");
        let body = html! {
            h1 { (title) }
            section.panel.problem {
                p.lead { (text(&error)) }
                @if !causes.is_empty() {
                    ul { @for cause in &causes { li { (text(cause)) } } }
                }
                @for hint in &hints {
                    @if hint.starts_with("oncely ") { (command(hint)) }
                    @else { p { (text(hint)) } }
                }
                p { a href="/" { "Back to the overview" } }
            }
        };
        let page = Page {
            title,
            section: None,
            visitor,
            flash: None,
            body,
        };
        (status, page.render()).into_response()
    }
}
