//! Idempotency keys of requests: one row per answered request. There is one writer, so none is ever
//! in flight here.

use jiff::Timestamp;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::session::Session;
use crate::model::request::RequestKey;
use crate::store::error::Doing as _;
use crate::store::{ClaimedRequest, KeptResponse, Result, shared};

/// The stored response to each key, if any.
pub(in crate::store) async fn claim(
    session: &mut Session,
    worker: &str,
    requests: &[&RequestKey],
) -> Result<Vec<ClaimedRequest>> {
    let mut claimed = Vec::with_capacity(requests.len());
    for request in requests {
        claimed.push(claim_one(session, worker, request).await?);
    }
    Ok(claimed)
}

async fn claim_one(
    session: &mut Session,
    worker: &str,
    request: &RequestKey,
) -> Result<ClaimedRequest> {
    let row = sqlx::query(
        "select fingerprint, status, headers, body from oncely_request
         where worker = $1 and route = $2 and caller = $3 and key = $4 and expires_at > $5",
    )
    .bind(worker)
    .bind(&request.route)
    .bind(&request.caller)
    .bind(&request.key)
    .bind(Timestamp::now().as_microsecond())
    .fetch_optional(session.connection().doing("claim an idempotency key")?)
    .await
    .doing("claim an idempotency key")?;
    let Some(row) = row else {
        return Ok(ClaimedRequest::Fresh);
    };
    let read = |row: &SqliteRow| {
        Ok((
            row.try_get(0)?,
            row.try_get(1)?,
            row.try_get(2)?,
            row.try_get(3)?,
        ))
    };
    let (fingerprint, status, headers, body): (Vec<u8>, i64, String, Vec<u8>) =
        read(&row).doing("read a stored response")?;
    if fingerprint != request.fingerprint {
        return Ok(ClaimedRequest::OtherRequest);
    }
    shared::stored_response(status, &headers, body).map(ClaimedRequest::Answered)
}

/// Stores responses. Returns false if another transaction answered one of the keys.
pub(in crate::store) async fn store_responses(
    session: &mut Session,
    worker: &str,
    responses: &[KeptResponse<'_>],
) -> Result<bool> {
    for kept in responses {
        if !store_response(session, worker, kept).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn store_response(
    session: &mut Session,
    worker: &str,
    kept: &KeptResponse<'_>,
) -> Result<bool> {
    let KeptResponse {
        request,
        response,
        keep,
    } = *kept;
    let now = Timestamp::now().as_microsecond();
    let written = sqlx::query(
        "insert into oncely_request (worker, route, caller, key, fingerprint, status, headers, body, answered_at, expires_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         on conflict (worker, route, caller, key) do update
             set fingerprint = excluded.fingerprint, status = excluded.status, headers = excluded.headers,
                 body = excluded.body, answered_at = excluded.answered_at, expires_at = excluded.expires_at
             where oncely_request.expires_at <= excluded.answered_at",
    )
    .bind(worker)
    .bind(&request.route)
    .bind(&request.caller)
    .bind(&request.key)
    .bind(request.fingerprint.as_slice())
    .bind(i64::from(response.status))
    .bind(shared::headers_to_text(&response.headers)?)
    .bind(response.body.as_ref())
    .bind(now)
    .bind(now.saturating_add(shared::micros(keep)))
    .execute(session.connection().doing("store a response")?)
    .await
    .doing("store a response")?;
    Ok(written.rows_affected() == 1)
}
