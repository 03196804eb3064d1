//! Idempotency keys of requests: an advisory lock while a request is handled, a row after its
//! response.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::session::Session;
use crate::model::request::{HttpResponse, RequestKey};
use crate::store::error::Doing as _;
use crate::store::{ClaimedRequest, KeptResponse, Result, shared};

/// Claims keys for the transaction. Does not wait for another transaction that has one.
pub(in crate::store) async fn claim(
    session: &mut Session,
    worker: &str,
    requests: &[&RequestKey],
) -> Result<Vec<ClaimedRequest>> {
    let query =
        session.query("select * from oncely_definer.claim_requests($1, $2, $3, $4, $5, $6)");
    let rows = query
        .bind(session.token())
        .bind(worker)
        .bind(column(requests, |request| request.route.as_str()))
        .bind(column(requests, |request| request.caller.as_str()))
        .bind(column(requests, |request| request.key.as_str()))
        .bind(column(requests, |request| request.fingerprint.as_slice()))
        .fetch_all(session.connection())
        .await
        .doing("claim idempotency keys")?;
    let mut claimed = vec![ClaimedRequest::Fresh; requests.len()];
    for row in &rows {
        let place: i32 = row.try_get("place").doing("read a claimed key")?;
        let place = usize::try_from(place - 1).unwrap_or(usize::MAX);
        if let Some(claimed) = claimed.get_mut(place) {
            *claimed = not_fresh(row)?;
        }
    }
    Ok(claimed)
}

fn column<'a, T>(requests: &[&'a RequestKey], value: impl Fn(&'a RequestKey) -> T) -> Vec<T> {
    requests.iter().map(|request| value(request)).collect()
}

/// Reads the owner of a key that is not free.
fn not_fresh(row: &PgRow) -> Result<ClaimedRequest> {
    let read = |row: &PgRow| {
        Ok((
            row.try_get("in_flight")?,
            row.try_get("fingerprint_differs")?,
        ))
    };
    let (in_flight, other): (bool, bool) =
        read(row).doing("read the owner of an idempotency key")?;
    match (in_flight, other) {
        (_, true) => Ok(ClaimedRequest::OtherRequest),
        (true, false) => Ok(ClaimedRequest::InFlight),
        (false, false) => response(row).map(ClaimedRequest::Answered),
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

/// Stores responses, and returns whether each is the first one to its key.
pub(in crate::store) async fn store_responses(
    session: &mut Session,
    worker: &str,
    responses: &[KeptResponse<'_>],
) -> Result<bool> {
    let keys: Vec<&RequestKey> = responses.iter().map(|kept| kept.request).collect();
    let headers = responses
        .iter()
        .map(|kept| shared::headers_to_text(&kept.response.headers))
        .collect::<Result<Vec<_>>>()?;
    let statuses = responses.iter().map(|kept| i32::from(kept.response.status));
    let bodies = responses.iter().map(|kept| kept.response.body.as_ref());
    let query = session
        .query("select oncely_definer.store_responses($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)");
    let row = query
        .bind(session.token())
        .bind(worker)
        .bind(column(&keys, |request| request.route.as_str()))
        .bind(column(&keys, |request| request.caller.as_str()))
        .bind(column(&keys, |request| request.key.as_str()))
        .bind(column(&keys, |request| request.fingerprint.as_slice()))
        .bind(statuses.collect::<Vec<_>>())
        .bind(headers)
        .bind(bodies.collect::<Vec<&[u8]>>())
        .bind(
            responses
                .iter()
                .map(|kept| shared::micros(kept.keep))
                .collect::<Vec<_>>(),
        )
        .fetch_one(session.connection())
        .await
        .doing("store responses")?;
    let stored: i64 = row
        .try_get(0)
        .doing("read how many responses were stored")?;
    Ok(usize::try_from(stored) == Ok(responses.len()))
}
