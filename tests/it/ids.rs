//! Event ids and output ids against publishers and workers that choose them freely.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use support::database::Kind;
use support::guests;
use support::nats::ToPublish;
use support::world::{PATIENCE, QUICK_RETRIES, World, manifest};

/// A second worker `other`, which takes `in.other` only and publishes to the same stream.
fn with_other(settings: &str) -> Result<String> {
    let component = guests::component()?;
    Ok(format!(
        "{}\n[[worker]]\nname = \"other\"\ncomponent = \"{}\"\nstream = \"IN\"\nsubjects = [\"in.other\"]\n\
         outputs = [\"out.>\"]\n{settings}",
        manifest(&format!("subjects = [\"in.x\"]\n{settings}"))?,
        component.display()
    ))
}

/// A message with these headers and no others but its behaviour.
fn with_headers(headers: &[(&str, &str)], behaviour: &str, options: &str) -> ToPublish {
    let headers = headers.iter().copied().chain([("do", behaviour)]);
    ToPublish {
        subject: "in.x".to_owned(),
        headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        body: options.as_bytes().to_vec(),
    }
}

async fn until_stored(world: &World, stream: &str, count: usize) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let stored = world.nats.read_stream(stream).await?.len();
        if stored == count {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{stream} holds {stored} messages, not {count}:\n{}", world.host_log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

both!(a_forged_pointer_runs_no_dead_letter_of_another_worker, |kind: Kind| async move {
    let world = World::start(kind, &with_other(QUICK_RETRIES)?).await?;
    world.nats.publish_all(vec![ToPublish::new("in.x", "e1", "fail", r#"{"after_ms": "#)]).await?;
    world.until("select count(*) from oncely.dead_letter where state = 'open'", 1).await?;
    // Corrected and redriven, it waits for its second attempt for a minute.
    let corrected = world.folder.path().join("corrected.json");
    std::fs::write(&corrected, r#"{"after_ms": 60000}"#)?;
    let path = corrected.display().to_string();
    world.oncely(&["dlq", "edit", "1", "--body", &path, "--note", "it was cut"]).await?;
    world.oncely(&["dlq", "redrive", "1", "--wait", "0s"]).await?;
    world.until("select count(*) from oncely.attempt where error like '%for a while%'", 1).await?;
    let pointer = |worker: &str, letter: &str, generation: &str| ToPublish {
        subject: format!("oncely.redrive.{worker}"),
        headers: [("Oncely-Letter", letter), ("Oncely-Generation", generation)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
        body: Vec::new(),
    };
    let forged = [("1", "1"), ("01", "1"), ("1", "2"), ("2", "1"), ("x", "1"), ("1", "")];
    world.nats.publish_all(forged.map(|(letter, generation)| pointer("other", letter, generation)).to_vec()).await?;
    // The queue keeps the pointer to the worker that the dead letter belongs to.
    until_stored(&world, "ONCELY_REDRIVE", 1).await?;
    assert_eq!(world.database.rows("select distinct worker from oncely.attempt").await?, [["test"]]);
    assert_eq!(world.database.number("select count(*) from oncely.dead_letter where state = 'redriven'").await?, 1);
    assert_eq!(world.database.number("select count(*) from oncely.inbox where worker = 'other'").await?, 0);
    Ok(())
});

both!(events_with_an_empty_ce_id_are_told_apart_by_the_next_source, |kind: Kind| async move {
    let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
    let empty = |id: &str, n: u32| {
        let headers = [("ce-id", ""), ("ce-source", "/shop"), ("Nats-Msg-Id", id)];
        with_headers(&headers, "insert", &format!(r#"{{"delta": {n}}}"#))
    };
    let without_any = |n: u32| {
        let headers = [("ce-id", ""), ("ce-source", "/shop"), ("Nats-Msg-Id", "")];
        with_headers(&headers, "insert", &format!(r#"{{"delta": {n}}}"#))
    };
    world.nats.publish_all(vec![empty("m1", 1), empty("m2", 2), without_any(3), without_any(4)]).await?;
    world.quiet(4).await?;
    assert_eq!(world.database.number("select count(*) from oncely.dead_letter").await?, 0);
    let named = "select event_id from oncely.inbox where event_id in ('m1', 'm2') order by 1";
    assert_eq!(world.database.rows(named).await?, [["m1"], ["m2"]]);
    assert_eq!(world.database.number("select count(*) from oncely.inbox where event_id like 'IN@%'").await?, 2);
    Ok(())
});

both!(the_id_of_a_place_cannot_be_taken_in_advance, |kind: Kind| async move {
    let world = World::start(kind, &manifest(QUICK_RETRIES)?).await?;
    world.nats.publish_all(vec![with_headers(&[], "insert", r#"{"n": 1}"#)]).await?;
    world.quiet(1).await?;
    let place = world.database.rows("select event_id from oncely.inbox").await?[0][0].clone();
    let (stream, _) = place.rsplit_once(':').unwrap_or_default();
    let taken = |sequence: u64| format!("{stream}:{sequence}");
    // Sent as every source of an id, ahead of the messages that will stand at these places.
    let strangers = vec![
        with_headers(&[("Nats-Msg-Id", &taken(5))], "insert", r#"{"n": 0}"#),
        with_headers(&[("ce-id", &taken(6))], "insert", r#"{"n": 0}"#),
        with_headers(&[("ce-id", &taken(7)), ("ce-source", "")], "insert", r#"{"n": 0}"#),
    ];
    world.nats.publish_all(strangers).await?;
    world.nats.publish_all((5..8).map(|_| with_headers(&[], "insert", r#"{"n": 1}"#)).collect()).await?;
    world.quiet(7).await?;
    let reasons = "select reason, count(*) from oncely.dead_letter group by reason";
    assert_eq!(world.database.rows(reasons).await?, [["invalid-id", "3"]]);
    for sequence in 5..8 {
        let settled = format!("select state from oncely.inbox where event_id = '{}'", taken(sequence));
        assert_eq!(world.database.rows(&settled).await?, [["done"]]);
    }
    let refused = world.oncely(&["publish", "in.x", "{}", "--id", &taken(9)]).await.unwrap_err().to_string();
    assert!(refused.contains("reserved for messages without an id"), "{refused}");
    assert!(world.oncely(&["publish", "in.x", "{}", "--id", ""]).await.is_err());
    Ok(())
});
