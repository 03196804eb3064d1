//! Does something that fails, keeps quiet about it and returns ok; the host must not take its word. Or says what the
//! failure means, which the host must hear.
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
        Misbehaviour::Send => drop(outbox::send(Outgoing::new(
            "forbidden.subject",
            "nobody will notice",
        ))),
        Misbehaviour::Unique => {
            let insert = "insert into once (id) values ($1)";
            sql::execute(insert, params![message.id])?;
            drop(sql::execute(insert, params![message.id]));
        }
        Misbehaviour::RejectUnique => {
            let insert = "insert into once (id) values ($1), ($1)";
            sql::execute(insert, params![message.id]).map_err(|error| {
                Failure::reject(format!("it was there before: {error}")).code("known")
            })?;
        }
    }
    Ok(())
}
