//! What became of a request's key in the database.

use crate::model::request::HttpResponse;

/// What became of the attempt to claim an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimedRequest {
    /// It is this transaction's.
    Fresh,
    /// It was answered before.
    Answered(HttpResponse),
    /// It belongs to another request: one that was answered, or one that is being handled.
    OtherRequest,
    /// Another transaction handles it just now.
    InFlight,
}
