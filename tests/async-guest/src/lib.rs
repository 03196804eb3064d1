//! A component whose handler is an async function of WASI 0.3. The header `do` names the behaviour.

wit_bindgen::generate!({
    path: "../../wit",
    world: "oncely:worker/async-worker",
    generate_all,
});

use std::time::Duration;

use exports::oncely::worker::async_handler::Guest;
use oncely::worker::types::{Failure, FailureKind, Message};
use oncely::worker::{outbox, sql};
use wasip3::clocks::{monotonic_clock, system_clock};
use wasip3::random::random;

struct Component;
export!(Component);

impl Guest for Component {
    async fn handle(message: Message) -> Result<(), Failure> {
        let behaviour = message.headers.iter().find(|(name, _)| name == "do");
        let behaviour = behaviour
            .map(|(_, value)| value.clone())
            .unwrap_or_default();
        match behaviour.as_str() {
            "insert" => insert(&message),
            "waits" => waits(&message).await,
            "reject" => {
                insert(&message)?;
                Err(failure(FailureKind::Reject, "requested reject"))
            }
            "panic" => panic!("requested panic after {:?}", insert(&message)),
            "later" => {
                // Work that the handler does not wait for.
                let late = message.clone();
                wit_bindgen::spawn_local(async move {
                    monotonic_clock::wait_for(nanoseconds(50)).await;
                    let _ = insert(&late);
                });
                Ok(())
            }
            "forever" => {
                monotonic_clock::wait_for(u64::MAX).await;
                Ok(())
            }
            "never" => std::future::pending().await,
            other => Err(failure(
                FailureKind::Reject,
                &format!("no behaviour {other}"),
            )),
        }
    }
}

fn insert(message: &Message) -> Result<(), Failure> {
    let nonce = format!("{:016x}", random::get_random_u64());
    let statement = "insert into effect (event_id, account, delta, attempt_nonce) \
                     values ($1, 'a', -1, $2), ($1, 'b', 1, $2)";
    let params = [
        sql::Value::Text(message.id.clone()),
        sql::Value::Text(nonce),
    ];
    sql::execute(statement, &params).map_err(|error| retry(&error))?;
    send("out.effect", message.id.clone().into_bytes())
}

/// Waits for several timers at once: it takes as long as the longest one.
async fn waits(message: &Message) -> Result<(), Failure> {
    let began = monotonic_clock::now();
    let wait = |ms| monotonic_clock::wait_for(nanoseconds(ms));
    futures::join!(wait(100), wait(150), wait(200));
    let took = Duration::from_nanos(monotonic_clock::now() - began);
    let seconds = system_clock::now().seconds;
    let line = format!("{{\"ms\": {}, \"seconds\": {seconds}}}", took.as_millis());
    insert(message)?;
    send("out.waited", line.into_bytes())
}

fn nanoseconds(ms: u64) -> u64 {
    ms * 1_000_000
}

fn send(subject: &str, body: Vec<u8>) -> Result<(), Failure> {
    let outgoing = outbox::Outgoing {
        subject: subject.to_owned(),
        headers: Vec::new(),
        body,
        id: None,
        ordering_key: None,
        delay: None,
        caused_by: None,
    };
    outbox::send(&outgoing).map_err(|error| retry(&error))?;
    Ok(())
}

fn retry(error: &impl std::fmt::Debug) -> Failure {
    failure(FailureKind::Retry, &format!("{error:?}"))
}

fn failure(kind: FailureKind, message: &str) -> Failure {
    Failure {
        kind,
        code: Some("requested".to_owned()),
        message: message.to_owned(),
    }
}
