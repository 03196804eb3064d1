//! Idempotency keys of requests: an advisory lock while a request is handled, a row after its
//! response.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use crate::model::request::{HttpResponse, RequestKey};
use crate::store::error::Doing as _;
use crate::store::{ClaimedRequest, Result, shared};

/// Claims a key for the transaction. Does not wait for another transaction that has it.
pub(in crate::store) async fn claim(
    session: &mut Session,
    worker: &str,
    request: &RequestKey,
) -> Result<ClaimedRequest> {
    let query = session.query("select * from oncely_definer.claim_request($1, $2, $3, $4, $5, $6)");
    let row = query
        .bind(session.token())
        .bind(worker)
        .bind(&request.route)
        .bind(&request.caller)
        .bind(&request.key)
        .bind(request.fingerprint.as_slice())
        .fetch_optional(session.connection())
        .await
        .doing("claim an idempotency key")?;
    let Some(row) = row else {
        return Ok(ClaimedRequest::Fresh);
    };
    let read = |row: &PgRow| {
        Ok((
            row.try_get("in_flight")?,
            row.try_get("fingerprint_differs")?,
        ))
    };
    let (in_flight, other): (bool, bool) =
        read(&row).doing("read the owner of an idempotency key")?;
    match (in_flight, other) {
        (_, true) => Ok(ClaimedRequest::OtherRequest),
        (true, false) => Ok(ClaimedRequest::InFlight),
        (false, false) => response(&row).map(ClaimedRequest::Answered),
    }
}

fn response(row: &PgRow) -> Result<HttpResponse> {
    let read = || {
        Ok((
            row.try_get("status")?,
            row.try_get("headers")?,
            row.try_get("body")?,
        ))
    };
    let (status, headers, body): (i32, String, Vec<u8>) = read().doing("read a stored response")?;
    shared::stored_response(status.into(), &headers, body)
}

/// Stores the response, and returns whether it is the first one to its key.
pub(in crate::store) async fn store_response(
    session: &mut Session,
    worker: &str,
    request: &RequestKey,
    response: &HttpResponse,
    keep: Duration,
) -> Result<bool> {
    let query = session
        .query("select oncely_definer.store_response($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)");
    let row = query
        .bind(session.token())
        .bind(worker)
        .bind(&request.route)
        .bind(&request.caller)
        .bind(&request.key)
        .bind(request.fingerprint.as_slice())
        .bind(i32::from(response.status))
        .bind(shared::headers_to_text(&response.headers)?)
        .bind(response.body.as_ref())
        .bind(shared::micros(keep))
        .fetch_one(session.connection())
        .await
        .doing("store a response")?;
    row.try_get(0).doing("read whether a response was stored")
}
