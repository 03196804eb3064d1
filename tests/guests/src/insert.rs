//! The basic effect: two rows that sum to zero in `effect`, and `n` outputs.
//!
//! Options: `{"from": "a", "to": "b", "delta": 1, "n": 1, "subject": "out.effect"}`. Each output is
//! `{"event_id", "ordinal", "delta", "attempt_nonce"}`. The nonce is random. Rows and outputs of
//! one event with different nonces therefore prove an effect from two attempts.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, params, sql, sql::Value};
use serde::Deserialize;
use serde_json::json;

use wasip2::random::random;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    from: String,
    to: String,
    delta: i64,
    n: u32,
    subject: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            from: "a".to_owned(),
            to: "b".to_owned(),
            delta: 1,
            n: 1,
            subject: "out.effect".to_owned(),
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    insert(message, |statement, params| {
        sql::execute(statement, params).map(drop)
    })
}

/// The same with a deferred statement.
pub fn run_deferred(message: &Message) -> Result<(), Failure> {
    insert(message, sql::defer)
}

fn insert(
    message: &Message,
    write: impl FnOnce(&str, &[Value]) -> Result<(), sql::Error>,
) -> Result<(), Failure> {
    let Options {
        from,
        to,
        delta,
        n,
        subject,
    } = crate::options(message)?;
    let nonce = format!(
        "{:016x}{:016x}",
        random::get_random_u64(),
        random::get_random_u64()
    );
    write(
        "insert into effect (event_id, account, delta, attempt_nonce) values ($1, $2, $3, $6), ($1, $4, $5, $6)",
        params![message.id, from, -delta, to, delta, nonce],
    )?;
    for ordinal in 0..n {
        let body = json!({ "event_id": message.id, "ordinal": ordinal, "delta": delta, "attempt_nonce": nonce });
        outbox::send(Outgoing::json(&subject, &body)?)?;
    }
    Ok(())
}
