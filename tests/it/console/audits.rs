//! The books: audits from the console, their list and their differences.

use super::*;

async fn until_audited(world: &World, visit: &Visit, id: u32) -> Result<Value> {
    world
        .eventually(&format!("audit {id} ends"), || async {
            let view = visit.json(&format!("/books/{id}")).await?;
            Ok((!view["ended_at"].is_null()).then_some(view))
        })
        .await
}

both!(
    audits_run_in_the_background_and_are_listed,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let messages = (1..=5).map(NewMessage::insert).chain([failing("f1")]);
        world.nats.publish_all(messages.collect()).await?;
        world.until(OPEN, 1).await?;
        world.quiet(6).await?;
        let visit = Visit::log_in(&world).await?;
        let empty = visit.page("/books").await?;
        assert!(
            empty.text.contains("No audit has run yet."),
            "{}",
            empty.text
        );

        // Nothing is wrong.
        let hour = [("hours", "1"), ("worker", "test")];
        let started = visit.send("/books", &hour).await?;
        assert!(started.text.contains("Audit 1"), "{}", started.text);
        let view = until_audited(&world, &visit, 1).await?;
        assert_eq!(
            (&view["differences"], &view["report"]["workers"][0]["done"]),
            (&0.into(), &5.into()),
            "{view}"
        );
        let page = visit.page("/books/1").await?;
        assert!(
            page.text.contains("The books are correct."),
            "{}",
            page.text
        );

        // Damage is named, with its event and the command that repairs what can be repaired.
        world
            .database
            .execute("delete from oncely.inbox where event_id = 'e3'")
            .await?;
        visit.send("/books", &hour).await?;
        let view = until_audited(&world, &visit, 2).await?;
        assert_eq!(
            view["report"]["differences"][0]["kind"], "message-without-outcome",
            "{view}"
        );
        let page = visit.page("/books/2").await?;
        assert!(
            page.text.contains("/workers/test/events/e3"),
            "{}",
            page.text
        );
        assert!(
            page.text.contains("--repair --worker test"),
            "{}",
            page.text
        );

        // Audits by command are listed, too. A host that ended has interrupted its own.
        let _ = world.oncely(&["audit"]).await;
        let interrupted = "insert into oncely.audit_run (since, is_repair, host, actor)
             select since, is_repair, 'gone:1', actor from oncely.audit_run where id = 1";
        world.database.execute(interrupted).await?;
        let runs = visit.json("/books").await?;
        let runs = runs["runs"].as_array().context("read the audits")?;
        let results: Vec<_> = runs
            .iter()
            .map(|run| (run["id"].as_i64(), run["differences"].as_i64()))
            .collect();
        let expected = [(4, None), (3, Some(1)), (2, Some(1)), (1, Some(0))];
        assert_eq!(
            results,
            expected.map(|(id, differences)| (Some(id), differences))
        );
        let page = visit.page("/books").await?;
        assert!(page.text.contains("interrupted"), "{}", page.text);
        assert!(!page.text.contains(">running<"), "{}", page.text);

        // Windows are limited, and one audit runs at a time.
        let page = visit.send("/books", &[("hours", "999")]).await?;
        assert!(page.text.contains("no known window"), "{}", page.text);
        let running = "update oncely.audit_run set host = (
             select host from oncely.audit_run where id = 1) where id = 4";
        world.database.execute(running).await?;
        let page = visit.send("/books", &hour).await?;
        assert!(page.text.contains("audit 4 is running"), "{}", page.text);
        Ok(())
    }
);
