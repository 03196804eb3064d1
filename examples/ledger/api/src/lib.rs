//! A double-entry ledger over HTTP: accounts, transfers, holds, reversals.
//!
//! A request is one transaction with its idempotency key, its rows, its event and its answer. An answer of 400 and above takes
//! all of that back, so `?` may stand anywhere. What must hold whatever this code does is in `migrations/`, where the database
//! enforces it; here it is checked first, to say no in words.

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
            "there is nothing at this path",
        )),
    }
}
