//! Sums the amounts that each account received and paid per day, from the events of the ledger.
//!
//! A redelivered event must not be added to `received` twice. The host prevents it: the id of the
//! event is in its inbox, committed in the same transaction as the sums.

use oncely_guest::prelude::*;

/// The body of a message on `ledger.posted`.
#[derive(Deserialize)]
struct Posted {
    /// Such as `2026-01-31T12:00:00.000Z`.
    at: String,
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    account: String,
    /// Negative when the amount left the account.
    amount: i64,
}

oncely_guest::handler!(handle);

fn handle(message: Message) -> Result<(), Failure> {
    let posted: Posted = message.json()?;
    let day = posted
        .at
        .get(..10)
        .ok_or_else(|| Failure::reject("`at` has no day").code("malformed"))?;
    for entry in &posted.entries {
        add(day, entry)?;
    }
    Ok(())
}

fn add(day: &str, entry: &Entry) -> Result<(), Failure> {
    let (received, paid) = (entry.amount.max(0), (-entry.amount).max(0));
    sql::execute(
        "insert into daily_total (account, day, received, paid, entries) values ($1, $2, $3, $4, 1)
         on conflict (account, day) do update set received = daily_total.received + excluded.received,
             paid = daily_total.paid + excluded.paid, entries = daily_total.entries + 1",
        params![entry.account, day, received, paid],
    )?;
    Ok(())
}
