//! The full effect: `insert` plus balances, a count in keyed state and outputs with a checksum.
//!
//! Options: `{"from": "a", "to": "b", "delta": 1, "n": 1, "key": "k", "seq": 0, "delay_ms": 0,
//! "header": null}`. Each output is `{"event_id", "ordinal", "key", "seq", "count", "delayed",
//! "attempt_nonce", "padding", "checksum"}`. The count is that of the keyed state, and the key is
//! the ordering key. The checksum is the FNV-1a hash of
//! `{event_id}/{ordinal}/{attempt_nonce}/{padding}`. The first output waits for the delay. With
//! `header`, outputs carry a header of that name.

use std::time::Duration;

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, params, sql, sql::Value, state};
use serde::Deserialize;
use serde_json::json;

use wasip2::random::random;

#[derive(Deserialize)]
struct Options {
    from: String,
    to: String,
    delta: i64,
    n: u32,
    key: String,
    seq: u64,
    #[serde(default)]
    delay_ms: u64,
    header: Option<String>,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    let nonce = format!(
        "{:016x}{:016x}",
        random::get_random_u64(),
        random::get_random_u64()
    );
    // Most messages defer their statements, some in the same transaction do not.
    let write = |statement: &str, params: &[Value]| match options.seq % 8 {
        0 => sql::execute(statement, params).map(drop),
        _ => sql::defer(statement, params),
    };
    write(
        "insert into effect (event_id, account, delta, attempt_nonce) values ($1, $2, $3, $6), ($1, $4, $5, $6)",
        params![
            message.id,
            options.from,
            -options.delta,
            options.to,
            options.delta,
            nonce
        ],
    )?;
    write(
        "insert into balance (account, amount) values ($1, $2), ($3, $4)
         on conflict (account) do update set amount = balance.amount + excluded.amount",
        params![options.from, -options.delta, options.to, options.delta],
    )?;
    let count = state::get_json::<u64>(&options.key)?.unwrap_or(0) + 1;
    state::set_json(&options.key, &count)?;
    for ordinal in 0..options.n {
        send(message, &options, &nonce, count, ordinal)?;
    }
    Ok(())
}

fn send(
    message: &Message,
    options: &Options,
    nonce: &str,
    count: u64,
    ordinal: u32,
) -> Result<(), Failure> {
    let padding = "x".repeat(512);
    let is_delayed = ordinal == 0 && options.delay_ms > 0;
    let checksum = fnv(&format!("{}/{ordinal}/{nonce}/{padding}", message.id));
    let mut outgoing = Outgoing::json(
        "out.ledger",
        &json!({
            "event_id": message.id, "ordinal": ordinal, "key": options.key, "seq": options.seq, "count": count, "delayed": is_delayed,
            "attempt_nonce": nonce, "padding": padding, "checksum": format!("{checksum:016x}"),
        }),
    )?
    .ordering_key(&options.key);
    if let Some(header) = &options.header {
        outgoing = outgoing.header(header, "1");
    }
    if is_delayed {
        outgoing = outgoing.delay(Duration::from_millis(options.delay_ms));
    }
    outbox::send(outgoing)?;
    Ok(())
}

fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
