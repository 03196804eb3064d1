//! Builds the HTTP response of the server from a handler's response.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;

use crate::guest::header_to_bytes;
use crate::model::request::HttpResponse;

/// The header of a replayed response, with Stripe's name for it.
pub(super) const REPLAYED_HEADER: &str = "idempotent-replayed";

/// Headers of a single connection (RFC 9110 section 7.6.1), and the length, which the server sets.
const HOP_BY_HOP_HEADERS: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
];

/// Statuses whose responses have no body (RFC 9110 sections 15.3.5, 15.3.6 and 15.4.5).
const STATUSES_WITHOUT_BODY: [u16; 3] = [204, 205, 304];

/// Builds the response that is sent. Hop-by-hop headers and invalid headers are dropped.
pub(super) fn respond(from: HttpResponse, replayed: bool) -> Response {
    let body = if STATUSES_WITHOUT_BODY.contains(&from.status) {
        Body::empty()
    } else {
        Body::from(from.body)
    };
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(from.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    for (name, value) in from.headers {
        let name = HeaderName::try_from(name);
        let value = HeaderValue::from_bytes(&header_to_bytes(&value));
        if let (Ok(name), Ok(value)) = (name, value)
            && !HOP_BY_HOP_HEADERS.contains(&name.as_str())
            && name != REPLAYED_HEADER
        {
            headers.append(name, value);
        }
    }
    if replayed {
        headers.insert(REPLAYED_HEADER, HeaderValue::from_static("true"));
    }
    response
}
