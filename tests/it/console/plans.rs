//! Plans of redrives, the jobs that they start, and notes on groups.

use super::*;

/// Messages that die, and take effect when they are redriven.
fn failing_once(from: usize, to: usize) -> Vec<NewMessage> {
    (from..to)
        .map(|n| NewMessage::new("in.x", &format!("e{n}"), "fail_once,insert", r#"{"n": 1}"#))
        .collect()
}

/// The fields of the form of a plan.
fn planned(page: &Page) -> Result<Vec<(&'static str, String)>> {
    let fields = ["count", "below"].map(|name| Ok((name, field(&page.text, name).context(name)?)));
    fields.into_iter().collect()
}

fn as_fields<'f>(fields: &'f [(&'static str, String)]) -> Vec<(&'f str, &'f str)> {
    fields
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect()
}

async fn until_job_is(world: &World, visit: &Visit, id: u32, state: &str) -> Result<Value> {
    world
        .eventually(&format!("job {id} is {state}"), || async {
            let view = visit.json(&format!("/jobs/{id}")).await?;
            Ok((view["job"]["state"] == state).then_some(view))
        })
        .await
}

both!(
    a_plan_starts_a_job_that_is_paused_resumed_and_verified,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        let reject = NewMessage::new("in.y", "bad", "reject", "{}");
        world.nats.publish_all(failing_once(0, 40)).await?;
        world.nats.publish_all(vec![reject]).await?;
        world.until(OPEN, 41).await?;
        let visit = Visit::log_in(&world).await?;

        // The plan: classes, hazards and dry runs of a sample.
        let path = "/failures/redrive?subject=in.x";
        let page = visit.page(path).await?;
        assert!(
            page.text.contains("Redrive 40 dead letters"),
            "{}",
            page.text
        );
        assert!(page.text.contains("would succeed"), "{}", page.text);
        let plan = visit.json(path).await?;
        assert_eq!(plan["total"], 40);
        let sampled = plan["sample"].as_array().map(Vec::len);
        assert!(
            sampled.is_some_and(|sampled| (1..=12).contains(&sampled)),
            "{plan}"
        );
        assert_eq!(plan["classes"][0]["dead_letters"], 40);
        assert_eq!(plan["classes"][0]["predictions"]["would-succeed"], 12);
        assert_eq!(plan["hazards"], serde_json::json!([]));
        let failing = visit.json("/failures/redrive?worker=test").await?;
        assert!(
            failing["hazards"].to_string().contains("would fail again"),
            "{failing}"
        );

        // Later dead letters do not belong to it, and fewer planned ones are refused.
        let form = planned(&page)?;
        let fewer = [("subject", "in.x"), ("count", "39"), form_below(&form)];
        let refused = visit.send("/failures/redrive", &fewer).await?;
        assert!(
            refused.text.contains("nothing was changed"),
            "{}",
            refused.text
        );
        world.nats.publish_all(failing_once(40, 41)).await?;
        world.until(OPEN, 42).await?;
        let mut start = as_fields(&form);
        start.extend([
            ("subject", "in.x"),
            ("rate", "20"),
            ("actor", "ada"),
            ("note", "fixed"),
        ]);
        let started = visit.send("/failures/redrive", &start).await?;
        assert!(
            started.text.contains("job 1 redrives 40 dead letters"),
            "{}",
            started.text
        );

        // Pause: the plan of the rest names the job.
        let change = async |action| visit.send("/jobs/1/change", &[("action", action)]).await;
        let paused = change("pause").await?;
        assert!(paused.text.contains("job 1 is paused"), "{}", paused.text);
        let plan = visit.json("/failures/redrive?worker=test").await?;
        assert!(
            plan["hazards"].to_string().contains("Job 1 is paused"),
            "{plan}"
        );
        change("resume").await?;
        let done = until_job_is(&world, &visit, 1, "done").await?;
        assert_eq!(
            (&done["job"]["redriven"], &done["job"]["total"]),
            (&40.into(), &40.into())
        );
        let listed = visit.page("/jobs").await?;
        assert!(
            listed.text.contains("fixed") && listed.text.contains("ada"),
            "{}",
            listed.text
        );
        let rest = visit.json("/jobs/1?from=30").await?;
        assert_eq!(rest["items"].as_array().map(Vec::len), Some(10));
        let ended = change("cancel").await?;
        assert!(ended.text.contains("has ended"), "{}", ended.text);

        // The proof.
        world
            .until("select count(*) from oncely.inbox where state = 'done'", 40)
            .await?;
        world.until(world.database.unpublished(), 0).await?;
        let verified = visit.json("/jobs/1/verify").await?;
        let checks = verified["dead_letters"]
            .as_array()
            .context("read the checks")?;
        assert_eq!(checks.len(), 40);
        assert!(
            checks.iter().all(|check| check["problem"].is_null()),
            "{verified}"
        );
        let page = visit.page("/jobs/1/verify").await?;
        assert!(
            page.text.contains("No event took effect twice"),
            "{}",
            page.text
        );

        // The activity log has the job and its changes.
        let activity = visit.json("/activity").await?;
        let verbs: Vec<&str> = activity
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|entry| entry["verb"].as_str())
            .collect();
        let expected = [
            "dlq jobs cancel",
            "dlq jobs resume",
            "dlq jobs pause",
            "dlq redrive",
        ];
        assert_eq!(verbs, expected, "{activity}");
        books::check(&world).await.map(drop)
    }
);

fn form_below<'f>(form: &'f [(&'static str, String)]) -> (&'f str, &'f str) {
    let below = form.iter().find(|(name, _)| *name == "below");
    ("below", below.map_or("", |(_, value)| value.as_str()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn selected_dead_letters_are_redriven_and_no_selection_is_none() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest(ONE_ATTEMPT)?).await?;
    world.nats.publish_all(failing_once(0, 4)).await?;
    world.until(OPEN, 4).await?;
    let visit = Visit::log_in(&world).await?;
    let listed = visit.page("/failures").await?;
    assert!(
        listed.text.contains("Select dead letter 3"),
        "{}",
        listed.text
    );

    // An empty selection does not mean all.
    let page = Page::of(visit.get("/failures/redrive?selected=1")).await?;
    assert_eq!(page.header("location"), "/failures");
    let page = visit.page("/failures").await?;
    assert!(
        page.text.contains("no dead letter is selected"),
        "{}",
        page.text
    );

    let page = visit.page("/failures/redrive?selected=1&id=2&id=3").await?;
    assert!(
        page.text.contains("Redrive 2 dead letters"),
        "{}",
        page.text
    );
    assert!(
        page.text.contains("oncely dlq redrive 2 3"),
        "{}",
        page.text
    );
    let form = planned(&page)?;
    let mut start = as_fields(&form);
    start.extend([("id", "2"), ("id", "3"), ("rate", "0")]);
    let page = visit.send("/failures/redrive", &start).await?;
    assert!(
        page.text.contains("job 1 redrives 2 dead letters"),
        "{}",
        page.text
    );
    until_job_is(&world, &visit, 1, "done").await?;
    // Until they are handled, they are redriven and not closed.
    let done = "select count(*) from oncely.inbox where state = 'done'";
    world.until(done, 2).await?;

    // A dead letter that was redriven since is refused, and named.
    let repeated = [("id", "2"), ("count", "1"), ("below", "9")];
    let page = visit.send("/failures/redrive", &repeated).await?;
    assert!(
        page.text.contains("no dead letter matches any more"),
        "{}",
        page.text
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_names_paused_and_missing_workers() -> Result<()> {
    let world = World::start(Kind::Sqlite, &manifest(ONE_ATTEMPT)?).await?;
    world.nats.publish_all(failing_once(0, 1)).await?;
    world.until(OPEN, 1).await?;
    let visit = Visit::log_in(&world).await?;
    world
        .oncely(&["pause", "test", "--note", "the bank is down"])
        .await?;
    let plan = visit.json("/failures/redrive").await?;
    assert!(
        plan["hazards"]
            .to_string()
            .contains("Worker test is paused"),
        "{plan}"
    );
    world.oncely(&["retire", "test"]).await?;
    let plan = visit.json("/failures/redrive").await?;
    assert!(
        plan["hazards"].to_string().contains("is not deployed"),
        "{plan}"
    );

    // A dry run executes the handler, and a job changes dead letters.
    let created = ["token", "create", "reader", "--role", "view", "--json"];
    let created = world.oncely_json(&created).await?;
    let secret = created["secret"].as_str().context("find the new token")?;
    let reader = Visit::log_in_with(&world, secret).await?;
    let refused = Page::of(reader.get("/failures/redrive")).await?;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    for path in [
        "/failures/redrive",
        "/jobs/1/change",
        "/groups/x/note",
        "/books",
    ] {
        let refused = Page::of(reader.post(path, &[])).await?;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{path}");
    }
    Ok(())
}

both!(
    a_group_keeps_its_owner_and_its_note,
    |kind: Kind| async move {
        let world = World::start(kind, &manifest(ONE_ATTEMPT)?).await?;
        world.nats.publish_all(vec![failing("e1")]).await?;
        world.until(OPEN, 1).await?;
        let visit = Visit::log_in(&world).await?;
        let groups = || world.oncely_json(&["dlq", "list", "--groups", "--closed", "--json"]);
        let listed = groups().await?;
        assert_eq!(listed[0]["note"], Value::Null);
        let group = listed[0]["group"]["id"]
            .as_str()
            .context("find the group")?;
        let path = format!("/groups/{group}/note");

        // The form sets both, and a browser's line breaks become those of a text.
        let note = "<b>the bank</b>\r\nis down \u{202e}";
        let page = visit
            .send(&path, &[("owner", "payments"), ("note", note)])
            .await?;
        assert!(
            page.text.contains("owner and note of the group are saved"),
            "{}",
            page.text
        );
        assert!(
            page.text.contains("&lt;b&gt;the bank&lt;/b&gt;"),
            "{}",
            page.text
        );
        assert!(!page.text.contains("<b>the bank"), "{}", page.text);
        let written = &groups().await?[0]["note"];
        assert_eq!(written["owner"], "payments");
        assert_eq!(written["note"], "<b>the bank</b>\nis down \u{202e}");
        let listed = visit.page("/failures").await?;
        assert!(listed.text.contains("payments"), "{}", listed.text);

        // The command changes one of them. The table shows both.
        let set = [
            "dlq",
            "note",
            group,
            "--note",
            "bank called",
            "--actor",
            "ada",
        ];
        let said = world.oncely(&set).await?;
        assert!(
            said.contains("payments") && said.contains("bank called"),
            "{said}"
        );
        let table = world.oncely(&["dlq", "list", "--groups"]).await?;
        assert!(
            table.contains("OWNER") && table.contains("bank called"),
            "{table}"
        );
        assert_eq!(groups().await?[0]["note"]["stated_name"], "ada");

        // They stay after the dead letters are closed, and are there when the failure comes back.
        world
            .oncely(&["dlq", "resolve", "1", "--note", "x"])
            .await?;
        world.nats.publish_all(vec![failing("e2")]).await?;
        world.until(OPEN, 1).await?;
        let open = world
            .oncely_json(&["dlq", "list", "--groups", "--json"])
            .await?;
        assert_eq!(open[0]["note"]["note"], "bank called");

        // Empty texts remove both. Other groups and long texts are refused.
        visit.send(&path, &[("owner", " "), ("note", "")]).await?;
        assert_eq!(groups().await?[0]["note"], Value::Null);
        let long = "x".repeat(2_001);
        let page = visit.send(&path, &[("note", &long)]).await?;
        assert!(page.text.contains("the limit is 2000"), "{}", page.text);
        let unknown = world.oncely(&["dlq", "note", "0000", "--owner", "x"]).await;
        let unknown = unknown.unwrap_err().to_string();
        assert!(unknown.contains("there is no group 0000"), "{unknown}");
        let activity = visit.json("/activity").await?;
        let noted = activity.as_array().into_iter().flatten();
        let noted = noted.filter(|entry| entry["verb"] == "dlq note").count();
        assert_eq!(noted, 4, "{activity}");
        Ok(())
    }
);
