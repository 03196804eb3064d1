//! Why a request is refused: problem details with a status and a code that stay, and a sentence for people.

use oncely_guest::http::Response;

pub fn account_not_found(id: &str) -> Response {
    Response::problem(
        404,
        "account-not-found",
        &format!("there is no account {id}"),
    )
}

pub fn account_exists(id: &str) -> Response {
    Response::problem(
        409,
        "account-exists",
        &format!("there is an account {id} already"),
    )
}

pub fn invalid_account(why: &str) -> Response {
    Response::problem(422, "invalid-account", why)
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

pub fn currency_mismatch(account: &str, has: &str, asked: &str) -> Response {
    Response::problem(
        422,
        "currency-mismatch",
        &format!("{account} is an account in {has}, not in {asked}"),
    )
}

pub fn insufficient_funds(account: &str, available: i64) -> Response {
    Response::problem(
        422,
        "insufficient-funds",
        &format!("{account} can spend {available}"),
    )
}

/// Another version than the one that `If-Match` names.
pub fn version_mismatch(account: &str, version: i64) -> Response {
    Response::problem(
        412,
        "version-mismatch",
        &format!("{account} is at version {version} now"),
    )
}

/// Others were quicker, several times.
pub fn version_conflict(account: &str) -> Response {
    let detail = format!(
        "{account} kept changing, and nothing was done; ask again with a new Idempotency-Key"
    );
    Response::problem(409, "version-conflict", &detail)
}

pub fn transaction_not_found(id: &str) -> Response {
    Response::problem(
        404,
        "transaction-not-found",
        &format!("there is no transaction {id}"),
    )
}

/// The key is older than the window of its route, but the journal does not forget.
pub fn already_posted(id: &str) -> Response {
    Response::problem(
        409,
        "already-posted",
        &format!("this request was done long ago: /transactions/{id}"),
    )
}

/// Like [`already_posted`], for a hold.
pub fn already_held(id: &str) -> Response {
    Response::problem(
        409,
        "already-held",
        &format!("this request was done long ago: hold {id}"),
    )
}

pub fn already_reversed(id: &str) -> Response {
    Response::problem(
        409,
        "already-reversed",
        &format!("transaction {id} was reversed before"),
    )
}

pub fn not_reversible(id: &str) -> Response {
    Response::problem(
        409,
        "not-reversible",
        &format!("{id} is a reversal itself; make a new transfer"),
    )
}

pub fn hold_not_found(id: &str) -> Response {
    Response::problem(404, "hold-not-found", &format!("there is no hold {id}"))
}

pub fn hold_not_open(id: &str, state: &str) -> Response {
    Response::problem(409, "hold-not-open", &format!("hold {id} is {state}"))
}
