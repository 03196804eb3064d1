//! Idempotency keys of requests in the database.

use std::time::Duration;

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
