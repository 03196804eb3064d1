//! Idempotency keys of requests in the database.

use std::time::Duration;

use jiff::Timestamp;

use super::db::{Db, Param, Sql};
use super::{Result, rows};
use crate::model::request::{HttpResponse, RequestKey};

/// The result of claiming an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimedRequest {
    /// Claimed by this transaction.
    Fresh,
    /// Answered before, with this response.
    Answered(HttpResponse),
    /// The key belongs to another request, answered or in flight.
    OtherRequest,
    /// Another transaction is handling the same request.
    InFlight,
}

/// A response to be stored for a claimed key.
#[derive(Debug, Clone, Copy)]
pub struct KeptResponse<'a> {
    /// The key, claimed by this transaction.
    pub request: &'a RequestKey,
    /// The response of its request.
    pub response: &'a HttpResponse,
    /// For how long it is kept at least.
    pub keep: Duration,
}

/// An answered request, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestRecord {
    /// A digest of the caller; empty for an unidentified one.
    pub caller: String,
    /// When the response was stored.
    pub answered_at: Timestamp,
    /// When the key becomes free again.
    pub expires_at: Timestamp,
    /// The response that a repeated request gets.
    pub response: HttpResponse,
}

/// The most callers of one key that are read.
const CALLERS_MAX: i64 = 20;

/// The answered requests with an idempotency key on a route, of all callers, newest first.
pub(super) async fn find(
    db: &mut Db,
    worker: &str,
    route: &str,
    key: &str,
) -> Result<Vec<RequestRecord>> {
    let sql = Sql {
        postgres: "select caller, status, headers, body,
             (extract(epoch from answered_at) * 1000000)::bigint as answered_at,
             (extract(epoch from expires_at) * 1000000)::bigint as expires_at
         from oncely.request where worker = $1 and route = $2 and key = $3
         order by answered_at desc limit $4",
        sqlite: "select caller, status, headers, body, answered_at, expires_at
         from oncely_request where worker = $1 and route = $2 and key = $3
         order by answered_at desc limit $4",
        doing: "find an idempotency key",
    };
    let params = [
        Param::Text(worker),
        Param::Text(route),
        Param::Text(key),
        Param::Int(CALLERS_MAX),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::request))
}
