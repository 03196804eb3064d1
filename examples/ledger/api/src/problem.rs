//! Problem details for refused requests: a stable status and code, and a sentence for people.

use oncely_guest::http::Response;

pub fn account_not_found(id: &str) -> Response {
    Response::problem(
        404,
        "account-not-found",
        &format!("account {id} does not exist"),
    )
}

pub fn account_exists(id: &str) -> Response {
    Response::problem(
        409,
        "account-exists",
        &format!("account {id} already exists"),
    )
}

pub fn invalid_account(reason: &str) -> Response {
    Response::problem(422, "invalid-account", reason)
}

pub fn invalid_amount() -> Response {
    let detail = "an amount is a whole number of minor units (cents) from 1 to 9007199254740991";
    Response::problem(422, "invalid-amount", detail)
}

pub fn same_account() -> Response {
    Response::problem(
        422,
        "same-account",
        "money moves between two different accounts",
    )
}

pub fn currency_mismatch(account: &str, currency: &str, requested: &str) -> Response {
    Response::problem(
        422,
        "currency-mismatch",
        &format!("the currency of {account} is {currency}, not {requested}"),
    )
}

pub fn insufficient_funds(account: &str, available: i64) -> Response {
    Response::problem(
        422,
        "insufficient-funds",
        &format!("{account} can spend {available}"),
    )
}

/// The account has another version than `If-Match` names.
pub fn version_mismatch(account: &str, version: i64) -> Response {
    Response::problem(
        412,
        "version-mismatch",
        &format!("{account} is at version {version}"),
    )
}

/// Other requests changed the account on every try.
pub fn version_conflict(account: &str) -> Response {
    let detail =
        format!("{account} kept changing and nothing was done; retry with a new Idempotency-Key");
    Response::problem(409, "version-conflict", &detail)
}

pub fn transaction_not_found(id: &str) -> Response {
    Response::problem(
        404,
        "transaction-not-found",
        &format!("transaction {id} does not exist"),
    )
}

/// The key is older than the window of its route, but the journal still has the transaction.
pub fn already_posted(id: &str) -> Response {
    Response::problem(
        409,
        "already-posted",
        &format!("this request was carried out before: /transactions/{id}"),
    )
}

/// Like [`already_posted`], for a hold.
pub fn already_held(id: &str) -> Response {
    Response::problem(
        409,
        "already-held",
        &format!("this request was carried out before: hold {id}"),
    )
}

pub fn already_reversed(id: &str) -> Response {
    Response::problem(
        409,
        "already-reversed",
        &format!("transaction {id} is already reversed"),
    )
}

pub fn not_reversible(id: &str) -> Response {
    Response::problem(
        409,
        "not-reversible",
        &format!("{id} is a reversal; make a new transfer"),
    )
}

pub fn hold_not_found(id: &str) -> Response {
    Response::problem(404, "hold-not-found", &format!("hold {id} does not exist"))
}

pub fn hold_not_open(id: &str, state: &str) -> Response {
    Response::problem(409, "hold-not-open", &format!("hold {id} is {state}"))
}
