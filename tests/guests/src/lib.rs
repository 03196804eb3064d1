//! Test guests, honest and hostile: one component, one file per behaviour.
//!
//! The behaviour is in the header `do`, or else in the field `do` of a JSON body. Several names,
//! separated by commas, run in sequence: `insert,trap` tests that the rows of a trapping handler
//! are rolled back. A JSON body may hold the options of a behaviour; each file documents its own.

use oncely_guest::{Failure, Message};
use serde::Deserialize;
use serde::de::DeserializeOwned;

mod cached;
mod calls;
mod config;
mod defer;
mod eat_memory;
mod echo;
mod emit;
mod emit_huge;
mod emit_many;
mod emit_ungranted;
mod fail;
mod fail_until;
mod global_counter;
mod insert;
mod inspect;
mod ledger;
mod log;
mod long_sql;
mod panic;
mod recurse;
mod reject;
mod sleep;
mod slow;
mod spin;
mod sql_text;
mod sql_values;
mod state_append;
mod state_cas;
mod state_counter;
mod state_many;
mod swallow_error;
mod trap;
mod version;

oncely_guest::handler!(handle);

fn handle(message: Message) -> Result<(), Failure> {
    for behaviour in behaviours(&message)?.split(',') {
        run(behaviour.trim(), &message)?;
    }
    Ok(())
}

fn run(behaviour: &str, message: &Message) -> Result<(), Failure> {
    match behaviour {
        "cached" => cached::run(message),
        "calls" => calls::run(),
        "config" => config::run(),
        "config_reversed" => config::run_reversed(),
        "defer" => defer::run(message),
        "eat_memory" => eat_memory::run(),
        "echo" => echo::run(message),
        "emit" => emit::run(message),
        "emit_huge" => emit_huge::run(message),
        "emit_many" => emit_many::run(message),
        "emit_ungranted" => emit_ungranted::run(),
        "fail" => fail::run(message),
        "fail_once" => fail_until::run_until(2),
        "fail_until" => fail_until::run(message),
        "global_counter" => global_counter::run(),
        "insert" => insert::run(message),
        "ledger" => ledger::run(message),
        "log" => log::run(message),
        "long_sql" => long_sql::run(message),
        "inspect" => inspect::run(message),
        "panic" => panic::run(),
        "recurse" => recurse::run(),
        "reject" => reject::run(message),
        "sleep" => sleep::run(message),
        "slow" => slow::run(message),
        "spin" => spin::run(),
        "sql_text" => sql_text::run(message),
        "sql_values" => sql_values::run(message),
        "state_append" => state_append::run(message),
        "state_cas" => state_cas::run(message),
        "state_counter" => state_counter::run(message),
        "state_many" => state_many::run(message),
        "swallow_error" => swallow_error::run(message),
        "trap" => trap::run(),
        "version" => version::run(),
        other => {
            Err(Failure::reject(format!("unknown behaviour `{other}`")).code("unknown-behaviour"))
        }
    }
}

fn behaviours(message: &Message) -> Result<String, Failure> {
    #[derive(Deserialize)]
    struct Body {
        r#do: String,
    }
    match message.header("do") {
        Some(behaviours) => Ok(behaviours.to_owned()),
        None => Ok(message.json::<Body>()?.r#do),
    }
}

/// The options of a behaviour from a JSON body; absent ones have their defaults.
fn options<T: DeserializeOwned>(message: &Message) -> Result<T, Failure> {
    if message.body.is_empty() {
        return serde_json::from_str("{}").map_err(Failure::from);
    }
    message.json()
}
