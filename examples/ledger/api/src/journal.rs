//! The journal: append-only transactions.

use oncely_guest::http::Response;
use oncely_guest::prelude::*;

use crate::problem;

/// A row of the journal: an amount leaves the account `debit` and reaches the account `credit`.
#[derive(Serialize)]
pub struct Posting {
    /// `transfer`, `capture` or `reversal`.
    pub kind: String,
    pub debit: String,
    pub credit: String,
    pub currency: String,
    pub amount: i64,
    pub note: Option<String>,
    /// The transaction that this one reverses.
    pub reverses: Option<String>,
    /// The hold that this one captures.
    pub hold: Option<String>,
}

/// A transaction of the journal, and the body of the event `ledger.posted`.
#[derive(Serialize)]
pub struct Transaction {
    pub id: String,
    /// Such as `2026-01-31T12:00:00.000Z`.
    pub at: String,
    #[serde(flatten)]
    pub posting: Posting,
    pub entries: Vec<Entry>,
}

/// One side of a transaction.
#[derive(Serialize)]
pub struct Entry {
    pub account: String,
    /// Negative when the amount left the account.
    pub amount: i64,
    /// The balance after this entry.
    pub balance: i64,
    pub version: i64,
}

/// Writes a transaction and sends its event. The caller has taken versions of its accounts. The
/// database writes the entries and the balances.
pub fn post(posting: &Posting) -> Result<Response, Response> {
    let id = request_id();
    if find(&id)?.is_some() {
        return Err(problem::already_posted(&id));
    }
    sql::execute(
        "insert into journal (id, kind, debit, credit, currency, amount, note, reverses, hold)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        params![
            id,
            posting.kind,
            posting.debit,
            posting.credit,
            posting.currency,
            posting.amount,
            posting.note,
            posting.reverses,
            posting.hold
        ],
    )?;
    let transaction = require(&id)?;
    outbox::send(Outgoing::json("ledger.posted", &transaction)?.id(&id))?;
    Ok(Response::json(201, &transaction).header("location", format!("/transactions/{id}")))
}

/// The id of the transaction, derived from the idempotency key and the request. A request that is
/// repeated after its key expired finds the transaction by it.
pub fn request_id() -> String {
    let id = invocation::id();
    id.rsplit(':')
        .next()
        .and_then(|digest| digest.get(..32))
        .unwrap_or(&id)
        .to_owned()
}

pub fn require(id: &str) -> Result<Transaction, Response> {
    find(id)?.ok_or_else(|| problem::transaction_not_found(id))
}

pub fn is_reversed(id: &str) -> Result<bool, Response> {
    Ok(sql::query_optional("select id from journal where reverses = $1", params![id])?.is_some())
}

fn find(id: &str) -> Result<Option<Transaction>, Response> {
    let Some(row) = sql::query_optional("select * from posted where id = $1", params![id])? else {
        return Ok(None);
    };
    let posting = Posting {
        kind: row.get("kind")?,
        debit: row.get("debit")?,
        credit: row.get("credit")?,
        currency: row.get("currency")?,
        amount: row.get("amount")?,
        note: row.get("note")?,
        reverses: row.get("reverses")?,
        hold: row.get("hold")?,
    };
    Ok(Some(Transaction {
        id: row.get("id")?,
        at: row.get("at")?,
        posting,
        entries: entries(id)?,
    }))
}

fn entries(id: &str) -> Result<Vec<Entry>, Response> {
    let select = "select account, amount, balance, version from entry where transaction_id = $1 order by amount";
    let entry = |row: &sql::Row| {
        Ok(Entry {
            account: row.get("account")?,
            amount: row.get("amount")?,
            balance: row.get("balance")?,
            version: row.get("version")?,
        })
    };
    sql::query(select, params![id])?.iter().map(entry).collect()
}
