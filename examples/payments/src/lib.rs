//! Settles payments: moves money between two accounts, writes it down twice, and tells the world.
//!
//! Nothing here looks for duplicates, opens a transaction or publishes anything. The host runs this function once in
//! effect for each event id, and what it does below commits together or not at all.

use oncely_guest::prelude::*;

/// What arrives on `payments.requested`.
#[derive(Deserialize)]
struct Request {
    payment: String,
    from: String,
    to: String,
    cents: i64,
}

/// What leaves on `payments.settled`.
#[derive(Serialize)]
struct Settled<'r> {
    payment: &'r str,
    from: &'r str,
    to: &'r str,
    cents: i64,
    currency: String,
    /// What the payer has left, in cents.
    balance: i64,
}

/// What leaves on `payments.declined`.
#[derive(Serialize)]
struct Declined<'r> {
    payment: &'r str,
    why: String,
}

oncely_guest::handler!(handle);

fn handle(message: Message) -> Result<(), Failure> {
    let request: Request = message.json()?;
    check(&request)?;

    // A payment that cannot be made is an answer, not a failure: it commits like any other.
    match settle(&request)? {
        Ok(balance) => {
            let Request {
                payment,
                from,
                to,
                cents,
            } = &request;
            let currency = config::require("currency")?;
            let settled = Settled {
                payment,
                from,
                to,
                cents: *cents,
                currency,
                balance,
            };
            outbox::send(Outgoing::json("payments.settled", &settled)?.ordering_key(from))?;
        }
        Err(why) => {
            let declined = Declined {
                payment: &request.payment,
                why,
            };
            outbox::send(
                Outgoing::json("payments.declined", &declined)?.ordering_key(&request.from),
            )?;
        }
    }
    Ok(())
}

/// Rejects what can never be a payment; a person finds it in the dead-letter queue.
fn check(request: &Request) -> Result<(), Failure> {
    let wrong = if request.payment.is_empty() {
        "a payment needs an id"
    } else if request.cents <= 0 {
        "a payment moves at least one cent"
    } else if request.from == request.to {
        "a payment needs two different accounts"
    } else {
        return Ok(());
    };
    Err(Failure::reject(wrong).code("malformed"))
}

/// Moves the money and returns what the payer has left, or why it was declined.
fn settle(request: &Request) -> Result<Result<i64, String>, Failure> {
    let Request {
        payment,
        from,
        to,
        cents,
    } = request;

    let known = lock_accounts(from, to)?;
    if let Some(unknown) = [from, to].into_iter().find(|name| !known.contains(name)) {
        return Ok(Err(format!("there is no account {unknown}")));
    }

    // The condition and the change are one statement, so no other payment fits in between.
    let debit = "update account set balance = balance - $2 where name = $1 and balance >= $2 returning balance";
    let Some(payer) = sql::query_optional(debit, params![from, cents])? else {
        return Ok(Err(format!("{from} has insufficient funds")));
    };
    sql::execute(
        "update account set balance = balance + $2 where name = $1",
        params![to, cents],
    )?;

    // Two entries that sum to zero. Their key is a second line of defence: a producer that sends one payment under
    // two event ids gets past the inbox, but not past this.
    let entries = "insert into entry (payment, account, cents) values ($1, $2, $3), ($1, $4, $5) on conflict do nothing";
    if sql::execute(entries, params![payment, from, -cents, to, cents])? != 2 {
        let sentence = format!("payment {payment} was already made under another event id");
        return Err(Failure::reject(sentence).code("payment-reused"));
    }
    Ok(Ok(payer.get("balance")?))
}

/// Returns which of the two accounts exist and keeps other payments away from them until the commit.
///
/// The order is what matters: if alice paid bob while bob paid alice and each took the payer's row first, the two
/// would wait for each other. SQLite has one writer at a time and nothing to lock.
fn lock_accounts(from: &str, to: &str) -> Result<Vec<String>, Failure> {
    let lock = match sql::dialect() {
        sql::Dialect::Postgres => "for no key update",
        sql::Dialect::Sqlite => "",
    };
    let statement = format!("select name from account where name in ($1, $2) order by name {lock}");
    let rows = sql::query(&statement, params![from, to])?;
    Ok(rows
        .iter()
        .map(|row| row.get("name"))
        .collect::<Result<_, _>>()?)
}
