//! Access to the control API: named tokens, their roles, and the activity log.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::production::RunningHost;
use support::world::{QUICK_RETRIES, World, manifest};

/// The requests that `docs/access.md` lists, each with the role that it needs. A unit test compares
/// that list with the router.
fn documented_requests() -> Result<Vec<(Method, String, String)>> {
    let guide = std::fs::read_to_string(guests::repository().join("docs/access.md"))?;
    let rows = guide.lines().filter_map(|line| {
        let mut cells = line.split('`');
        let request = cells.nth(1)?;
        let role = cells.nth(1)?;
        let (method, path) = request.split_once(' ')?;
        let method = Method::from_bytes(method.as_bytes()).ok()?;
        path.starts_with("/v1/")
            .then(|| (method, path.to_owned(), role.to_owned()))
    });
    let rows: Vec<_> = rows.collect();
    anyhow::ensure!(
        rows.len() > 30,
        "only {} requests in docs/access.md",
        rows.len()
    );
    Ok(rows)
}

/// Sends a request to the control API, without a body that makes sense.
async fn request(
    world: &World,
    method: &Method,
    path: &str,
    token: Option<&str>,
) -> Result<(StatusCode, Value)> {
    let path = path
        .replace("{worker}", "none")
        .replace("{digest}", "none")
        .replace("{id}", "99")
        .replace("{number}", "99")
        .replace("{name}", "none");
    let request = reqwest::Client::new()
        .request(method.clone(), format!("{}{path}", world.control_url()?))
        .header("content-type", "application/json");
    let request = match token {
        Some(token) => request.bearer_auth(token),
        None => request,
    };
    let request = match *method {
        Method::POST => request.body("{}"),
        _ => request,
    };
    let response = request.send().await?;
    let status = response.status();
    let body = response.bytes().await?;
    Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
}

async fn create_token(world: &World, name: &str, role: &str) -> Result<String> {
    let secret = world
        .oncely(&["token", "create", name, "--role", role])
        .await?;
    Ok(secret.trim().to_owned())
}

/// Runs a command with another token than that of the host.
async fn oncely_as(world: &World, token: &str, args: &[&str]) -> Result<String> {
    world.oncely(&[args, &["--token", token]].concat()).await
}

both!(
    every_request_needs_the_documented_role,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let mut tokens: BTreeMap<&str, String> = BTreeMap::new();
        let roles = ["view", "operate", "deploy", "admin"];
        for role in roles.into_iter().take(3) {
            tokens.insert(role, create_token(&world, role, role).await?);
        }
        let rank = |role: &str| roles.iter().position(|known| *known == role);
        for (method, path, needed) in documented_requests()? {
            let needed_rank = rank(&needed).with_context(|| format!("`{needed}` is a role"))?;
            let (status, _) = request(&world, &method, &path, None).await?;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {path}");
            for (role, token) in &tokens {
                let (status, body) = request(&world, &method, &path, Some(token)).await?;
                let is_refused = status == StatusCode::FORBIDDEN;
                assert_eq!(
                    is_refused,
                    rank(role) < Some(needed_rank),
                    "{method} {path} as {role}: {status} {body}"
                );
                assert_ne!(status, StatusCode::UNAUTHORIZED, "{method} {path}");
                if is_refused {
                    let error = body["error"].as_str().unwrap_or_default();
                    assert!(
                        error.contains(&format!("has the role `{role}`"))
                            && error.contains(&format!("needs the role `{needed}`")),
                        "{error}"
                    );
                    let hint = body["hints"][0].as_str().unwrap_or_default();
                    assert!(hint.contains("the host's own token"), "{hint}");
                }
            }
        }
        Ok(())
    }
);

both!(
    tokens_are_stored_as_digests_and_can_be_revoked,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        let secret = create_token(&world, "ada", "operate").await?;
        assert!(
            secret.starts_with("oncely_") && secret.len() == 71,
            "{secret}"
        );

        // Only the digest is in the database.
        for table in ["access_token", "activity", "activity_outcome"] {
            let rows = world
                .database
                .rows(&format!("select * from oncely.{table}"))
                .await;
            let text = format!("{rows:?}");
            assert!(!text.contains(&secret[7..]), "{text}");
        }
        let who = oncely_as(&world, &secret, &["token", "whoami"]).await?;
        assert!(who.contains("ada") && who.contains("operate"), "{who}");

        // A name stands for one token at a time, and `host` for none.
        for (name, says) in [
            ("ada", "already"),
            ("host", "the host's own"),
            ("a b", "letters"),
        ] {
            let refused = world
                .oncely(&["token", "create", name, "--role", "view"])
                .await
                .unwrap_err()
                .to_string();
            assert!(refused.contains(says), "{name}: {refused}");
        }

        // A token cannot create tokens.
        let refused = oncely_as(
            &world,
            &secret,
            &["token", "create", "eve", "--role", "view"],
        )
        .await
        .unwrap_err()
        .to_string();
        assert!(refused.contains("needs the role `admin`"), "{refused}");

        // An expired one is refused, and so is a revoked one, at once on its host.
        let short = world
            .oncely(&[
                "token",
                "create",
                "brief",
                "--role",
                "view",
                "--expires",
                "1s",
            ])
            .await?;
        world
            .eventually("the token expires", || async {
                let used = oncely_as(&world, short.trim(), &["workers"]).await;
                Ok(used.is_err().then_some(()))
            })
            .await?;
        assert_eq!(
            world.oncely(&["token", "revoke", "ada"]).await?.trim(),
            "token ada is revoked"
        );
        world
            .eventually_within(Duration::from_secs(5), "the token is refused", || async {
                let used = oncely_as(&world, &secret, &["workers"]).await;
                Ok(used
                    .is_err_and(|error| error.to_string().contains("revoked"))
                    .then_some(()))
            })
            .await?;
        let list = world.oncely_json(&["token", "list", "--json"]).await?;
        let revoked: Vec<(&str, bool)> = list
            .as_array()
            .into_iter()
            .flatten()
            .map(|token| {
                (
                    token["name"].as_str().unwrap_or_default(),
                    !token["revoked_at"].is_null(),
                )
            })
            .collect();
        assert_eq!(revoked, [("brief", false), ("ada", true)]);

        // The name is free again.
        create_token(&world, "ada", "view").await?;
        Ok(())
    }
);

both!(
    every_change_is_recorded_with_the_name_of_its_token,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
        let operator = create_token(&world, "ada", "operate").await?;
        world
            .nats
            .publish_all(vec![NewMessage::new("in.x", "e1", "reject", "{}")])
            .await?;
        world
            .until("select count(*) from oncely.dead_letter", 1)
            .await?;

        // The client states another name, which is a note only.
        let resolve = ["dlq", "resolve", "1", "--note", "by hand", "--actor", "eve"];
        oncely_as(&world, &operator, &resolve).await?;
        oncely_as(&world, &operator, &["pause", "test", "--note", "night"]).await?;
        let failed = oncely_as(&world, &operator, &["pause", "missing"]).await;
        assert!(failed.is_err());
        let shown = world
            .oncely_json(&["activity", "--actor", "ada", "--json"])
            .await?;
        let of = |n: usize| {
            let entry = &shown[n];
            json!([
                entry["verb"],
                entry["worker"],
                entry["object"],
                entry["outcome"]
            ])
        };
        assert_eq!(of(0), json!(["pause", "missing", "", "failed"]), "{shown}");
        assert_eq!(of(1), json!(["pause", "test", "", "done"]), "{shown}");
        assert_eq!(
            of(2),
            json!(["dlq resolve", null, "dead letter 1", "done"]),
            "{shown}"
        );
        assert_eq!(shown[2]["stated_name"], "eve");
        assert_eq!(shown[1]["details"]["note"], "night");
        assert!(
            shown[0]["error"]
                .as_str()
                .unwrap_or_default()
                .contains("no worker `missing`"),
            "{shown}"
        );
        let audit = world.oncely_json(&["dlq", "show", "1", "--json"]).await?;
        assert_eq!(
            (
                &audit["audit"][0]["actor"],
                &audit["audit"][0]["stated_name"]
            ),
            (&"ada".into(), &"eve".into())
        );

        // Filters.
        for (filter, expected) in [
            (&["--worker", "test"][..], vec!["pause"]),
            (&["--verb", "token create"], vec!["token create"]),
            (&["--actor", "ada", "--limit", "1"], vec!["pause"]),
            (&["--actor", "nobody"], vec![]),
        ] {
            let list = world
                .oncely_json(&[&["activity", "--json"], filter].concat())
                .await?;
            let verbs: Vec<&str> = list
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|entry| entry["verb"].as_str())
                .collect();
            assert_eq!(verbs, expected, "{filter:?}");
        }

        // The rows are immutable.
        for table in ["activity", "activity_outcome"] {
            let column = if table == "activity" {
                "actor"
            } else {
                "outcome"
            };
            for sql in [
                format!("update oncely.{table} set {column} = 'x'"),
                format!("delete from oncely.{table}"),
            ] {
                let forged = world.database.execute(&sql).await;
                assert!(
                    format!("{:#}", forged.unwrap_err()).contains("append-only"),
                    "{sql}"
                );
            }
        }
        Ok(())
    }
);

/// Each request that changes something writes an activity, also when it fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_changing_request_is_without_an_activity() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let token = std::fs::read_to_string(world.folder.path().join(".oncely/token"))?;
    // A valid body of each request that needs one.
    let bodies = BTreeMap::from([
        (
            "/v1/publish",
            json!({ "subject": "in.x", "headers": [], "id": "e1", "body": "" }),
        ),
        (
            "/v1/dead-letters/redrive",
            json!({ "dead_letters": [], "by": {} }),
        ),
        (
            "/v1/dead-letters/close",
            json!({ "ids": [1], "action": "resolve", "by": {} }),
        ),
        (
            "/v1/audit",
            json!({ "since": "2026-01-01T00:00:00Z", "repair": true }),
        ),
        // A window that begins later is empty.
        ("/v1/audit/runs", json!({ "since": "2126-01-01T00:00:00Z" })),
        (
            "/v1/dead-letters/groups/{id}/note",
            json!({ "owner": "payments" }),
        ),
        ("/v1/dead-letters/jobs", json!({ "ids": [1] })),
        (
            "/v1/dead-letters/jobs/{id}/change",
            json!({ "action": "pause" }),
        ),
        ("/v1/outbox/retry", json!({ "numbers": [1] })),
        ("/v1/outbox/drop", json!({ "numbers": [1] })),
        ("/v1/rollback", json!({ "worker": "none", "to": null })),
        (
            "/v1/retire",
            json!({ "worker": "none", "keep_consumers": true }),
        ),
        ("/v1/recover", json!({ "dry_run": false })),
        (
            "/v1/tokens",
            json!({ "name": "ci", "role": "view", "lifetime_ms": null }),
        ),
    ]);
    // Those that change nothing, or fail before the change because of the body here.
    let without = [
        "/v1/components",
        "/v1/dead-letters/dry-run",
        "/v1/dead-letters/{id}/edit",
        "/v1/workers/{worker}/skip",
        "/v1/plan",
        "/v1/deploy",
    ];
    let count = "select count(*) from oncely.activity";
    for (method, path, role) in documented_requests()? {
        if method != Method::POST || role == "view" || without.contains(&path.as_str()) {
            continue;
        }
        let before = world.database.number(count).await?;
        let at = path
            .replace("{worker}", "none")
            .replace("{id}", "99")
            .replace("{name}", "none");
        let request = reqwest::Client::new()
            .post(format!("{}{at}", world.control_url()?))
            .bearer_auth(token.trim());
        let request = match bodies.get(path.as_str()) {
            Some(body) => request.json(body),
            None => request.json(&json!({})),
        };
        let response = request.send().await?;
        let (status, body) = (response.status(), response.text().await?);
        assert_eq!(
            world.database.number(count).await?,
            before + 1,
            "{path}: {status} {body}"
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.activity_outcome")
                .await?,
            before + 1,
            "{path}"
        );
    }
    Ok(())
}

/// Hosts of one database share the tokens. A revoked one works nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_works_on_all_hosts_until_it_is_revoked() -> Result<()> {
    let world = World::without_host(Kind::Postgres, &manifest("")?).await?;
    let one = RunningHost::start(&world, "token-one").await?;
    let two = RunningHost::start(&world, "token-two").await?;
    let secret = one.oncely(&["token", "create", "ci", "--role", "view"])?;
    let secret = secret.trim();
    two.eventually("the token works on the other host", || async {
        Ok(two.oncely(&["workers", "--token", secret]).ok())
    })
    .await?;
    one.oncely(&["token", "revoke", "ci"])?;
    two.eventually("the token is refused", || async {
        Ok(two.oncely(&["workers", "--token", secret]).err())
    })
    .await?;
    Ok(())
}
