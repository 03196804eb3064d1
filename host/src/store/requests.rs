//! Idempotency keys of requests in the database.

use crate::model::request::HttpResponse;

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
