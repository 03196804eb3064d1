//! A component for wasmCloud: `wasmcloud:messaging` with `wasi:keyvalue` and `wasi:config`, and
//! nothing of Oncely. The last token of the subject names the behaviour.

wit_bindgen::generate!({
    path: "../../host/wit",
    world: "others",
    generate_all,
});

use exports::wasmcloud::messaging::handler::Guest;
use serde_json::json;
use wasi::config0_2_0_draft::runtime;
use wasi::config0_2_0_draft_2024_09_27::store as config;
use wasi::keyvalue0_2_0_draft as draft;
use wasi::keyvalue0_2_0_draft2 as draft2;
use wasmcloud::messaging::consumer;
use wasmcloud::messaging::types::BrokerMessage;

struct Component;
export!(Component);

impl Guest for Component {
    fn handle_message(message: BrokerMessage) -> Result<(), String> {
        let behaviour = message.subject.rsplit('.').next().unwrap_or_default();
        match behaviour {
            "count" => count(&message),
            "keys" => keys(),
            "cas" => compare_and_swap(),
            "odd" => odd(),
            "config" => read_config(),
            "reply" => reply(message),
            "request" => Err(consumer::request("out.x", b"", 100)
                .err()
                .unwrap_or_default()),
            "fail" => {
                count(&message)?;
                Err("requested failure".to_owned())
            }
            "ungranted" => publish("elsewhere.x", &json!({})),
            other => Err(format!("no behaviour is named {other}")),
        }
    }
}

fn publish(subject: &str, body: &serde_json::Value) -> Result<(), String> {
    consumer::publish(&BrokerMessage {
        subject: subject.to_owned(),
        body: body.to_string().into_bytes(),
        reply_to: None,
    })
}

/// Counts in the default bucket, by the body.
fn count(message: &BrokerMessage) -> Result<(), String> {
    let key = String::from_utf8_lossy(&message.body);
    let bucket = draft::store::open("").map_err(debug)?;
    let count = draft::atomics::increment(&bucket, &key, 1).map_err(debug)?;
    publish("out.count", &json!({ "key": key, "count": count }))
}

/// Uses every function of the first draft.
fn keys() -> Result<(), String> {
    let bucket = draft::store::open("many").map_err(debug)?;
    let entries: Vec<_> = (0..20).map(|n| (format!("k{n:02}"), vec![n])).collect();
    draft::batch::set_many(&bucket, &entries).map_err(debug)?;
    draft::batch::delete_many(&bucket, &["k03".to_owned()]).map_err(debug)?;
    bucket.delete("k04").map_err(debug)?;
    let wanted = ["k00".to_owned(), "k03".to_owned()];
    let found = draft::batch::get_many(&bucket, &wanted).map_err(debug)?;
    let listed = bucket.list_keys(None).map_err(debug)?;
    let rest = bucket.list_keys(Some(16)).map_err(debug)?;
    publish(
        "out.keys",
        &json!({
            "found": found,
            "exists": [bucket.exists("k01").map_err(debug)?, bucket.exists("k04").map_err(debug)?],
            "get": bucket.get("k19").map_err(debug)?,
            "count": listed.keys.len(),
            "cursor": listed.cursor,
            "rest": rest.keys,
        }),
    )
}

/// Uses every function of the second draft.
fn compare_and_swap() -> Result<(), String> {
    let bucket = draft2::store::open("swapped").map_err(debug)?;
    let stale = draft2::atomics::Cas::new(&bucket, "key").map_err(debug)?;
    let fresh = draft2::atomics::Cas::new(&bucket, "key").map_err(debug)?;
    draft2::atomics::swap(fresh, b"one").map_err(debug)?;
    let failed = match draft2::atomics::swap(stale, b"two") {
        Err(draft2::atomics::CasError::CasFailed(newer)) => newer,
        other => return Err(format!("a stale swap: {other:?}")),
    };
    let current = failed.current().map_err(debug)?;
    draft2::atomics::swap(failed, b"three").map_err(debug)?;
    draft2::batch::set_many(&bucket, &[("a".to_owned(), b"5".to_vec())]).map_err(debug)?;
    let sum = draft2::atomics::increment(&bucket, "a", -7).map_err(debug)?;
    draft2::batch::delete_many(&bucket, &["b".to_owned()]).map_err(debug)?;
    let wanted = ["a".to_owned(), "b".to_owned()];
    let many = draft2::batch::get_many(&bucket, &wanted).map_err(debug)?;
    publish(
        "out.cas",
        &json!({
            "current": current,
            "now": bucket.get("key").map_err(debug)?,
            "sum": sum,
            "many": many,
            "keys": bucket.list_keys(None).map_err(debug)?.keys,
            "after": bucket.list_keys(Some("a")).map_err(debug)?.keys,
        }),
    )
}

/// Errors that the handler survives.
fn odd() -> Result<(), String> {
    let bucket = draft::store::open("odd").map_err(debug)?;
    bucket.set("text", b"no number").map_err(debug)?;
    let full = (i64::MAX as u64 + 1).to_string();
    bucket.set("full", full.as_bytes()).map_err(debug)?;
    let second = draft2::store::open("odd").map_err(debug)?;
    publish(
        "out.odd",
        &json!({
            "slash": draft::store::open("a/b").err().map(debug),
            "no key": bucket.get("").map(|_| ()).err().map(debug),
            "long key": bucket.get(&"k".repeat(255)).err().map(debug),
            "text": draft::atomics::increment(&bucket, "text", 1).err().map(debug),
            "range": draft2::atomics::increment(&second, "full", 1).err().map(debug),
        }),
    )
}

fn read_config() -> Result<(), String> {
    let all: Vec<_> = config::get_all().map_err(debug)?;
    publish(
        "out.config",
        &json!({
            "store": config::get("tariff").map_err(debug)?,
            "runtime": runtime::get("tariff").map_err(debug)?,
            "absent": runtime::get("absent").map_err(debug)?,
            "all": all,
            "same": runtime::get_all().map_err(debug)? == all,
        }),
    )
}

/// Sends the body to the subject for replies, and names that one for the next reply.
fn reply(message: BrokerMessage) -> Result<(), String> {
    let subject = message.reply_to.ok_or("the message has no reply-to")?;
    consumer::publish(&BrokerMessage {
        reply_to: Some("in.next".to_owned()),
        subject,
        body: message.body,
    })
}

fn debug(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}
