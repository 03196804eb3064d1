//! Transfers between two accounts, and reversals.

use oncely_guest::http::{Request, Response};
use oncely_guest::prelude::*;

use crate::journal::{self, Posting};
use crate::{accounts, problem};

/// The body of `POST /transfers` and `POST /holds`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    pub from: String,
    pub to: String,
    /// In minor units: 12.50 EUR is 1250.
    pub amount: i64,
    pub currency: String,
    pub note: Option<String>,
}

impl Order {
    pub fn read(request: &Request) -> Result<Order, Response> {
        let order: Order = request.json()?;
        if !(1..1 << 53).contains(&order.amount) {
            return Err(problem::invalid_amount());
        }
        if order.from == order.to {
            return Err(problem::same_account());
        }
        accounts::require(&order.to)?.check_currency(&order.currency)?;
        Ok(order)
    }
}

pub fn transfer(request: &Request) -> Result<Response, Response> {
    let order = Order::read(request)?;
    accounts::take_version(request, &order.from, Some(&order.to), |payer| {
        payer.check_currency(&order.currency)?;
        payer.check_funds(order.amount)
    })?;
    journal::post(&Posting {
        kind: "transfer".to_owned(),
        debit: order.from,
        credit: order.to,
        currency: order.currency,
        amount: order.amount,
        note: order.note,
        reverses: None,
        hold: None,
    })
}

pub fn show(id: &str) -> Result<Response, Response> {
    Ok(Response::json(200, &journal::require(id)?))
}

/// Moves the money back, if the receiver still has it.
pub fn reverse(request: &Request, id: &str) -> Result<Response, Response> {
    let original = journal::require(id)?.posting;
    if original.kind == "reversal" {
        return Err(problem::not_reversible(id));
    }
    accounts::take_version(request, &original.credit, Some(&original.debit), |payer| {
        if journal::is_reversed(id)? {
            return Err(problem::already_reversed(id));
        }
        payer.check_funds(original.amount)
    })?;
    journal::post(&Posting {
        kind: "reversal".to_owned(),
        debit: original.credit,
        credit: original.debit,
        reverses: Some(id.to_owned()),
        hold: None,
        ..original
    })
}
