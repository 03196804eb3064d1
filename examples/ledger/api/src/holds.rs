//! Holds: reserved money, captured or released later.

use oncely_guest::http::{Request, Response};
use oncely_guest::prelude::*;

use crate::journal::{self, Posting};
use crate::transfers::Order;
use crate::{accounts, problem};

#[derive(Serialize)]
struct Hold {
    id: String,
    debit: String,
    credit: String,
    currency: String,
    amount: i64,
    note: Option<String>,
    /// `open`, `captured` or `released`.
    state: String,
}

/// Reserves an amount of the payer.
pub fn place(request: &Request) -> Result<Response, Response> {
    let order = Order::read(request)?;
    accounts::take_version(request, &order.from, None, |payer| {
        payer.check_currency(&order.currency)?;
        payer.check_funds(order.amount)
    })?;
    let id = journal::request_id();
    if find(&id)?.is_some() {
        return Err(problem::already_held(&id));
    }
    sql::execute(
        "insert into hold (id, debit, credit, currency, amount, note) values ($1, $2, $3, $4, $5, $6)",
        params![
            id,
            order.from,
            order.to,
            order.currency,
            order.amount,
            order.note
        ],
    )?;
    Ok(Response::json(201, &require(&id)?))
}

/// Moves the reserved money to the payee.
pub fn capture(request: &Request, id: &str) -> Result<Response, Response> {
    let hold = require(id)?;
    accounts::take_version(request, &hold.debit, Some(&hold.credit), |_| check_open(id))?;
    journal::post(&Posting {
        kind: "capture".to_owned(),
        debit: hold.debit,
        credit: hold.credit,
        currency: hold.currency,
        amount: hold.amount,
        note: hold.note,
        reverses: None,
        hold: Some(hold.id),
    })
}

/// Makes the reserved money available again.
pub fn release(request: &Request, id: &str) -> Result<Response, Response> {
    let hold = require(id)?;
    accounts::take_version(request, &hold.debit, None, |_| check_open(id))?;
    sql::execute(
        "update hold set state = 'released' where id = $1",
        params![id],
    )?;
    Ok(Response::json(200, &require(id)?))
}

/// Checks that the hold is open. A request that ends a hold takes a version of its payer first, so
/// the hold cannot end between this check and the change.
fn check_open(id: &str) -> Result<(), Response> {
    let state = require(id)?.state;
    if state == "open" {
        Ok(())
    } else {
        Err(problem::hold_not_open(id, &state))
    }
}

fn require(id: &str) -> Result<Hold, Response> {
    find(id)?.ok_or_else(|| problem::hold_not_found(id))
}

fn find(id: &str) -> Result<Option<Hold>, Response> {
    let select = "select id, debit, credit, currency, amount, note, state from hold where id = $1";
    let Some(row) = sql::query_optional(select, params![id])? else {
        return Ok(None);
    };
    Ok(Some(Hold {
        id: row.get("id")?,
        debit: row.get("debit")?,
        credit: row.get("credit")?,
        currency: row.get("currency")?,
        amount: row.get("amount")?,
        note: row.get("note")?,
        state: row.get("state")?,
    }))
}
