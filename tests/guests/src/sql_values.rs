//! Reads one row with a query, passes its values to another, and sends the row of that.
//!
//! Options: `{"select": "select ...", "as_text": "select ($1::bigint)::text as int64, ..."}`. The
//! output to `out.values` is the second row, by column.

use oncely_guest::outbox::Outgoing;
use oncely_guest::sql::Value;
use oncely_guest::{Failure, Message, outbox, params, sql};
use serde::Deserialize;

#[derive(Deserialize)]
struct Options {
    select: String,
    as_text: String,
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = message.json()?;
    let rows = sql::query(&options.select, params![])?;
    let values: Vec<Value> = rows
        .first()
        .map(|row| row.values().to_vec())
        .unwrap_or_default();
    let rows = sql::query(&options.as_text, &values)?;
    let mut texts = serde_json::Map::new();
    for row in &rows {
        for (column, value) in row.columns().iter().zip(row.values()) {
            let text = match value {
                Value::Text(text) => serde_json::Value::String(text.clone()),
                _ => serde_json::Value::Null,
            };
            texts.insert(column.clone(), text);
        }
    }
    outbox::send(Outgoing::json("out.values", &texts)?)?;
    Ok(())
}
