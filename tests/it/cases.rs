//! `oncely test`: cases of messages and requests, and their effects.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use support::world::{http_manifest, manifest_of};
use support::{guests, postgres};

/// The output of `oncely test` in a folder, and its exit code.
fn test(folder: &Path, args: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(guests::oncely()?)
        .arg("test")
        .args(args)
        .current_dir(folder)
        .env("NO_COLOR", "1")
        .output()
        .context("run `oncely test`")?;
    let code = output.status.code().context("it was killed")?;
    let text = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
    Ok((code, text))
}

/// A folder with a manifest and one file of cases.
fn project(settings: &str, cases: &str) -> Result<tempfile::TempDir> {
    project_of(&manifest_of(&guests::component()?, settings), cases)
}

/// The same, for a worker that answers requests.
fn http_project(routes: &str, cases: &str) -> Result<tempfile::TempDir> {
    project_of(&http_manifest("1s", routes)?, cases)
}

fn project_of(manifest: &str, cases: &str) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("oncely.toml"), manifest)?;
    std::fs::create_dir(folder.path().join("tests"))?;
    std::fs::write(folder.path().join("tests/cases.yaml"), cases)?;
    Ok(folder)
}

const CASES: &str = r#"# Checked on both databases.
cases:
  - name: transfers move an amount
    given:
      rows:
        balance: [{account: a, amount: 10}]
      state: {k: "4"}
    message:
      subject: in.x
      id: größe
      headers: {do: ledger, Tag: [one, two]}
      body: {from: a, to: b, delta: 3, n: 1, key: k, seq: 1}
    expect:
      result: done
      state: {k: "5"}
      rows:
        balance:
          - update: {account: a, amount: 7}
          - insert: {account: b, amount: 3}
        effect:
          - insert: {event_id: größe, account: a, delta: -3}
          - insert: {event_id: größe, account: b, delta: 3, attempt_nonce: <any>}

  - name: failures leave nothing
    messages:
      - {subject: in.x, headers: {do: "insert,reject"}, body: ""}
      - {subject: in.x, headers: {do: "insert,panic"}, body: ""}
      - {subject: in.x, headers: {do: fail_until}, body: {after_ms: 1500}}
      - {subject: in.x, headers: {do: fail_until}, body: {after_ms: 1500}, attempt: 2}
      - {subject: in.x, headers: {do: insert}, body: {subject: elsewhere.x}}
    expect:
      results:
        - reject: {code: requested-reject}
        - trap
        - retry: {after: 1s 500ms}
        - done
        - output-refused
      outputs: []
      rows: {}

  - name: an output has a key and a delay
    given:
      sql: ["insert into once (id) values ('x')"]
    message:
      subject: in.x
      headers: {do: emit}
      body: {ordering_key: k, delay_ms: 1500}
    expect:
      outputs:
        - {subject: out.x, key: k, delay: 1s 500ms}
      rows: {}
"#;

#[test]
fn cases_pass_on_sqlite() -> Result<()> {
    let folder = project("", CASES)?;
    let (code, text) = test(folder.path(), &["--junit", "report.xml", "--torture"])?;
    ensure!(code == 0 && text.contains("6 passed, 0 failed"), "{text}");
    let report = std::fs::read_to_string(folder.path().join("report.xml"))?;
    ensure!(
        report.contains(r#"tests="6""#) && report.contains("transfers move an amount"),
        "{report}"
    );
    let (_, text) = test(folder.path(), &["--filter", "leave nothing"])?;
    ensure!(text.contains("1 passed, 0 failed"), "{text}");
    let (code, text) = test(folder.path(), &["--filter", "leaves nothing"])?;
    ensure!(code == 3, "{text}");
    ensure!(
        text.contains("no case has `leaves nothing` in its name"),
        "{text}"
    );
    Ok(())
}

#[test]
fn cases_pass_on_postgres_and_leave_no_database() -> Result<()> {
    let url = postgres::shared().url("postgres");
    let folder = project("", CASES)?;
    let (code, text) = test(folder.path(), &["--postgres", &url, "--torture"])?;
    ensure!(code == 0 && text.contains("6 passed, 0 failed"), "{text}");
    Ok(())
}

#[test]
fn a_difference_fails_and_is_accepted_by_update() -> Result<()> {
    let wrong = CASES
        .replace("amount: 7", "amount: 8")
        .replace("- trap", "- done");
    let folder = project("", &wrong)?;
    let (code, text) = test(folder.path(), &[])?;
    assert_eq!(code, 1, "{text}");
    for line in [
        "1 passed, 2 failed",
        "-      amount: 8",
        "+      amount: 7",
        "- done",
        "requested panic",
        "hint: oncely test --update",
    ] {
        ensure!(text.contains(line), "{line} is missing:\n{text}");
    }

    let (code, text) = test(folder.path(), &["--update"])?;
    ensure!(
        code == 0 && text.contains("updated transfers move an amount"),
        "{text}"
    );
    let updated = std::fs::read_to_string(folder.path().join("tests/cases.yaml"))?;
    ensure!(updated.contains("# Checked on both"), "{updated}");
    ensure!(updated.contains("attempt_nonce: <any>"), "{updated}");
    ensure!(updated.contains("delay: 1s 500ms}"), "{updated}");
    let (code, text) = test(folder.path(), &["--torture"])?;
    ensure!(code == 0, "{text}");
    Ok(())
}

#[test]
fn a_case_checks_schemas() -> Result<()> {
    let folder = project(
        r#"
[[worker.schema]]
subject = "in.x"
file = "order.json"
[[worker.schema]]
subject = "out.*"
file = "out.json"
"#,
        r#"
cases:
  - name: schemas
    messages:
      - {subject: in.x, headers: {do: emit}, body: {n: 1}}
      - {subject: in.x, headers: {do: emit}, body: {n: many}}
      - {subject: in.x, headers: {do: emit}, body: {n: 3}}
    expect:
      results:
        - done
        - reject: {code: schema}
        - output-refused: {code: output-refused}
      outputs: [{subject: out.x, body: 0}]
      rows: {}
"#,
    )?;
    let input = r#"{"properties": {"n": {"type": "integer"}}}"#;
    std::fs::write(folder.path().join("order.json"), input)?;
    std::fs::write(folder.path().join("out.json"), r#"{"maximum": 1}"#)?;
    let (code, text) = test(folder.path(), &[])?;
    ensure!(code == 0, "{text}");
    let (code, text) = test(folder.path(), &["--torture"])?;
    ensure!(code == 0, "{text}");
    Ok(())
}

#[test]
fn torture_finds_memory_that_messages_share() -> Result<()> {
    let folder = project(
        r#"isolation = "batch""#,
        r#"
cases:
  - name: shared memory
    messages:
      - {subject: in.x, headers: {do: global_counter}, body: ""}
      - {subject: in.x, headers: {do: "state_counter,global_counter"}, body: ""}
    expect:
      results: [done, reject]
"#,
    )?;
    let (code, text) = test(folder.path(), &["--torture"])?;
    assert_eq!(code, 1, "{text}");
    ensure!(
        text.contains("ok      shared memory (")
            && text.contains("after a crash at host call 1 of message 2"),
        "{text}"
    );
    Ok(())
}

const ROUTES: &str = r#"
[[worker.route]]
path = "/do"
methods = ["POST", "PUT"]

[[worker.route]]
path = "/do/all"
methods = ["POST"]
store_failures = "all"

[[worker.route]]
path = "/events/{event}"
methods = ["GET"]
cache = "10s"
"#;

const REQUESTS: &str = r#"
cases:
  - name: a request has effects and a response
    given:
      state: {count: "4"}
    request:
      method: POST
      path: /do
      body: {event: e1, do: [effect, state, send], status: 201, say: '{"ok": true}'}
    expect:
      response:
        status: 201
        headers: {Content-Type: application/json, x-nonce: <any>}
        body: {ok: true}
      outputs:
        - {subject: out.http, body: {event: e1, nonce: <any>}}
      state: {count: "5"}
      rows:
        effect:
          - insert: {event_id: e1, account: a, delta: -1}
          - insert: {event_id: e1, account: b, delta: 1}

  - name: a key is handled once
    requests:
      - {method: POST, path: /do, key: one, body: {event: e1, do: [effect], say: first}}
      - {method: POST, path: /do, key: one, body: {event: e1, do: [effect], say: first}}
      - {method: POST, path: /do, key: one, body: {event: e2, do: [effect]}}
      - {path: /events/e1}
    expect:
      responses:
        - {status: 200, body: first}
        - {status: 200, headers: {Idempotent-Replayed: "true"}, body: first}
        - status: 422
          body:
            {code: idempotency-key-reused, detail: <any>, status: 422, title: <any>, type: <any>}
        - {status: 200, body: {rows: 2}}
      rows:
        effect:
          - insert: {event_id: e1, account: a}
          - insert: {event_id: e1, account: b}

  - name: failures leave nothing
    requests:
      - {method: POST, path: /do, body: {event: e1, do: [effect, send, state], status: 409}}
      - {method: POST, path: /do, body: {event: e1, do: [effect, violate]}}
      - {method: POST, path: /do, body: {event: e1, do: [effect, trap]}}
      - {method: POST, path: /do/all, key: all, body: {event: e1, do: [effect, trap]}}
      - {method: POST, path: /do/all, key: all, body: {event: e1, do: [effect, trap]}}
      - {path: "/events/e1?write"}
      - {method: POST, path: /do, body: {event: e2, do: [effect]}}
    expect:
      responses:
        - 409
        - 500
        - 500
        - 500
        - {status: 500, headers: {Idempotent-Replayed: "true"}}
        - 500
        - 200
      outputs: []
      state: {}
      rows:
        effect:
          - insert: {event_id: e2}
          - insert: {event_id: e2}

  - name: a handler has a time limit
    request: {method: POST, path: /do, body: {event: e1, do: [spin]}}
    expect:
      response: 504

  - name: the ingress refuses requests
    requests:
      - {method: POST, path: /do, key: null, body: {event: e1}}
      - {method: POST, path: /nowhere}
      - {method: DELETE, path: /do}
      - {method: POST, path: /do, headers: {Authorization: [a, b]}}
    expect:
      responses:
        - {status: 400, headers: {content-type: application/problem+json}}
        - 404
        - {status: 405, headers: {Allow: "POST, PUT"}}
        - 400
      rows: {}
"#;

#[test]
fn cases_of_requests_pass_on_sqlite() -> Result<()> {
    let folder = http_project(ROUTES, REQUESTS)?;
    let args = ["--torture", "--race", "--junit", "report.xml"];
    let (code, text) = test(folder.path(), &args)?;
    ensure!(code == 0 && text.contains("10 passed, 0 failed"), "{text}");
    ensure!(
        text.contains("no races: requests have no ordering key"),
        "{text}"
    );
    let report = std::fs::read_to_string(folder.path().join("report.xml"))?;
    ensure!(report.contains(r#"tests="10""#), "{report}");
    Ok(())
}

#[test]
fn cases_of_requests_pass_on_postgres() -> Result<()> {
    let url = postgres::shared().url("postgres");
    let folder = http_project(ROUTES, REQUESTS)?;
    let (code, text) = test(folder.path(), &["--postgres", &url, "--torture"])?;
    ensure!(code == 0 && text.contains("10 passed, 0 failed"), "{text}");
    Ok(())
}

#[test]
fn a_different_response_fails_and_is_accepted_by_update() -> Result<()> {
    let wrong = REQUESTS
        .replace("body: {ok: true}", "body: {ok: false}")
        .replace("response: 504", "response: 200");
    let folder = http_project(ROUTES, &wrong)?;
    let (code, text) = test(folder.path(), &[])?;
    assert_eq!(code, 1, "{text}");
    for line in [
        "3 passed, 2 failed",
        "-    ok: false",
        "+    ok: true",
        "-response: 200",
        "+response: 504",
        "request failed: the handler ran longer than its limit of 1s",
    ] {
        ensure!(text.contains(line), "{line} is missing:\n{text}");
    }
    let (code, text) = test(folder.path(), &["--update"])?;
    ensure!(code == 0, "{text}");
    let updated = std::fs::read_to_string(folder.path().join("tests/cases.yaml"))?;
    ensure!(updated.contains("x-nonce: <any>"), "{updated}");
    let (code, text) = test(folder.path(), &[])?;
    ensure!(code == 0, "{text}");
    Ok(())
}

const RACERS: &str = r#"
cases:
  - name: first
    message: {subject: in.x, headers: {do: state_set, Account: a}, body: {value: one}}
  - name: second
    message: {subject: in.x, headers: {do: state_set, Account: a}, body: {value: two}}
  - name: another key
    message: {subject: in.x, headers: {do: state_counter, Account: b}, body: {key: other}}
"#;

#[test]
fn a_race_names_the_messages_and_the_missing_key() -> Result<()> {
    let cases = RACERS
        .replace("state_set", "state_cas")
        .replace("body: {value", "body: {key: shared, expected: null, value");
    let folder = project("", &cases)?;
    let (code, text) = test(folder.path(), &["--race"])?;
    assert_eq!(code, 1, "{text}");
    for line in [
        "message e1 of `first` and message e1 of `second` depend on their order",
        r#"set ordering_key = "header:Account" for worker test"#,
        "3 pairs of messages in both orders",
    ] {
        ensure!(text.contains(line), "{line} is missing:\n{text}");
    }
    ensure!(!text.contains("`another key` depend"), "{text}");

    // With that key the two are in order.
    let folder = project(r#"ordering_key = "header:Account""#, &cases)?;
    let (_, text) = test(folder.path(), &["--race"])?;
    ensure!(
        text.contains("2 pairs of messages in both orders, 1 more have a common ordering key"),
        "{text}"
    );
    ensure!(text.contains("ok      2 pairs"), "{text}");
    Ok(())
}

#[test]
fn mistakes_in_cases_are_explained() -> Result<()> {
    let cases: [(&str, &str, i32); 7] = [
        ("cases: [{nam: x}]", "unknown field", 1),
        ("cases: [{name: x}]", "either `message` or `messages`", 1),
        (
            "cases: [{name: x, message: {body: 1}}]",
            "message 1 needs a `subject`",
            1,
        ),
        (
            "cases: [{name: x, message: {subject: 'in x'}}]",
            "the subject `in x` of message 1",
            1,
        ),
        (
            "cases: [{name: x, message: {subject: in.x}}, {name: x, message: {subject: in.x}}]",
            "two cases `x`",
            1,
        ),
        (
            "worker: other\ncases: []",
            "names the worker `other`; the manifest has: test",
            1,
        ),
        (
            "cases: [{name: x, given: {rows: {nowhere: [{a: 1}]}}, message: {subject: in.x}}]",
            "insert a given row into nowhere",
            1,
        ),
    ];
    for (text, sentence, expected) in cases {
        let folder = project("", text)?;
        let (code, said) = test(folder.path(), &[])?;
        ensure!(
            code == expected && said.contains(sentence),
            "{text}\n{said}"
        );
        ensure!(
            said.contains("error: ") && !said.contains("panicked"),
            "{said}"
        );
    }
    for (text, sentence) in [
        (
            "message: {subject: in.x}",
            "worker test answers requests: write `request`",
        ),
        (
            "request: {path: /do}, expect: {result: done}",
            "requests have no `result`",
        ),
        ("requests: []", "either `request` or `requests`"),
        ("request: {path: do}", "request 1 must begin with /"),
        ("request: {method: 'no way', path: /do}", "read NO WAY /do"),
    ] {
        let folder = http_project(ROUTES, &format!("cases: [{{name: x, {text}}}]"))?;
        let (code, said) = test(folder.path(), &[])?;
        ensure!(code == 1 && said.contains(sentence), "{text}\n{said}");
    }
    let folder = project("", "cases: [{name: x, request: {path: /do}}]")?;
    let (_, said) = test(folder.path(), &[])?;
    ensure!(said.contains("worker test has no routes"), "{said}");
    let folder = project("", "cases: []")?;
    std::fs::remove_dir_all(folder.path().join("tests"))?;
    let (code, said) = test(folder.path(), &[])?;
    ensure!(
        code == 3 && said.contains("hint: write a case"),
        "{code} {said}"
    );
    Ok(())
}
