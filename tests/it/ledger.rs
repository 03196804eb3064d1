//! `examples/ledger`: the books balance under retries, concurrency and direct changes.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use serde_json::{Value, json};
use support::database::{Database, Kind};
use support::guests;
use support::world::{PATIENCE, World};

mod direct_sql;
mod holds;

/// The example itself, with prebuilt components.
async fn start(kind: Kind) -> Result<World> {
    World::start(kind, &manifest()?).await
}

fn manifest() -> Result<String> {
    let folder = guests::repository().join("examples/ledger");
    let mut manifest = std::fs::read_to_string(folder.join("oncely.toml"))?;
    for (name, component) in [
        ("api", guests::ledger_component()?),
        ("totals", guests::totals_component()?),
    ] {
        let migrations = folder.join(name).join("migrations");
        manifest = manifest
            .replace(
                &format!("crate = \"{name}\""),
                &format!("component = \"{}\"", component.display()),
            )
            .replace(
                &format!("migrations = \"{name}/migrations\""),
                &format!("migrations = \"{}\"", migrations.display()),
            );
    }
    Ok(manifest)
}

#[test]
fn the_cases_of_the_example_pass() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cases = folder.path().join("tests");
    std::fs::write(folder.path().join("oncely.toml"), manifest()?)?;
    std::fs::create_dir(&cases)?;
    for name in ["transfers.yaml", "totals.yaml"] {
        let from = guests::repository()
            .join("examples/ledger/tests")
            .join(name);
        std::fs::copy(from, cases.join(name))?;
    }
    let output = Command::new(guests::oncely()?)
        .args(["test", "--torture"])
        .arg(folder.path())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(text.contains("10 passed, 0 failed"), "{text}");
    Ok(())
}

/// Like [`start`], with an account `world` without limit, and accounts that have 10.00 EUR each.
async fn start_with(kind: Kind, accounts: &[&str]) -> Result<World> {
    let world = start(kind).await?;
    open(
        &world,
        json!({ "id": "world", "currency": "EUR", "overdraft_limit": null }),
    )
    .await?;
    for account in accounts {
        open(&world, json!({ "id": account, "currency": "EUR" })).await?;
        transfer(
            &world,
            &format!("opening-{account}"),
            "world",
            account,
            1000,
        )
        .await?
        .is(201)?;
    }
    Ok(world)
}

/// A response: its status and its body.
#[derive(Debug, Clone, PartialEq)]
struct TestResponse {
    status: u16,
    replayed: bool,
    body: Value,
}

impl TestResponse {
    /// The body; an error if the status differs.
    fn is(self, status: u16) -> Result<Value> {
        ensure!(self.status == status, "expected {status}, got {self:?}");
        Ok(self.body)
    }

    /// The status and the code of a problem.
    fn problem(&self) -> (u16, &str) {
        (self.status, self.body["code"].as_str().unwrap_or_default())
    }
}

async fn send(request: reqwest::RequestBuilder) -> Result<TestResponse> {
    let response = request.timeout(Duration::from_secs(30)).send().await?;
    let status = response.status().as_u16();
    let replayed = response.headers().contains_key("idempotent-replayed");
    let body = serde_json::from_slice(&response.bytes().await?).context("read a response")?;
    Ok(TestResponse {
        status,
        replayed,
        body,
    })
}

/// Posts, with retries while another request with the same key is in flight.
async fn post(
    world: &World,
    key: &str,
    path: &str,
    body: &Value,
    version: Option<i64>,
) -> Result<TestResponse> {
    let client = reqwest::Client::new();
    loop {
        let mut request = client
            .post(format!("{}{path}", world.ingress_url()?))
            .header("Idempotency-Key", key)
            .json(body);
        if let Some(version) = version {
            request = request.header("If-Match", format!("\"{version}\""));
        }
        let response = send(request).await?;
        if !["request-in-progress", "busy"].contains(&response.problem().1) {
            return Ok(response);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn get(world: &World, path: &str) -> Result<TestResponse> {
    send(reqwest::Client::new().get(format!("{}{path}", world.ingress_url()?))).await
}

async fn open(world: &World, account: Value) -> Result<Value> {
    post(
        world,
        &format!("open-{}", account["id"]).replace('"', ""),
        "/accounts",
        &account,
        None,
    )
    .await?
    .is(201)
}

fn order(from: &str, to: &str, amount: i64) -> Value {
    json!({ "from": from, "to": to, "amount": amount, "currency": "EUR" })
}

async fn transfer(
    world: &World,
    key: &str,
    from: &str,
    to: &str,
    amount: i64,
) -> Result<TestResponse> {
    post(world, key, "/transfers", &order(from, to, amount), None).await
}

async fn balance(world: &World, account: &str) -> Result<i64> {
    let account = get(world, &format!("/accounts/{account}")).await?.is(200)?;
    account["balance"].as_i64().context("read the balance")
}

/// Checks the invariants of the books.
async fn check_books(database: &Database) -> Result<()> {
    let none = [
        "select transaction_id from app.entry group by transaction_id having sum(amount) <> 0 or count(*) <> 2",
        "select id from app.journal where id not in (select transaction_id from app.entry)",
        "select id from app.account where balance <> (select coalesce(sum(amount), 0) from app.entry where account = id)",
        "select id from app.account
         where held <> (select coalesce(sum(amount), 0) from app.hold where debit = account.id and state = 'open')",
        "select id from app.account where balance - held < -overdraft_limit",
    ];
    for query in none {
        let wrong = database.rows(query).await?;
        ensure!(wrong.is_empty(), "`{query}` finds {wrong:?}");
    }
    Ok(())
}

/// Waits until the consumer has handled all postings, and checks its totals.
async fn check_totals(world: &World) -> Result<()> {
    let entries = world
        .database
        .number("select count(*) from app.entry")
        .await?;
    world
        .until(
            "select coalesce(sum(entries), 0) from app.daily_total",
            entries,
        )
        .await?;
    let totals = "select account, sum(received), sum(paid), sum(entries) from app.daily_total group by account order by 1";
    let written = "select account, sum(case when amount > 0 then amount else 0 end),
            sum(case when amount < 0 then -amount else 0 end), count(*)
        from app.entry group by account order by 1";
    assert_eq!(
        world.database.rows(totals).await?,
        world.database.rows(written).await?
    );
    Ok(())
}

both!(money_moves_and_is_shown, |kind: Kind| async move {
    let world = start_with(kind, &["alice", "bob"]).await?;
    let body =
        json!({ "from": "alice", "to": "bob", "amount": 250, "currency": "EUR", "note": "lunch" });
    let made = post(&world, "lunch", "/transfers", &body, None)
        .await?
        .is(201)?;
    assert_eq!(
        (
            &made["entries"][0]["amount"],
            &made["entries"][0]["balance"]
        ),
        (&json!(-250), &json!(750))
    );
    assert_eq!(
        (
            &made["entries"][1]["amount"],
            &made["entries"][1]["balance"]
        ),
        (&json!(250), &json!(1250))
    );
    let id = made["id"].as_str().context("read the id")?;
    assert_eq!(
        get(&world, &format!("/transactions/{id}")).await?.is(200)?,
        made
    );
    let statement = get(&world, "/accounts/bob/statement").await?.is(200)?;
    assert_eq!(statement["entries"].as_array().map(Vec::len), Some(2));
    let newest = &statement["entries"][0];
    assert_eq!(
        (&newest["counterpart"], &newest["note"], &newest["balance"]),
        (&json!("alice"), &json!("lunch"), &json!(1250))
    );
    let earlier = get(
        &world,
        &format!("/accounts/bob/statement?before={}", newest["version"]),
    )
    .await?
    .is(200)?;
    assert_eq!(earlier["entries"][0], statement["entries"][1]);
    check_books(&world.database).await?;
    check_totals(&world).await
});

both!(each_refusal_has_its_own_code, |kind: Kind| async move {
    let world = start_with(kind, &["alice", "bob"]).await?;
    open(&world, json!({ "id": "usd", "currency": "USD" })).await?;
    let with = |name: &str, value: Value| {
        let mut body = order("alice", "bob", 1);
        body[name] = value;
        body
    };
    let refused = [
        (
            "/transfers",
            order("alice", "bob", 1001),
            (422, "insufficient-funds"),
        ),
        (
            "/transfers",
            order("alice", "absent", 1),
            (404, "account-not-found"),
        ),
        (
            "/transfers",
            order("absent", "bob", 1),
            (404, "account-not-found"),
        ),
        (
            "/transfers",
            order("alice", "alice", 1),
            (422, "same-account"),
        ),
        (
            "/transfers",
            order("alice", "usd", 1),
            (422, "currency-mismatch"),
        ),
        (
            "/transfers",
            order("usd", "alice", 1),
            (422, "currency-mismatch"),
        ),
        (
            "/transfers",
            order("alice", "bob", 0),
            (422, "invalid-amount"),
        ),
        (
            "/transfers",
            order("alice", "bob", -5),
            (422, "invalid-amount"),
        ),
        (
            "/transfers",
            order("alice", "bob", i64::MAX),
            (422, "invalid-amount"),
        ),
        (
            "/transfers",
            with("amount", json!(0.5)),
            (400, "malformed-body"),
        ),
        (
            "/transfers",
            with("amout", json!(5)),
            (400, "malformed-body"),
        ),
        (
            "/holds",
            order("alice", "bob", 1001),
            (422, "insufficient-funds"),
        ),
        ("/holds/none/capture", json!({}), (404, "hold-not-found")),
        (
            "/transactions/none/reversal",
            json!({}),
            (404, "transaction-not-found"),
        ),
        (
            "/accounts",
            json!({ "id": "alice", "currency": "EUR" }),
            (409, "account-exists"),
        ),
        (
            "/accounts",
            json!({ "id": "Alice", "currency": "EUR" }),
            (422, "invalid-account"),
        ),
        (
            "/accounts",
            json!({ "id": "carol", "currency": "eur" }),
            (422, "invalid-account"),
        ),
        (
            "/accounts",
            json!({ "id": "carol", "currency": "EUR", "overdraft_limit": -1 }),
            (422, "invalid-account"),
        ),
    ];
    for (index, (path, body, problem)) in refused.iter().enumerate() {
        let response = post(&world, &format!("refused-{index}"), path, body, None).await?;
        assert_eq!(response.problem(), *problem, "{path} {body}: {response:?}");
    }
    assert_eq!(
        get(&world, "/accounts/absent").await?.problem(),
        (404, "account-not-found")
    );
    assert_eq!(balance(&world, "alice").await?, 1000);
    check_books(&world.database).await
});

both!(
    a_retry_moves_nothing_twice_even_when_its_key_is_forgotten,
    |kind: Kind| async move {
        let world = start_with(kind, &["alice", "bob"]).await?;
        let first = transfer(&world, "key", "alice", "bob", 10).await?;
        let again = transfer(&world, "key", "alice", "bob", 10).await?;
        assert!(again.replayed);
        assert_eq!(again.body, first.is(201)?);
        assert_eq!(
            transfer(&world, "key", "alice", "bob", 11).await?.problem(),
            (422, "idempotency-key-reused")
        );

        // A refusal is stored under its key, too.
        assert_eq!(
            transfer(&world, "much", "alice", "bob", 5000)
                .await?
                .problem(),
            (422, "insufficient-funds")
        );
        transfer(&world, "more", "world", "alice", 5000)
            .await?
            .is(201)?;
        assert_eq!(
            transfer(&world, "much", "alice", "bob", 5000)
                .await?
                .problem(),
            (422, "insufficient-funds")
        );

        // After the window of the key, the journal itself detects the repetition.
        world.database.execute("delete from oncely.request").await?;
        assert_eq!(
            transfer(&world, "key", "alice", "bob", 10).await?.problem(),
            (409, "already-posted")
        );
        assert_eq!(balance(&world, "bob").await?, 1010);
        check_books(&world.database).await?;
        check_totals(&world).await
    }
);

both!(
    the_books_balance_after_concurrent_retried_transfers,
    |kind: Kind| async move {
        let accounts = ["alice", "bob", "carol", "dave"];
        let world = start_with(kind, &accounts).await?;
        let orders = (0..60).flat_map(|n| {
            let (from, to) = (accounts[n % 4], accounts[(n + 1 + n / 4 % 3) % 4]);
            // Each transfer is sent three times, almost at once.
            [(n, from, to); 3]
        });
        let sent: Vec<(usize, TestResponse)> =
            stream::iter(orders)
                .map(|(n, from, to)| {
                    let world = &world;
                    async move {
                        anyhow::Ok((n, transfer(world, &format!("t-{n}"), from, to, 7).await?))
                    }
                })
                .buffer_unordered(12)
                .try_collect()
                .await?;
        for (n, response) in &sent {
            assert_eq!(response.status, 201, "{response:?}");
            let first = sent
                .iter()
                .find(|(other, _)| other == n)
                .map(|(_, response)| &response.body);
            assert_eq!(Some(&response.body), first);
        }
        assert_eq!(
            world
                .database
                .number("select count(*) from app.journal where amount = 7")
                .await?,
            60
        );
        check_books(&world.database).await?;
        check_totals(&world).await
    }
);

both!(
    the_books_balance_after_the_host_was_killed_in_the_middle,
    |kind: Kind| async move {
        let mut world = start_with(kind, &["alice", "bob"]).await?;

        // The next host uses the same ingress address.
        world.http = world.ingress_url()?.replace("http://", "");
        let url = format!("{}/transfers", world.ingress_url()?);
        let orders = stream::iter((0..60).map(move |n| transfer_until_answered(url.clone(), n)))
            .buffer_unordered(6)
            .try_collect::<Vec<_>>();
        let orders = tokio::spawn(orders);
        for round in 1..=2 {
            let transfers = "select count(*) from app.journal where amount = 7";
            world.until_at_least(transfers, 15 * round).await?;
            world.kill_host()?;
            world.start_host().await?;
        }
        for response in orders.await?? {
            assert_eq!(response.status, 201, "{response:?}");
        }
        assert_eq!(
            world
                .database
                .number("select count(*) from app.journal where amount = 7")
                .await?,
            60
        );
        check_books(&world.database).await?;
        check_totals(&world).await
    }
);

/// Retries one transfer until it is answered.
async fn transfer_until_answered(url: String, n: usize) -> Result<TestResponse> {
    let client = reqwest::Client::new();
    let end = Instant::now() + PATIENCE;
    loop {
        let request = client
            .post(&url)
            .header("Idempotency-Key", format!("t-{n}"))
            .json(&order("alice", "bob", 7));
        match send(request).await {
            Ok(response)
                if response.status < 500 && response.problem().1 != "request-in-progress" =>
            {
                return Ok(response);
            }
            _ if Instant::now() < end => tokio::time::sleep(Duration::from_millis(20)).await,
            other => return other,
        }
    }
}

both!(
    concurrent_spending_never_overdraws_an_account,
    |kind: Kind| async move {
        let world = start_with(kind, &["alice", "bob"]).await?;
        open(
            &world,
            json!({ "id": "shop", "currency": "EUR", "overdraft_limit": 500 }),
        )
        .await?;
        for (payer, can_spend) in [("alice", 1000), ("shop", 500)] {
            let responses: Vec<TestResponse> = stream::iter(0..30)
                .map(|n| {
                    let world = &world;
                    async move { transfer(world, &format!("{payer}-{n}"), payer, "bob", 90).await }
                })
                .buffer_unordered(12)
                .try_collect()
                .await?;
            let made = responses
                .iter()
                .filter(|response| response.status == 201)
                .count();
            assert_eq!(made, can_spend / 90);
            for response in responses.iter().filter(|response| response.status != 201) {
                assert_eq!(response.problem(), (422, "insufficient-funds"));
            }
        }
        assert_eq!(
            (
                balance(&world, "alice").await?,
                balance(&world, "shop").await?
            ),
            (10, -450)
        );
        check_books(&world.database).await?;
        check_totals(&world).await
    }
);

both!(
    if_match_changes_only_the_given_version,
    |kind: Kind| async move {
        let world = start_with(kind, &["alice", "bob"]).await?;
        let version = get(&world, "/accounts/alice").await?.is(200)?["version"].as_i64();
        let body = order("alice", "bob", 10);
        post(&world, "first", "/transfers", &body, version)
            .await?
            .is(201)?;
        let late = post(&world, "second", "/transfers", &body, version).await?;
        assert_eq!(late.problem(), (412, "version-mismatch"));
        assert_eq!(balance(&world, "alice").await?, 990);
        check_books(&world.database).await
    }
);

both!(a_transaction_is_reversed_once, |kind: Kind| async move {
    let world = start_with(kind, &["alice", "bob"]).await?;
    let made = transfer(&world, "key", "alice", "bob", 300)
        .await?
        .is(201)?;
    let path = format!(
        "/transactions/{}/reversal",
        made["id"].as_str().context("read the id")?
    );
    let responses: Vec<TestResponse> = stream::iter(0..6)
        .map(|n| {
            let (world, path) = (&world, &path);
            async move { post(world, &format!("back-{n}"), path, &json!({}), None).await }
        })
        .buffer_unordered(6)
        .try_collect()
        .await?;
    let (back, refused): (Vec<_>, Vec<_>) = responses
        .into_iter()
        .partition(|response| response.status == 201);
    assert_eq!((back.len(), refused.len()), (1, 5));
    for response in refused {
        assert_eq!(response.problem(), (409, "already-reversed"));
    }
    assert_eq!(back[0].body["reverses"], made["id"]);
    assert_eq!(
        (
            balance(&world, "alice").await?,
            balance(&world, "bob").await?
        ),
        (1000, 1000)
    );
    let path = format!(
        "/transactions/{}/reversal",
        back[0].body["id"].as_str().context("read the id")?
    );
    assert_eq!(
        post(&world, "forth", &path, &json!({}), None)
            .await?
            .problem(),
        (409, "not-reversible")
    );
    // Spent money cannot be reversed.
    let spent = transfer(&world, "spent", "alice", "bob", 900)
        .await?
        .is(201)?;
    transfer(&world, "on", "bob", "world", 1900)
        .await?
        .is(201)?;
    let path = format!(
        "/transactions/{}/reversal",
        spent["id"].as_str().context("read the id")?
    );
    assert_eq!(
        post(&world, "late", &path, &json!({}), None)
            .await?
            .problem(),
        (422, "insufficient-funds")
    );
    check_books(&world.database).await?;
    check_totals(&world).await
});

both!(
    balances_are_cached_until_money_moves,
    |kind: Kind| async move {
        let world = start_with(kind, &["alice", "bob"]).await?;
        let url = format!("{}/accounts/alice", world.ingress_url()?);
        let read = async |known: &str| {
            let response = reqwest::Client::new()
                .get(&url)
                .header("If-None-Match", known)
                .send()
                .await?;
            let header = |name: &str| response.headers()[name].to_str().map(str::to_owned);
            anyhow::Ok((
                response.status().as_u16(),
                header("cache-status")?,
                header("etag")?,
            ))
        };
        let (_, status, version) = read("").await?;
        assert_eq!(status, "oncely; fwd=miss");
        assert_eq!(
            read("\"0\"").await?,
            (200, "oncely; hit; detail=local".to_owned(), version.clone())
        );
        assert_eq!(read(&version).await?.0, 304);
        transfer(&world, "t", "alice", "bob", 1).await?.is(201)?;
        let (again, status, now) = read(&version).await?;
        assert_eq!((again, status.as_str()), (200, "oncely; fwd=miss"));
        assert_ne!(now, version);
        assert_eq!(balance(&world, "alice").await?, 999);
        Ok(())
    }
);
