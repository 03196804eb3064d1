//! Settles payments: moves money between two accounts, writes two entries, and publishes the
//! result.
//!
//! This code does not check for duplicates, open transactions or publish. The host runs the handler
//! once in effect for each event id, and its effects commit together or not at all.

use oncely_guest::prelude::*;

/// The body of a message on `payments.requested`.
#[derive(Deserialize)]
struct Request {
    payment: String,
    from: String,
    to: String,
    cents: i64,
}

/// The body of a message on `payments.settled`.
#[derive(Serialize)]
struct Settled<'r> {
    payment: &'r str,
    from: &'r str,
    to: &'r str,
    cents: i64,
    currency: String,
    /// The balance of the payer afterwards, in cents.
    balance: i64,
}

/// The body of a message on `payments.declined`.
#[derive(Serialize)]
struct Declined<'r> {
    payment: &'r str,
    reason: String,
}

oncely_guest::handler!(handle);

fn handle(message: Message) -> Result<(), Failure> {
    let request: Request = message.json()?;
    check(&request)?;

    // A declined payment is a result, not a failure: it commits like any other.
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
        Err(reason) => {
            let declined = Declined {
                payment: &request.payment,
                reason,
            };
            outbox::send(
                Outgoing::json("payments.declined", &declined)?.ordering_key(&request.from),
            )?;
        }
    }
    Ok(())
}

/// Rejects a request that can never become a payment. It goes to the dead-letter queue.
fn check(request: &Request) -> Result<(), Failure> {
    let reason = if request.payment.is_empty() {
        "a payment needs an id"
    } else if request.cents <= 0 {
        "a payment must move at least one cent"
    } else if request.from == request.to {
        "a payment needs two different accounts"
    } else {
        return Ok(());
    };
    Err(Failure::reject(reason).code("malformed"))
}

/// Moves the money. Returns the balance of the payer afterwards, or the reason why it was declined.
fn settle(request: &Request) -> Result<Result<i64, String>, Failure> {
    let Request {
        payment,
        from,
        to,
        cents,
    } = request;

    let known = lock_accounts(from, to)?;
    if let Some(unknown) = [from, to].into_iter().find(|name| !known.contains(name)) {
        return Ok(Err(format!("account {unknown} does not exist")));
    }

    // The condition and the change are one statement, so no other payment can run in between.
    let debit = "update account set balance = balance - $2
        where name = $1 and balance >= $2 returning balance";
    let Some(payer) = sql::query_optional(debit, params![from, cents])? else {
        return Ok(Err(format!("{from} has insufficient funds")));
    };
    sql::execute(
        "update account set balance = balance + $2 where name = $1",
        params![to, cents],
    )?;

    // Two entries that sum to zero. Their key also detects a payment that a producer sent under two
    // event ids: the inbox cannot.
    let entries = "insert into entry (payment, account, cents)
        values ($1, $2, $3), ($1, $4, $5) on conflict do nothing";
    if sql::execute(entries, params![payment, from, -cents, to, cents])? != 2 {
        let reason = format!("payment {payment} was already made under another event id");
        return Err(Failure::reject(reason).code("payment-reused"));
    }
    Ok(Ok(payer.get("balance")?))
}

/// Returns the existing accounts of the two, locked until the commit.
///
/// They are locked in the order of their names. Otherwise alice paying bob and bob paying alice
/// could deadlock. SQLite has one writer at a time and no row locks.
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
