//! An HTTP worker for the tests: the body of a request lists its steps, and a nonce marks effects.
//!
//! The body is JSON:
//! `{"event": "e1", "do": ["effect", "state", "send"], "status": 200, "say": "text", "ms": 0}`.
//!
//! Steps of `do`:
//! - `effect`: two rows in `effect` that sum to zero.
//! - `account`: adds one to the balance of the account of the event's name.
//! - `state`: counts in the key `count`.
//! - `send`: one output.
//! - `violate`: a failed statement, ignored.
//! - `swallow`: the same, but with a success as the answer.
//! - `promise`: a row that the commit refuses.
//! - `trap`, `spin`: as named.
//! - `slow`: runs in the database for `ms`.
//! - `huge`: a body of `ms` MiB.
//! - `invalidate`: the tag `event:` plus the event.
//!
//! A GET answers with the number of effects of the event in its query. With `write` it tries to
//! write. With `echo` it adds the request's headers (escaped) and body to the answer.
//! `status=NUMBER` sets the status, and each `h=NAME:VALUE` adds a header.

use oncely_guest::http::{Request, Response};
use oncely_guest::prelude::*;
use serde_json::json;

oncely_guest::http_handler!(handle);

#[derive(Deserialize)]
struct Wanted {
    event: String,
    #[serde(default, rename = "do")]
    steps: Vec<String>,
    #[serde(default = "ok")]
    status: u16,
    #[serde(default)]
    say: String,
    #[serde(default)]
    ms: u64,
}

fn ok() -> u16 {
    200
}

fn handle(request: Request) -> Result<Response, Response> {
    if request.method == "GET" || request.method == "HEAD" {
        return read(&request);
    }
    let wanted: Wanted = request.json()?;
    let nonce = nonce();
    let mut body = wanted.say.clone().into_bytes();
    for step in &wanted.steps {
        run_step(step, &wanted, &nonce, &mut body)?;
    }
    if body.is_empty() {
        let description = json!({
            "event": wanted.event, "nonce": nonce, "id": invocation::id(), "method": request.method,
            "path": request.path_and_query, "version": invocation::version(),
        });
        body = description.to_string().into_bytes();
    }
    let answer = Response {
        body,
        ..Response::new(wanted.status)
    };
    Ok(answer
        .header("content-type", "application/json")
        .header("x-nonce", nonce)
        .header("x-odd", vec![b'a', 0xe9]))
}

#[allow(clippy::panic, reason = "one of its behaviours")]
fn run_step(step: &str, wanted: &Wanted, nonce: &str, body: &mut Vec<u8>) -> Result<(), Response> {
    match step {
        "effect" => {
            sql::execute(
                "insert into effect (event_id, account, delta, attempt_nonce) values ($1, 'a', -1, $2), ($1, 'b', 1, $2)",
                params![wanted.event.clone(), nonce.to_owned()],
            )?;
        }
        "account" => {
            sql::execute(
                "update balance set amount = amount + 1 where account = $1",
                params![wanted.event.clone()],
            )?;
        }
        "state" => {
            let count = state::get_json::<u64>("count")?.unwrap_or(0) + 1;
            state::set_json("count", &count)?;
        }
        "send" => {
            outbox::send(Outgoing::json(
                "out.http",
                &json!({ "event": wanted.event, "nonce": nonce }),
            )?)?;
        }
        "violate" | "swallow" => {
            let _ = sql::execute("insert into once (id) values ('a'), ('a')", params![]);
        }
        "promise" => {
            sql::execute(
                "insert into promise (id, kept_by) values ($1, 'missing')",
                params![wanted.event.clone()],
            )?;
        }
        "trap" => panic!("requested panic"),
        "spin" => loop {
            std::hint::black_box(());
        },
        "slow" => {
            let _ = sql::query(SLOW, params![i64::try_from(wanted.ms).unwrap_or_default()])?;
        }
        "invalidate" => {
            cache::invalidate(&[format!("event:{}", wanted.event)])?;
        }
        "huge" => body.resize(usize::try_from(wanted.ms).unwrap_or_default() << 20, b'x'),
        other => return Err(Response::problem(400, "unknown-step", other)),
    }
    Ok(())
}

/// A query whose run time grows with its parameter.
const SLOW: &str =
    "with recursive n (i) as (select 1 union all select i + 1 from n where i < $1 * 3000)
    select count(*) from n";

fn read(request: &Request) -> Result<Response, Response> {
    if request.path_and_query.contains("write") {
        sql::execute("insert into once (id) values ('read')", params![])?;
    }
    let of_path = request
        .segments()
        .nth(1)
        .filter(|_| request.path().starts_with("/events/"));
    let event = request
        .query("event")
        .or(of_path)
        .unwrap_or_default()
        .to_owned();
    let row = sql::query_one(
        "select count(*) from effect where event_id = $1",
        params![event],
    )?;
    let count: i64 = row.get(0)?;
    let status = request
        .query("status")
        .and_then(|status| status.parse().ok())
        .unwrap_or(200);
    let mut body = json!({ "rows": count });
    if request.path_and_query.contains("echo") {
        let headers = request
            .headers
            .iter()
            .map(|(name, value)| (name, value.escape_ascii().to_string()));
        body = json!({
            "rows": count,
            "headers": headers.collect::<Vec<_>>(),
            "body": String::from_utf8_lossy(&request.body),
        });
    }
    let query = request
        .path_and_query
        .split_once('?')
        .map(|(_, query)| query)
        .unwrap_or_default();
    let wanted = query
        .split('&')
        .filter_map(|part| part.strip_prefix("h=")?.split_once(':'));
    Ok(
        wanted.fold(Response::json(status, &body), |answer, (name, value)| {
            answer.header(name, value)
        }),
    )
}

/// A new nonce for each run.
fn nonce() -> String {
    format!("{}-{}", invocation::id(), invocation::now())
}
