//! A batch handler for the tests: one statement for all effects, and the batch size in the outputs.
//!
//! The header `do` of a message selects its behaviour:
//! - `insert`: the default.
//! - `bulk`: without the list in keyed state, which grows.
//! - `reject` or `fail`: before any effect.
//! - `late-reject`, `trap` or `violate`: after all effects.
//! - `uncaused`: an output without a causing message.
//! - `short`: a result list that is one too short.

use oncely_guest::prelude::*;
use serde_json::json;

oncely_guest::batch_handler!(handle);

#[allow(clippy::panic, reason = "one of its behaviours")]
fn handle(messages: &[Message]) -> Vec<Result<(), Failure>> {
    let is = |message: &Message, what: &str| message.header("do") == Some(what);
    let any = |what: &str| messages.iter().any(|message| is(message, what));
    let refused = |message: &Message, late: bool| match message.header("do") {
        Some("reject") if !late => Err(Failure::reject("requested reject")),
        Some("fail") if !late => Err(Failure::retry("requested failure")),
        Some("late-reject") if late => Err(Failure::reject("requested late reject")),
        _ => Ok(()),
    };
    let early: Vec<_> = messages
        .iter()
        .map(|message| refused(message, false))
        .collect();
    if early.iter().any(Result::is_err) {
        return early;
    }
    if let Err(failure) = take_effect(messages) {
        return messages.iter().map(|_| Err(failure.clone())).collect();
    }
    if any("trap") {
        panic!("requested panic");
    }
    if any("violate") {
        let twice = sql::execute("insert into once (id) values ('a'), ('a')", params![]);
        return messages
            .iter()
            .map(|_| twice.clone().map(|_| ()).map_err(Failure::from))
            .collect();
    }
    let mut answers: Vec<_> = messages
        .iter()
        .map(|message| refused(message, true))
        .collect();
    if any("short") {
        answers.pop();
    }
    answers
}

/// Two rows for each message with one statement, a list in keyed state, and an output for each.
fn take_effect(messages: &[Message]) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for message in messages {
        let at = values.len();
        let nonce = format!("{}/{}", message.id, invocation::attempt());
        rows.push(format!(
            "(${}, 'a', -1, ${}), (${}, 'b', 1, ${})",
            at + 1,
            at + 2,
            at + 1,
            at + 2
        ));
        values.extend(params![message.id.clone(), nonce].iter().cloned());
    }
    let statement = format!(
        "insert into effect (event_id, account, delta, attempt_nonce) values {}",
        rows.join(", ")
    );
    sql::execute(&statement, &values)?;
    let grows = |message: &Message| message.header("do") != Some("bulk");
    if messages.iter().any(grows) {
        let mut order: Vec<String> = state::get_json("order")?.unwrap_or_default();
        order.extend(messages.iter().map(|message| message.id.clone()));
        state::set_json("order", &order)?;
    }
    for message in messages {
        let nonce = format!("{}/{}", message.id, invocation::attempt());
        let body =
            json!({ "event_id": message.id, "attempt_nonce": nonce, "batch": messages.len() });
        let output = Outgoing::json("out.effect", &body)?;
        let caused = if message.header("do") == Some("uncaused") {
            output
        } else {
            output.caused_by(message)
        };
        outbox::send(caused)?;
    }
    Ok(())
}
