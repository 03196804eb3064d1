//! Sends the body and the headers back to `out.echo`, unchanged.

use oncely_guest::{Failure, Message, outbox, outbox::Outgoing};

pub fn run(message: &Message) -> Result<(), Failure> {
    let mut outgoing = Outgoing::new("out.echo", message.body.clone());
    for (name, value) in &message.headers {
        // Platform headers: an output with one is refused.
        if !name.starts_with("Nats-") && !name.starts_with("Oncely-") {
            outgoing = outgoing.header(name, value);
        }
    }
    outbox::send(outgoing)?;
    Ok(())
}
