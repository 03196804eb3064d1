//! Defers statements.
//!
//! Options: `{"statements": [{"sql": "...", "params": [...]}]}`. The default is the effect of
//! `insert`, with its options.

use oncely_guest::{Failure, Message, sql};
use serde::Deserialize;

use super::sql_text::{Statement, code_of, parameters};

#[derive(Default, Deserialize)]
#[serde(default)]
struct Options {
    statements: Vec<Statement>,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    if options.statements.is_empty() {
        return crate::insert::run_deferred(message);
    }
    for statement in &options.statements {
        sql::defer(&statement.sql, &parameters(&statement.params)?)
            .map_err(|error| Failure::reject(&error).code(code_of(error.kind())))?;
    }
    Ok(())
}
