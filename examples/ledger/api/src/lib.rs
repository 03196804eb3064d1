//! A double-entry ledger over HTTP: accounts, transfers, holds, reversals.
//!
//! Each request is one transaction with its idempotency key, rows, event and response. A response
//! of 400 or above rolls all of it back, so `?` may be used anywhere. The invariants are in
//! `migrations/`, where the database enforces them. This code checks them first, to return a clear
//! error.

mod accounts;
mod holds;
mod journal;
mod problem;
mod transfers;

use oncely_guest::http::{Request, Response};

oncely_guest::http_handler!(handle);

fn handle(request: Request) -> Result<Response, Response> {
    let path: Vec<&str> = request.segments().collect();
    match (request.method.as_str(), path.as_slice()) {
        ("POST", ["accounts"]) => accounts::open(&request),
        ("GET", ["accounts", id]) => accounts::show(id),
        ("GET", ["accounts", id, "statement"]) => accounts::statement(&request, id),
        ("POST", ["transfers"]) => transfers::transfer(&request),
        ("GET", ["transactions", id]) => transfers::show(id),
        ("POST", ["transactions", id, "reversal"]) => transfers::reverse(&request, id),
        ("POST", ["holds"]) => holds::place(&request),
        ("POST", ["holds", id, "capture"]) => holds::capture(&request, id),
        ("POST", ["holds", id, "release"]) => holds::release(&request, id),
        _ => Err(Response::problem(
            404,
            "no-such-path",
            "this path does not exist",
        )),
    }
}
