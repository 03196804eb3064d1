//! The OpenAPI document of the control API: complete, valid, and true for real responses.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests::repository;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest};

/// Sends a request to the control API, as the holder of a token.
async fn send(
    world: &World,
    method: &Method,
    path: &str,
    body: Option<&Value>,
    token: &str,
) -> Result<(StatusCode, Value)> {
    let url = format!("{}{path}", world.control_url()?);
    let request = reqwest::Client::new()
        .request(method.clone(), url)
        .bearer_auth(token);
    let request = match body {
        Some(body) => request.json(body),
        None => request,
    };
    let response = request.send().await?;
    let status = response.status();
    let bytes = response.bytes().await?;
    Ok((status, serde_json::from_slice(&bytes).unwrap_or_default()))
}

/// Checks a value against a schema of the document.
fn check(document: &Value, schema: &Value, value: &Value, of: &str) -> Result<()> {
    ensure!(schema.is_object(), "{of} has no schema");
    let mut whole = schema.clone();
    whole["components"] = document["components"].clone();
    let validator = jsonschema::validator_for(&whole).context("read the schema")?;
    let errors: Vec<String> = validator
        .iter_errors(value)
        .map(|error| format!("{} at {}", error, error.instance_path()))
        .collect();
    ensure!(errors.is_empty(), "{of}: {errors:?}\n{value}");
    Ok(())
}

/// A request to read: its path in the document, and its path.
fn get<'p>(template: &'p str, path: &'p str) -> (Method, &'p str, &'p str) {
    (Method::GET, template, path)
}

/// A request whose path has no parameters.
fn post(path: &str) -> (Method, &str, &str) {
    (Method::POST, path, path)
}

/// Sends a request, and checks its body and its response against the document.
async fn checked(
    world: &World,
    document: &Value,
    request: (Method, &str, &str),
    body: Option<Value>,
) -> Result<Value> {
    let (method, template, path) = request;
    let of = format!("{method} {template}");
    let operation = &document["paths"][template][method.as_str().to_lowercase()];
    ensure!(operation.is_object(), "{of} is not in the document");
    let schema_of = |part: &Value| part["content"]["application/json"]["schema"].clone();
    if let Some(body) = &body {
        check(document, &schema_of(&operation["requestBody"]), body, &of)?;
    }
    let (status, response) = send(world, &method, path, body.as_ref(), &world.token()?).await?;
    ensure!(status == StatusCode::OK, "{of}: {status} {response}");
    let schema = schema_of(&operation["responses"]["200"]);
    check(document, &schema, &response, &of)?;
    Ok(response)
}

/// Runs the validator that `scripts/install-tools test` installs.
fn validate(document: &Path) -> Result<()> {
    let installed = repository().join("target/tools/bin/openapi-spec-validator");
    let program = match installed.exists() {
        true => installed,
        false => "openapi-spec-validator".into(),
    };
    let output = Command::new(program)
        .arg(document)
        .output()
        .context("run openapi-spec-validator (scripts/install-tools test installs it)")?;
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_valid_and_needs_a_token() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let path = "/openapi.json";
    let (status, refused) = send(&world, &Method::GET, path, None, "wrong").await?;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let view = world
        .oncely(&["token", "create", "reader", "--role", "view"])
        .await?;
    let (status, document) = send(&world, &Method::GET, path, None, view.trim()).await?;
    assert_eq!(status, StatusCode::OK);
    check(
        &document,
        &json!({ "$ref": "#/components/schemas/ErrorResponse" }),
        &refused,
        "the refusal",
    )?;

    let status_schema = json!({ "$ref": "#/components/schemas/Status" });
    let wrong = json!({ "version": 1, "workers": "none" });
    assert!(check(&document, &status_schema, &wrong, "a wrong status").is_err());

    // The command prints the same document, without a host.
    let printed = world.oncely_json(&["schema", "--openapi"]).await?;
    assert_eq!(printed, document);
    let file = world.folder.path().join("openapi.json");
    std::fs::write(&file, document.to_string())?;
    validate(&file)?;

    // The validator refuses a document that is wrong.
    let mut wrong = document.clone();
    wrong["paths"]["/v1/status"]["get"]["responses"] = json!({ "200": {} });
    std::fs::write(&file, wrong.to_string())?;
    assert!(validate(&file).is_err());
    Ok(())
}

both!(
    real_responses_have_the_documented_schemas,
    |kind: Kind| async move {
        // A done event with an output, a dead letter, a redriven one, and a job.
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        world
            .nats
            .publish_all(vec![
                NewMessage::new("in.x", "good", "insert,emit,state_counter", "{}"),
                NewMessage::new("in.x", "bad", "reject", "{}"),
                NewMessage::new("in.x", "slow", "fail_until", r#"{"attempt": 4}"#),
            ])
            .await?;
        let dead = "select count(*) from oncely.dead_letter where state = 'open'";
        world.until(dead, 2).await?;
        let done = "select count(*) from oncely.inbox where state = 'done'";
        world.until(done, 1).await?;
        let document = world.oncely_json(&["schema", "--openapi"]).await?;

        // Lists, and one thing of each.
        for path in [
            "/v1/status",
            "/v1/dialect",
            "/v1/workers",
            "/v1/doctor",
            "/v1/whoami",
            "/v1/tokens",
        ] {
            checked(&world, &document, get(path, path), None).await?;
        }
        for (template, path) in [
            (
                "/v1/workers/{worker}/deployments",
                "/v1/workers/test/deployments",
            ),
            ("/v1/workers/{worker}/hosts", "/v1/workers/test/hosts"),
            ("/v1/workers/{worker}/drain", "/v1/workers/test/drain"),
            (
                "/v1/workers/{worker}/state",
                "/v1/workers/test/state?limit=10",
            ),
            ("/v1/activity", "/v1/activity?limit=10"),
            ("/v1/outbox", "/v1/outbox?limit=10&unpublished=true"),
        ] {
            checked(&world, &document, get(template, path), None).await?;
        }

        // Dead letters.
        let filter = Some(json!({ "limit": 10 }));
        let found = checked(
            &world,
            &document,
            post("/v1/dead-letters/find"),
            filter.clone(),
        )
        .await?;
        let ids: Vec<i64> = found
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["id"].as_i64())
            .collect();
        assert_eq!(ids.len(), 2, "{found}");
        let groups = checked(&world, &document, post("/v1/dead-letters/groups"), filter).await?;
        assert_eq!(groups.as_array().map(Vec::len), Some(2));
        for id in &ids {
            let path = format!("/v1/dead-letters/{id}");
            let request = get("/v1/dead-letters/{id}", path.as_str());
            checked(&world, &document, request, None).await?;
            let path = format!("{path}/replay");
            let request = get("/v1/dead-letters/{id}/replay", path.as_str());
            checked(&world, &document, request, None).await?;
        }
        let chosen = Some(json!({ "ids": ids }));
        let runs = checked(
            &world,
            &document,
            post("/v1/dead-letters/dry-run"),
            chosen.clone(),
        )
        .await?;
        assert_eq!(runs.as_array().map(Vec::len), Some(2));
        let job = json!({ "ids": ids, "by": { "note": "again" } });
        let job = checked(&world, &document, post("/v1/dead-letters/jobs"), Some(job)).await?;
        let path = format!("/v1/dead-letters/jobs/{}", job["id"]);
        let request = get("/v1/dead-letters/jobs/{id}", path.as_str());
        checked(&world, &document, request, None).await?;
        let path = format!("{path}/items?limit=10");
        let request = get("/v1/dead-letters/jobs/{id}/items", path.as_str());
        checked(&world, &document, request, None).await?;
        world.until(done, 2).await?;
        checked(&world, &document, post("/v1/dead-letters/verify"), chosen).await?;

        // Changes.
        let note = Some(json!({ "note": "for the test" }));
        let request = (
            Method::POST,
            "/v1/workers/{worker}/pause",
            "/v1/workers/test/pause",
        );
        checked(&world, &document, request, note).await?;
        let plan = Some(json!({ "target": "all" }));
        let request = (
            Method::POST,
            "/v1/workers/{worker}/skip/plan",
            "/v1/workers/test/skip/plan",
        );
        checked(&world, &document, request, plan).await?;
        let request = (
            Method::POST,
            "/v1/workers/{worker}/resume",
            "/v1/workers/test/resume",
        );
        checked(&world, &document, request, None).await?;
        let window = Some(json!({ "since": "2026-01-01T00:00:00Z" }));
        checked(&world, &document, post("/v1/audit"), window).await?;

        // Errors.
        let missing = "/v1/dead-letters/999999";
        let (status, error) = send(&world, &Method::GET, missing, None, &world.token()?).await?;
        assert_eq!(status, StatusCode::NOT_FOUND);
        let schema = &document["components"]["responses"]["Error"]["content"];
        check(
            &document,
            &schema["application/json"]["schema"],
            &error,
            "an error",
        )
    }
);
