//! A component for wasmCloud's interfaces of NATS. The last token of the subject names the
//! behaviour; an order has the body `account:amount`.

wit_bindgen::generate!({
    path: "../../host/wit",
    world: "oncely:others/nats",
    generate_all,
});

use exports::wasmcloud::nats::jetstream_handler::Guest;
use wasmcloud::nats::jetstream::{self, MessageHandle};
use wasmcloud::nats::types::{HeaderEntry, NatsError, NatsMessage};
use wasmcloud::nats::{core, kv};

struct Component;
export!(Component);

impl Guest for Component {
    async fn handle_message(handle: MessageHandle) -> Result<(), String> {
        let message = handle.message();
        let behaviour = message.subject.rsplit('.').next().unwrap_or_default();
        match behaviour {
            "order" => order(&handle, &message).await.map_err(debug),
            "nak" => {
                order(&handle, &message).await.map_err(debug)?;
                if handle.delivery_count() < 2 {
                    handle.nak(Some(10)).await.map_err(debug)?;
                }
                handle.ack_sync().await.map_err(debug)
            }
            "term" => {
                order(&handle, &message).await.map_err(debug)?;
                handle.term().await.map_err(debug)
            }
            "keys" => keys().await.map_err(debug),
            "request" => core::request(outgoing("out.x", String::new()), 100)
                .await
                .map(|_| ())
                .map_err(debug),
            other => Err(format!("no behaviour is named {other}")),
        }
    }
}

/// Adds the amount to the total of its account, by compare and swap, and sends the total.
async fn order(handle: &MessageHandle, message: &NatsMessage) -> Result<(), NatsError> {
    let text = String::from_utf8_lossy(&message.body).into_owned();
    let (account, amount) = text.split_once(':').unwrap_or((&text, "1"));
    let amount: u64 = amount.parse().unwrap_or_default();
    let bucket = kv::open("totals".to_owned()).await?;
    let (total, revision) = match bucket.get(account.to_owned()).await {
        Ok(entry) => (
            String::from_utf8_lossy(&entry.value).parse().unwrap_or(0),
            entry.revision,
        ),
        Err(NatsError::KeyNotFound) => (0, 0),
        Err(error) => return Err(error),
    };
    let total: u64 = total + amount;
    let value = total.to_string().into_bytes();
    if revision == 0 {
        bucket.create(account.to_owned(), value).await?;
    } else {
        bucket.update(account.to_owned(), value, revision).await?;
    }
    let mut notice = outgoing("out.total", format!("{account}:{total}"));
    notice.headers = Some(vec![
        HeaderEntry {
            name: "Nats-Msg-Id".to_owned(),
            value: format!("total-{}", handle.sequence()),
        },
        HeaderEntry {
            name: "Account".to_owned(),
            value: account.to_owned(),
        },
    ]);
    jetstream::publish(notice).await?;
    Ok(())
}

/// Uses the rest of key-value.
async fn keys() -> Result<(), NatsError> {
    let bucket = kv::open("keys".to_owned()).await?;
    for key in ["a", "b", "c"] {
        bucket.put(key.to_owned(), key.as_bytes().to_vec()).await?;
    }
    bucket.delete("b".to_owned()).await?;
    let stale = bucket.update("a".to_owned(), vec![], 99).await;
    let taken = bucket.create("a".to_owned(), vec![]).await;
    let page = bucket.keys().await?;
    let history = bucket.history("c".to_owned()).await?;
    let status = bucket.status().await;
    let text = format!(
        "{:?} {} {} {:?} {:?} {}",
        page.keys,
        page.truncated,
        history.len(),
        matches!(stale, Err(NatsError::RevisionMismatch(1))),
        matches!(taken, Err(NatsError::RevisionMismatch(1))),
        status.is_err(),
    );
    core::publish(outgoing("out.keys", text)).await
}

fn outgoing(subject: &str, body: String) -> NatsMessage {
    NatsMessage {
        subject: subject.to_owned(),
        body: body.into_bytes(),
        reply_to: None,
        headers: None,
    }
}

fn debug(error: NatsError) -> String {
    format!("{error:?}")
}
