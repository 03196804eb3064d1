//! Sends `n` messages to `subject`, each with its number as the body.
//!
//! Options: `{"n": 1, "subject": "out.x", "id": null, "ordering_key": null, "delay_ms": null,
//! "exact_id": null, "body": null}`. The number is appended to an `id`; an `exact_id` is used
//! unchanged. A `body` is sent instead of the numbers, in one message.

use std::time::Duration;

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    n: u32,
    subject: String,
    id: Option<String>,
    ordering_key: Option<String>,
    delay_ms: Option<u64>,
    exact_id: Option<String>,
    body: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            n: 1,
            subject: "out.x".to_owned(),
            id: None,
            ordering_key: None,
            delay_ms: None,
            exact_id: None,
            body: None,
        }
    }
}

pub fn run(message: &Message) -> Result<(), Failure> {
    let options: Options = crate::options(message)?;
    let bodies = match &options.body {
        Some(body) => vec![body.clone()],
        None => (0..options.n).map(|number| number.to_string()).collect(),
    };
    for (number, body) in bodies.into_iter().enumerate() {
        let mut outgoing = Outgoing::new(&options.subject, body);
        if let Some(id) = &options.id {
            outgoing = outgoing.id(format!("{id}-{number}"));
        }
        if let Some(id) = &options.exact_id {
            outgoing = outgoing.id(id);
        }
        if let Some(key) = &options.ordering_key {
            outgoing = outgoing.ordering_key(key);
        }
        if let Some(delay_ms) = options.delay_ms {
            outgoing = outgoing.delay(Duration::from_millis(delay_ms));
        }
        outbox::send(outgoing)?;
    }
    Ok(())
}
