//! Accounts: opened, shown, and changed by one request at a time.

use oncely_guest::http::{Request, Response};
use oncely_guest::prelude::*;
use serde_json::json;

use crate::problem;

/// How often a change is tried while others change the same account.
const TRIES: u32 = 5;

/// Entries on a page of a statement.
const PAGE: usize = 50;

#[derive(Serialize)]
pub struct Account {
    pub id: String,
    pub currency: String,
    /// In minor units, as all amounts.
    pub balance: i64,
    /// What open holds keep from being spent.
    pub held: i64,
    /// How far below zero it may go; none for an account without limit.
    pub overdraft_limit: Option<i64>,
    /// One more with each change.
    pub version: i64,
}

/// The body of `POST /accounts`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Opening {
    id: String,
    currency: String,
    /// 0 when it is not there; null for an account without limit.
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
            "an id is 1 to 64 of a-z, 0-9 and -",
        ));
    }
    if currency.len() != 3 || !currency.bytes().all(|b| b.is_ascii_uppercase()) {
        return Err(problem::invalid_account(
            "a currency is three letters, such as EUR",
        ));
    }
    if overdraft_limit.is_some_and(|limit| !(0..=1 << 53).contains(&limit)) {
        return Err(problem::invalid_account(
            "an overdraft limit is not negative; null means that there is none",
        ));
    }
    if find(&id)?.is_some() {
        return Err(problem::account_exists(&id));
    }
    let insert = "insert into account (id, currency, overdraft_limit) values ($1, $2, $3) on conflict do nothing";
    match sql::execute(insert, params![id, currency, overdraft_limit])? {
        0 => Err(problem::account_exists(&id)),
        _ => Ok(answer(201, &require(&id)?)),
    }
}

pub fn show(id: &str) -> Result<Response, Response> {
    Ok(answer(200, &require(id)?))
}

/// An answer that is an account; its `ETag` is the version that `If-Match` takes.
pub fn answer(status: u16, account: &Account) -> Response {
    Response::json(status, account).header("etag", format!("\"{}\"", account.version))
}

/// The newest entries first; `?before=VERSION` goes on where the last page ended.
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

/// Lets `decide` look at an account, and then takes its next version, and the next one of the payee where money moves.
///
/// This is optimistic locking: nothing is locked while it is decided, and if somebody else changed the account meanwhile, it
/// is read and decided again. From here to the end of the request nobody else changes either account.
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
        log::info!("{id} was changed by another request; trying again");
    }
    Err(problem::version_conflict(id))
}

/// A client that says which version it saw (`If-Match: "7"`) wants no other.
fn check_version(request: &Request, account: &Account) -> Result<(), Response> {
    match request.header("if-match") {
        Some(seen) if seen != "*" && seen.trim_matches('"') != account.version.to_string() => {
            Err(problem::version_mismatch(&account.id, account.version))
        }
        _ => Ok(()),
    }
}

/// False when the account is not at that version any more; then nothing changed. What is cached of both is out of date once
/// the request has committed. Nothing was decided on the payee, so its
/// version does not matter.
///
/// PostgreSQL locks the rows in the order of their ids: two requests that pay each other do not wait for each other. SQLite
/// has one writer at a time.
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
    let taken = sql::execute(&statement, params![account.id, account.version, payee])? > 0;
    if taken {
        let changed: Vec<String> = std::iter::once(account.id.as_str())
            .chain(payee)
            .map(|id| format!("account:{id}"))
            .collect();
        cache::invalidate(&changed)?;
    }
    Ok(taken)
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
    /// Whether it can spend `amount`.
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
