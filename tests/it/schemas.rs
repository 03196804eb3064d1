//! JSON Schemas of messages and outputs.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use support::books;
use support::database::Kind;
use support::guests;
use support::nats::NewMessage;
use support::world::{QUICK_RETRIES, World, manifest, manifest_of};

const INPUT: &str = r#"{
    "type": "object",
    "properties": {"n": {"$ref": "\u0023/$defs/count"}},
    "$defs": {"count": {"type": "integer", "minimum": 0}}
}"#;

/// Writes a schema, and returns its `[[worker.schema]]`.
fn schema(folder: &Path, subject: &str, name: &str, text: &str) -> Result<String> {
    let file = folder.join(name);
    std::fs::write(&file, text).context("write a schema")?;
    Ok(format!(
        "[[worker.schema]]\nsubject = \"{subject}\"\nfile = \"{}\"\n",
        file.display()
    ))
}

fn insert(event: &str, options: &str) -> NewMessage {
    NewMessage::new("in.x", event, "insert", options)
}

/// The event id, reason, code, detail and number of attempts of each dead letter.
async fn dead_letters(world: &World) -> Result<Vec<Vec<String>>> {
    world
        .database
        .rows(
            "select event_id, reason, code, detail, attempts from oncely.dead_letter \
             order by event_id",
        )
        .await
}

both!(
    a_message_that_does_not_fit_its_schema_is_not_handled,
    |kind: Kind| async move {
        let folder = tempfile::tempdir()?;
        let schema = schema(folder.path(), "in.>", "order.json", INPUT)?;
        let settings = format!("concurrency = 1\nbatch = 32\n{QUICK_RETRIES}\n{schema}");
        let mut world = World::start(kind, &manifest(&settings)?).await?;
        world.stop_host().await?;
        let mut messages: Vec<NewMessage> = (0..20)
            .map(|n| insert(&format!("good{n}"), r#"{"n": 1}"#))
            .collect();
        messages.insert(2, insert("bad-field", r#"{"n": -1}"#));
        messages.insert(9, insert("bad-json", "{"));
        messages.push(insert("good3", r#"{"n": 1}"#));
        world.nats.publish_all(messages).await?;
        world.start_host().await?;
        world.quiet(22).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.dead.len()), (20, 2));
        let attempts = "select count(*) from oncely.attempt";
        assert_eq!(world.database.number(attempts).await?, 0);

        let dead = dead_letters(&world).await?;
        let file = folder.path().join("order.json");
        let detail = format!(
            "`/n` does not fit `minimum` of {}: the value is less than the minimum of 0; \
             the value is -1",
            file.display()
        );
        assert_eq!(dead[0], ["bad-field", "rejected", "schema", &detail, "0"]);
        assert!(dead[1][3].starts_with("the body is not JSON"), "{dead:?}");

        // A dry run gives the same reason, and a corrected body is handled.
        let dry_run = world
            .oncely(&["dlq", "redrive", "--all", "--dry-run"])
            .await?;
        assert!(dry_run.contains("does not fit `minimum`"), "{dry_run}");
        let id = "select id from oncely.dead_letter where event_id = 'bad-field'";
        let id = world.database.number(id).await?.to_string();
        let body = folder.path().join("body.json");
        std::fs::write(&body, r#"{"n": 2}"#)?;
        let body = body.to_string_lossy().into_owned();
        let edit = ["dlq", "edit", &id, "--body", &body, "--note", "corrected"];
        world.oncely(&edit).await?;
        world.oncely(&["dlq", "redrive", &id]).await?;
        assert!(books::check(&world).await?.effects.contains("bad-field"));
        Ok(())
    }
);

both!(
    an_output_that_does_not_fit_its_schema_is_refused,
    |kind: Kind| async move {
        let folder = tempfile::tempdir()?;
        let schema = schema(folder.path(), "out.*", "out.json", r#"{"maximum": 1}"#)?;
        let settings = format!("{QUICK_RETRIES}\n{schema}");
        let world = World::start(kind, &manifest(&settings)?).await?;
        let emit = |event: &str, options: &str| NewMessage::new("in.x", event, "emit", options);
        world
            .nats
            .publish_all(vec![
                emit("fits", r#"{"n": 2}"#),
                emit("refused", r#"{"n": 3}"#),
            ])
            .await?;
        world.quiet(2).await?;
        let dead = dead_letters(&world).await?;
        assert_eq!(dead.len(), 1, "{dead:?}");
        assert_eq!(dead[0][..2], ["refused", "output-refused"]);
        assert!(
            dead[0][3].contains("the output to `out.x`: the message does not fit `maximum`"),
            "{dead:?}"
        );
        assert_eq!(world.nats.read_stream("OUT").await?.len(), 2);
        Ok(())
    }
);

both!(
    a_bad_item_costs_the_others_of_a_batch_handler_nothing,
    |kind: Kind| async move {
        let folder = tempfile::tempdir()?;
        let schema = schema(folder.path(), "in.>", "order.json", INPUT)?;
        let settings = format!("concurrency = 1\nbatch = 20\n{schema}");
        let settings = manifest_of(&guests::batch_component()?, &settings);
        let mut world = World::start(kind, &settings).await?;
        world.stop_host().await?;
        let mut messages: Vec<NewMessage> =
            (0..19).map(|n| insert(&format!("e{n}"), "{}")).collect();
        messages.insert(7, insert("bad", r#"{"n": "one"}"#));
        world.nats.publish_all(messages).await?;
        world.start_host().await?;
        world.quiet(20).await?;
        let books = books::check(&world).await?;
        assert_eq!((books.effects.len(), books.dead.len()), (19, 1));
        let stored = world.nats.read_stream("OUT").await?;
        let together = |body: &[u8]| {
            let body: serde_json::Value = serde_json::from_slice(body).ok()?;
            body["batch"].as_u64()
        };
        let together = stored.iter().filter_map(|message| together(&message.body));
        assert_eq!(together.max(), Some(19));
        Ok(())
    }
);

#[tokio::test]
async fn an_invalid_schema_is_not_built_or_deployed() -> Result<()> {
    let mut world = World::start(Kind::Sqlite, &manifest("")?).await?;
    let folder = tempfile::tempdir()?;
    let text = r#"{"properties": {"n": {"type": "number-ish"}}}"#;
    let bad = schema(folder.path(), "in.>", "bad.json", text)?;
    let unused = schema(folder.path(), "other.>", "unused.json", "{}")?;
    for (settings, expected) in [
        (bad, "bad.json is invalid: at `/properties/n/type`: "),
        (unused, "neither receives nor publishes `other.>`"),
    ] {
        let project = tempfile::tempdir()?;
        std::fs::write(project.path().join("oncely.toml"), manifest(&settings)?)?;
        let path = project.path().to_string_lossy().into_owned();
        for command in ["build", "deploy"] {
            let refused = world.oncely(&[command, &path]).await;
            let error = format!("{:#}", refused.err().context("it was not refused")?);
            ensure!(error.contains(expected), "{command}: {error}");
            ensure!(error.contains("oncely.toml:"), "{command}: {error}");
        }
    }
    world.stop_host().await
}
