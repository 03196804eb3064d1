//! Ignores a failed host call and returns ok, or maps the failure to a reject.
//!
//! The host must not accept the former, and must accept the latter.
//!
//! Options: `{"what": "send"}`, `{"what": "unique"}` or `{"what": "reject_unique"}`.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing, params, sql};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Misbehaviour {
    #[default]
    Send,
    Unique,
    RejectUnique,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Options {
    what: Misbehaviour,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    match options.what {
        Misbehaviour::Send => drop(outbox::send(Outgoing::new("forbidden.subject", "ignored"))),
        Misbehaviour::Unique => {
            let insert = "insert into once (id) values ($1)";
            sql::execute(insert, params![message.id])?;
            drop(sql::execute(insert, params![message.id]));
        }
        Misbehaviour::RejectUnique => {
            let insert = "insert into once (id) values ($1), ($1)";
            sql::execute(insert, params![message.id]).map_err(|error| {
                Failure::reject(format!("duplicate row: {error}")).code("known")
            })?;
        }
    }
    Ok(())
}
