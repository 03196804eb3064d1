//! Accounts: opening, reading, and versioned changes.

use oncely_guest::http::{Request, Response};
use oncely_guest::prelude::*;
use serde_json::json;

use crate::problem;

/// The number of tries for a change while other requests change the same account.
const TRIES: u32 = 5;

/// Entries per page of a statement.
const PAGE: usize = 50;

#[derive(Serialize)]
pub struct Account {
    pub id: String,
    pub currency: String,
    /// In minor units, as all amounts are.
    pub balance: i64,
    /// The sum of the open holds, which cannot be spent.
    pub held: i64,
    /// The amount by which the balance may be negative; none for an account without limit.
    pub overdraft_limit: Option<i64>,
    /// Incremented with each change.
    pub version: i64,
}

/// The body of `POST /accounts`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Opening {
    id: String,
    currency: String,
    /// 0 when absent; null for an account without limit.
    #[serde(default = "no_overdraft")]
    overdraft_limit: Option<i64>,
}

fn no_overdraft() -> Option<i64> {
    Some(0)
}

pub fn open(request: &Request) -> Result<Response, Response> {
    let Opening {
        id,
        currency,
        overdraft_limit,
    } = request.json()?;
    if id.is_empty()
        || id.len() > 64
        || !id
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    {
        return Err(problem::invalid_account(
            "an id has 1 to 64 characters of a-z, 0-9 and -",
        ));
    }
    if currency.len() != 3 || !currency.bytes().all(|b| b.is_ascii_uppercase()) {
        return Err(problem::invalid_account(
            "a currency is a three-character code, such as EUR",
        ));
    }
    if overdraft_limit.is_some_and(|limit| !(0..=1 << 53).contains(&limit)) {
        return Err(problem::invalid_account(
            "an overdraft limit must not be negative; null means no limit",
        ));
    }
    if find(&id)?.is_some() {
        return Err(problem::account_exists(&id));
    }
    let insert = "insert into account (id, currency, overdraft_limit) values ($1, $2, $3) on conflict do nothing";
    match sql::execute(insert, params![id, currency, overdraft_limit])? {
        0 => Err(problem::account_exists(&id)),
        _ => Ok(response(201, &require(&id)?)),
    }
}

pub fn show(id: &str) -> Result<Response, Response> {
    Ok(response(200, &require(id)?))
}

/// A response with an account. Its `ETag` is the version for `If-Match`.
fn response(status: u16, account: &Account) -> Response {
    Response::json(status, account).header("etag", format!("\"{}\"", account.version))
}

/// The entries, newest first. `?before=VERSION` is the next page.
pub fn statement(request: &Request, id: &str) -> Result<Response, Response> {
    let account = require(id)?;
    let before: i64 = request
        .query("before")
        .and_then(|before| before.parse().ok())
        .unwrap_or(i64::MAX);
    let rows = sql::query(
        "select entry.version, entry.amount, balance, posted.id, kind, at, note,
             case account when debit then credit else debit end as counterpart
         from entry join posted on posted.id = transaction_id
         where account = $1 and version < $2 order by version desc limit $3",
        params![id, before, PAGE as i64],
    )?;
    let entries = rows.iter().map(entry_json).collect::<Result<Vec<_>, _>>()?;
    let next = match rows.last() {
        Some(last) if rows.len() == PAGE => Some(format!(
            "/accounts/{id}/statement?before={}",
            last.get::<i64>("version")?
        )),
        _ => None,
    };
    let statement = json!({ "account": account, "entries": entries, "next": next });
    Ok(Response::json(200, &statement).header("etag", format!("\"{}\"", account.version)))
}

fn entry_json(row: &sql::Row) -> Result<serde_json::Value, sql::ColumnError> {
    Ok(json!({
        "transaction": row.get::<String>("id")?,
        "kind": row.get::<String>("kind")?,
        "at": row.get::<String>("at")?,
        "counterpart": row.get::<String>("counterpart")?,
        "note": row.get::<Option<String>>("note")?,
        "amount": row.get::<i64>("amount")?,
        "balance": row.get::<i64>("balance")?,
        "version": row.get::<i64>("version")?,
    }))
}

/// Calls `decide` with an account, and then takes its next version, and that of the payee if money
/// moves.
///
/// This is optimistic locking: no row is locked during the decision. If another request changed the
/// account meanwhile, it is read and decided again. From the end of this function to the end of the
/// request no other request can change either account.
pub fn take_version(
    request: &Request,
    id: &str,
    payee: Option<&str>,
    decide: impl Fn(&Account) -> Result<(), Response>,
) -> Result<(), Response> {
    for _ in 0..TRIES {
        let account = require(id)?;
        check_version(request, &account)?;
        decide(&account)?;
        if next_versions(&account, payee)? {
            return Ok(());
        }
        log::info!("account {id} changed concurrently, retrying");
    }
    Err(problem::version_conflict(id))
}

/// `If-Match: "7"` restricts the request to the version that the client read.
fn check_version(request: &Request, account: &Account) -> Result<(), Response> {
    match request.header("if-match") {
        Some(seen) if seen != "*" && seen.trim_matches('"') != account.version.to_string() => {
            Err(problem::version_mismatch(&account.id, account.version))
        }
        _ => Ok(()),
    }
}

/// Increments the versions of both accounts and invalidates their cached responses. Returns false,
/// and changes nothing, when the account has another version by now. The version of the payee does
/// not matter, because the decision does not depend on it.
///
/// PostgreSQL locks the rows in the order of their ids, so two requests that pay each other do not
/// deadlock. SQLite has one writer at a time.
fn next_versions(account: &Account, payee: Option<&str>) -> Result<bool, Response> {
    let lock = match sql::dialect() {
        sql::Dialect::Postgres => "for no key update",
        sql::Dialect::Sqlite => "",
    };
    let statement = format!(
        "with taken as materialized (
             select id from account where (id = $1 and version = $2) or id = $3 order by id {lock}
         )
         update account set version = version + 1
         where id in (select id from taken) and exists (select 1 from taken where id = $1)"
    );
    let is_taken = sql::execute(&statement, params![account.id, account.version, payee])? > 0;
    if is_taken {
        let changed: Vec<String> = std::iter::once(account.id.as_str())
            .chain(payee)
            .map(|id| format!("account:{id}"))
            .collect();
        cache::invalidate(&changed)?;
    }
    Ok(is_taken)
}

pub fn require(id: &str) -> Result<Account, Response> {
    find(id)?.ok_or_else(|| problem::account_not_found(id))
}

fn find(id: &str) -> Result<Option<Account>, Response> {
    let select =
        "select id, currency, balance, held, overdraft_limit, version from account where id = $1";
    let Some(row) = sql::query_optional(select, params![id])? else {
        return Ok(None);
    };
    Ok(Some(Account {
        id: row.get("id")?,
        currency: row.get("currency")?,
        balance: row.get("balance")?,
        held: row.get("held")?,
        overdraft_limit: row.get("overdraft_limit")?,
        version: row.get("version")?,
    }))
}

impl Account {
    /// Checks that the account can spend `amount`.
    pub fn check_funds(&self, amount: i64) -> Result<(), Response> {
        let Some(limit) = self.overdraft_limit else {
            return Ok(());
        };
        let available = self.balance - self.held + limit;
        if amount > available {
            Err(problem::insufficient_funds(&self.id, available))
        } else {
            Ok(())
        }
    }

    pub fn check_currency(&self, currency: &str) -> Result<(), Response> {
        if self.currency == currency {
            return Ok(());
        }
        Err(problem::currency_mismatch(
            &self.id,
            &self.currency,
            currency,
        ))
    }
}
