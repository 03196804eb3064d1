//! Forms: dry run, edit, redrive, close, roll back, retire, parked outputs.

use super::*;

both!(
    a_dead_letter_is_edited_redriven_and_verified_by_forms,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world.nats.publish_all(vec![failing("e1")]).await?;
        world.until(OPEN, 1).await?;
        let visit = Visit::log_in(&world).await?;

        // It would fail again.
        let dry_run = visit.page("/dead-letters/1/dry-run").await?;
        assert!(dry_run.text.contains("same failure"), "{}", dry_run.text);
        assert_eq!(
            visit.json("/dead-letters/1/dry-run").await?["prediction"],
            "same-failure"
        );

        // The changes are shown before they are saved, and a note is required.
        let corrected = r#"{"attempt": 1, "n": 1}"#;
        let edit = [("encoding", "text"), ("body", corrected), ("actor", "ada")];
        let page = Page::of(visit.post("/dead-letters/1/edit", &edit)).await?;
        assert_eq!(page.status, StatusCode::OK);
        assert!(
            page.text.contains("  &quot;attempt&quot;: 99,"),
            "{}",
            page.text
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.dead_letter_edit")
                .await?,
            0
        );
        let mut save = edit.to_vec();
        save.push(("step", "save"));
        let page = Page::of(visit.post("/dead-letters/1/edit", &save)).await?;
        assert_eq!(page.status, StatusCode::UNPROCESSABLE_ENTITY);
        save.push(("note", "wrong attempt"));
        let page = visit.send("/dead-letters/1/edit", &save).await?;
        assert!(
            page.text.contains("dead letter 1 was corrected"),
            "{}",
            page.text
        );
        assert!(page.text.contains("would succeed"), "{}", page.text);

        // The redrive holds to the dry run.
        let plan = |page: &Page| -> Result<Vec<(&'static str, String)>> {
            let names = ["generation", "fingerprint", "version"];
            let fields = names.map(|name| Ok((name, field(&page.text, name).context(name)?)));
            fields.into_iter().collect()
        };
        let plan = plan(&page)?;
        let mut redrive: Vec<(&str, &str)> = plan
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let stale = [
            ("generation", "0"),
            ("fingerprint", "another"),
            ("version", "1"),
        ];
        let page = visit.send("/dead-letters/1/redrive", &stale).await?;
        assert!(
            page.text
                .contains("its result changed since it was planned"),
            "{}",
            page.text
        );
        redrive.push(("note", "fixed"));
        let page = visit.send("/dead-letters/1/redrive", &redrive).await?;
        assert!(
            page.text.contains("dead letter 1 was redriven"),
            "{}",
            page.text
        );
        world
            .until("select count(*) from oncely.inbox where state = 'done'", 1)
            .await?;

        world.until(world.database.unpublished(), 0).await?;
        // It took effect once, and the audit has the name.
        let verified = visit.json("/dead-letters/1/verify").await?;
        assert_eq!(verified["dead_letters"][0]["problem"], Value::Null);
        assert!(
            visit
                .page("/dead-letters/1/verify")
                .await?
                .text
                .contains("took effect once")
        );
        let again = visit.send("/dead-letters/1/redrive", &redrive).await?;
        assert!(again.text.contains("was not redriven"), "{}", again.text);
        let activity = visit.json("/activity").await?;
        let actions: Vec<_> = activity
            .as_array()
            .context("read the activity")?
            .iter()
            .map(|entry| {
                (
                    entry["verb"].as_str().unwrap_or_default(),
                    entry["stated_name"].as_str().unwrap_or_default(),
                )
            })
            .collect();
        let by_ada = ["dlq redrive", "dlq edit"].map(|verb| (verb, "ada"));
        assert_eq!(actions, by_ada, "{activity}");
        let body = Page::of(visit.get("/dead-letters/1/body?edit=0")).await?;
        assert_eq!(body.text, corrected);
        assert_eq!(body.header("content-type"), "application/octet-stream");
        assert!(body.header("content-disposition").starts_with("attachment"));
        books::check(&world).await.map(drop)
    }
);

both!(
    all_dead_letters_of_a_filter_are_closed_together,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let reject = |event| NewMessage::new("in.y", event, "reject", "{}");
        world
            .nats
            .publish_all(vec![reject("c"), reject("d")])
            .await?;
        world.until(OPEN, 2).await?;
        let visit = Visit::log_in(&world).await?;
        let confirm = visit.page("/failures/resolve?subject=in.y").await?;
        assert!(
            confirm.text.contains("Resolve 2 dead letters"),
            "{}",
            confirm.text
        );

        // More than were confirmed are refused.
        let fewer = [("subject", "in.y"), ("count", "1"), ("note", "x")];
        let page = visit.send("/failures/resolve", &fewer).await?;
        assert!(page.text.contains("nothing was changed"), "{}", page.text);
        world.until(OPEN, 2).await?;

        // Closing needs a note.
        let no_note = [("subject", "in.y"), ("count", "2")];
        let page = visit.send("/failures/resolve", &no_note).await?;
        assert!(page.text.contains("a note says why"), "{}", page.text);
        let resolve = [("subject", "in.y"), ("count", "2"), ("note", "by hand")];
        visit.send("/failures/resolve", &resolve).await?;
        world.until(OPEN, 0).await?;
        let states = "select state, count(*) from oncely.dead_letter group by state order by state";
        assert_eq!(
            world
                .database
                .rows("select count(*) from oncely.dead_letter where state = 'resolved'")
                .await?,
            [["2"]],
            "{:?}",
            world.database.rows(states).await?
        );
        books::check(&world).await.map(drop)
    }
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_rolled_back_and_retired_after_a_confirmation() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    world.write_manifest(&manifest("[worker.retry]\nattempts = 7")?)?;
    world.oncely(&["deploy"]).await?;
    let visit = Visit::log_in(&world).await?;
    let page = visit.page("/workers/test/rollback?to=1").await?;
    assert!(
        page.text.contains("Activate version 1 of test?"),
        "{}",
        page.text
    );
    let page = visit.send("/workers/test/rollback", &[("to", "1")]).await?;
    assert!(
        page.text.contains("version 1 of test is active"),
        "{}",
        page.text
    );
    let page = visit.send("/workers/test/rollback", &[("to", "9")]).await?;
    assert!(page.text.contains("flash error"), "{}", page.text);
    let missing = Page::of(visit.get("/workers/test/rollback?to=9")).await?;
    assert_eq!(missing.status, StatusCode::NOT_FOUND);

    // Another name retires nothing.
    let page = visit
        .send("/workers/test/retire", &[("name", "tset")])
        .await?;
    assert!(page.text.contains("nothing was retired"), "{}", page.text);
    let page = visit
        .send("/workers/test/retire", &[("name", "test")])
        .await?;
    assert!(page.text.contains("test is retired"), "{}", page.text);
    assert_eq!(
        world
            .oncely_json(&["workers", "--json"])
            .await?
            .as_array()
            .map(Vec::len),
        Some(0)
    );
    assert!(visit.page("/workers/test").await?.text.contains("retired"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_paused_with_a_reason_and_resumed() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let visit = Visit::log_in(&world).await?;
    let page = visit.page("/workers/test/pause").await?;
    assert!(page.text.contains("Pause test?"), "{}", page.text);
    let note = [("note", "the bank is down")];
    let page = visit.send("/workers/test/pause", &note).await?;
    assert!(page.text.contains("test is paused"), "{}", page.text);
    let paused = || async {
        let page = visit.page("/workers/test").await?;
        Ok(page.text.contains("the bank is down").then_some(()))
    };
    world.eventually("the page shows the pause", paused).await?;
    let page = visit.send("/workers/test/resume", &[]).await?;
    assert!(page.text.contains("test continues"), "{}", page.text);
    let page = visit.send("/workers/test/resume", &[]).await?;
    assert!(page.text.contains("was not paused"), "{}", page.text);
    let activity = visit.json("/activity").await?;
    let verbs: Vec<&str> = activity
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["verb"].as_str())
        .collect();
    assert_eq!(verbs[..3], ["resume", "resume", "pause"], "{activity}");
    Ok(())
}

both!(
    parked_outputs_are_retried_and_dropped,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest("")?).await?;
        world.nats.publish_all(vec![NewMessage::insert(1)]).await?;
        world.quiet(1).await?;
        let polled = match kind {
            Kind::Sqlite => "",
            _ => "via = 'poll', ",
        };
        let park = format!(
            "update oncely.outbox set {polled}published_at = null, stream = null, stream_sequence = null,
                 parked_at = created_at, last_error = '<b>too large</b>' where subject = 'out.effect'"
        );
        world.database.execute(&park).await?;
        let visit = Visit::log_in(&world).await?;
        let listed = visit.json("/outputs").await?;
        let number = listed["outputs"][0]["number"]
            .as_i64()
            .context("find the parked output")?;
        let page = visit.page("/outputs").await?;
        assert!(
            page.text.contains("&lt;b&gt;too large&lt;/b&gt;"),
            "{}",
            page.text
        );
        let now = visit.json("/").await?;
        assert!(now["needs"].to_string().contains("parked"), "{now}");

        // Dropping needs a note; a retry publishes it.
        let output = format!("/outputs/{number}");
        let page = visit.send(&format!("{output}/drop"), &[]).await?;
        assert!(page.text.contains("a note says why"), "{}", page.text);
        let page = visit.send(&format!("{output}/retry"), &[]).await?;
        assert!(page.text.contains("was retried"), "{}", page.text);
        let page = visit
            .send(&format!("{output}/drop"), &[("note", "late")])
            .await?;
        assert!(
            page.text.contains("is not parked any more"),
            "{}",
            page.text
        );
        world.until(world.database.unpublished(), 0).await
    }
);
