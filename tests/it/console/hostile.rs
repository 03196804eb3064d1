//! Hostile data: markup, control characters, large bodies, many groups.

use std::time::{Duration, Instant};

use super::*;

/// Server time of a page over 10,000 dead letters. This is a debug build on a busy machine.
const SLOW: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_messages_are_shown_as_text() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest(ONE_ATTEMPT)?).await?;
    let markup = "<script>alert(1)</script>\u{202e}\"'&";
    let options = serde_json::json!({ "message": markup, "code": "<i>" }).to_string();
    let mut message = NewMessage::new("in.x", "a/b?c#d%<img src=x>", "reject", &options);
    message
        .headers
        .push(("x-\"<b>".to_owned(), markup.replace('\u{202e}', "")));
    let large = format!(
        "{{\"message\": \"large\", \"padding\": \"{}\"}}",
        "x".repeat(900_000)
    );
    let large = NewMessage::new("in.x", "large", "reject", &large);
    // The message is dead letter 1.
    for (message, open) in [(message, 1), (large, 2)] {
        world.nats.publish_all(vec![message]).await?;
        world.until(OPEN, open).await?;
    }
    let visit = Visit::log_in(&world).await?;
    let event = "/workers/test/events/a%2Fb%3Fc%23d%25%3Cimg%20src%3Dx%3E";
    for path in [
        "/",
        "/failures",
        "/dead-letters/1",
        "/dead-letters/1/dry-run",
        "/dead-letters/1/edit",
        "/dead-letters/1/verify",
        event,
        "/search?q=%3Cscript%3E",
        "/failures?worker=%3Cscript%3E",
    ] {
        let page = visit.page(path).await?;
        for tag in ["<script", "<img", "<i>", "<b>", "\u{202e}"] {
            // The text in a form is that of the message; the comparison of its changes marks it.
            let is_editable = tag == "\u{202e}" && path.ends_with("/edit");
            assert!(
                is_editable || !page.text.contains(tag),
                "{path} contains {tag}"
            );
        }
    }
    let page = visit.page("/dead-letters/1").await?;
    assert!(
        page.text.contains("&lt;script&gt;alert(1)&lt;/script&gt;"),
        "{}",
        page.text
    );
    assert!(
        page.text
            .contains("<span class=\"escape\">\\u{202e}</span>"),
        "{}",
        page.text
    );

    // A large body is cut, and complete in the download.
    let page = visit.page("/dead-letters/2").await?;
    assert!(page.text.len() < 200_000 && page.text.contains("the beginning"));
    let body = Page::of(visit.get("/dead-letters/2/body")).await?;
    assert!(body.text.len() > 900_000);
    let edit = visit.page("/dead-letters/2/edit").await?;
    assert!(edit.text.contains("too large for a form"));

    // A form that is too large is refused.
    let huge = "x".repeat(5 << 20);
    let page = Page::of(visit.post("/dead-letters/1/edit", &[("body", &huge)])).await?;
    assert_eq!(page.status, StatusCode::PAYLOAD_TOO_LARGE);
    Ok(())
}

both!(
    pages_over_ten_thousand_groups_are_short_and_quick,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        fill(&world).await?;
        let visit = Visit::log_in(&world).await?;
        for path in [
            "/",
            "/failures",
            "/failures?worker=test&reason=rejected",
            "/failures?below=5000",
            "/failures?subject=in.%3E",
            "/failures?subject=none.*",
            "/failures?group=0000000000000007",
            "/workers/test",
            "/activity",
            "/search?q=e77",
            "/search?q=none.%3E",
        ] {
            is_short_and_quick(&visit, path).await?;
        }
        let first = visit.json("/failures").await?;
        assert_eq!(first["dead_letters"].as_array().map(Vec::len), Some(50));
        assert_eq!(first["next_below"], 9951);

        // The plan samples twelve groups, and the page of its job has one page of its dead letters.
        let plan = visit.json("/failures/redrive?worker=test").await?;
        assert_eq!(plan["classes"].as_array().map(Vec::len), Some(12));
        assert_eq!(
            (&plan["total"], &plan["in_other_classes"]),
            (&10_000.into(), &9_988.into())
        );
        let page = visit.page("/failures/drop?worker=test").await?;
        assert!(
            page.text.contains("Drop 10\u{2009}000 dead letters"),
            "{}",
            page.text
        );
        let slow = ["dlq", "redrive", "--all", "--rate", "1", "--detach"];
        world.oncely(&slow).await?;
        for path in ["/jobs", "/jobs/1", "/jobs/1?from=5000"] {
            is_short_and_quick(&visit, path).await?;
        }
        Ok(())
    }
);

async fn is_short_and_quick(visit: &Visit, path: &str) -> Result<()> {
    // The first request warms the connections up.
    Page::of(visit.get(path)).await?;
    let began = Instant::now();
    let page = Page::of(visit.get(path)).await?;
    let took = began.elapsed();
    ensure!(page.status.as_u16() < 400, "{path}: {}", page.text);
    ensure!(
        page.text.len() < 200_000,
        "{path}: {} bytes",
        page.text.len()
    );
    ensure!(took < SLOW, "{path} took {took:?}");
    eprintln!("{path} took {took:?}");
    Ok(())
}

/// Writes 10,000 dead letters, each in a group of its own.
async fn fill(world: &World) -> Result<()> {
    let (numbers, text, blob, id) = match &world.database {
        support::database::Database::Sqlite(_) => (
            "with recursive numbers(n) as (select 1 union all select n + 1 from numbers where n < 10000)",
            "printf('%016d', n)",
            "x'7b7d'",
            "zeroblob(32)",
        ),
        _ => (
            "with numbers as (select generate_series(1, 10000) as n)",
            "lpad(n::text, 16, '0')",
            "'\\x7b7d'::bytea",
            "decode(repeat('00', 32), 'hex')",
        ),
    };
    let group = format!(
        "insert into oncely.dead_letter_group (id, worker, reason, shape)
         {numbers} select {text}, 'test', 'rejected', 'failure ' || n from numbers"
    );
    let dead_letter = format!(
        "insert into oncely.dead_letter (worker, event_id, payload_sha256, state, reason, detail, group_id,
             attempts, version, subject, headers, body)
         {numbers} select 'test', 'e' || n, {id}, 'open', 'rejected', 'failure ' || n, {text}, 0, 1,
             'in.' || n, '[]', {blob} from numbers"
    );
    // SQLite wants the common table expression in front of `insert`.
    let in_order = |statement: String| match &world.database {
        support::database::Database::Sqlite(_) => {
            let rest = statement.replace(numbers, "");
            format!("{numbers} {rest}")
        }
        _ => statement,
    };
    world.database.execute(&in_order(group)).await?;
    world.database.execute(&in_order(dead_letter)).await
}
