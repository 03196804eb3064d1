//! CloudEvents in binary and in structured mode.

use serde_json::{Value, json};
use support::books;
use support::database::Kind;
use support::nats::NewMessage;
use support::world::{World, manifest};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A message with a content type. Its event id comes from headers or body.
fn message(behaviour: &str, headers: &[(&str, &str)], body: &str) -> NewMessage {
    let mut headers: Vec<(String, String)> = headers
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    headers.push(("do".to_owned(), behaviour.to_owned()));
    NewMessage {
        subject: "in.x".to_owned(),
        headers,
        body: body.as_bytes().to_vec(),
    }
}

both!(
    events_in_both_modes_have_one_id_and_batches_are_refused,
    |kind: Kind| async move {
        let folder = tempfile::tempdir()?;
        let schema = folder.path().join("data.json");
        std::fs::write(&schema, r#"{"properties": {"x": {"maximum": 1}}}"#)?;
        let schema = format!(
            "[[worker.schema]]\nsubject = \"in.x\"\nfile = \"{}\"",
            schema.display()
        );
        let world = World::start(kind, &manifest(&schema)?).await?;
        let structured = (
            "Content-Type",
            "application/cloudevents+json; charset=UTF-8",
        );
        let event = |id: &str, x: u32| {
            let body = json!({
                "specversion": "1.0", "id": id, "source": "/shop", "type": "t", "data": {"x": x},
            });
            message("insert", &[structured], &body.to_string())
        };
        let binary = [("ce-id", "2"), ("ce-source", "/shop")];
        let batch = ("Content-Type", "application/cloudevents-batch+json");
        world
            .nats
            .publish_all(vec![
                event("1", 1),
                event("1", 1),
                message("insert", &binary, "{}"),
                message("insert", &binary, "{}"),
                event("3", 2),
                message("insert", &[batch], "[]"),
            ])
            .await?;
        world.quiet(4).await?;
        let books = books::check(&world).await?;
        let effects: Vec<&str> = books.effects.iter().map(String::as_str).collect();
        assert_eq!(effects, ["/shop|1", "/shop|2"]);
        let dead = world
            .database
            .rows("select reason, detail from oncely.dead_letter order by reason")
            .await?;
        assert_eq!(dead[0][0], "invalid-id");
        assert!(dead[0][1].contains("a batch of CloudEvents"), "{dead:?}");
        assert!(
            dead[1][1].starts_with("`/x` does not fit `maximum`"),
            "{dead:?}"
        );
        Ok(())
    }
);

both!(
    outputs_are_cloudevents_in_the_mode_of_the_manifest,
    |kind: Kind| async move {
        let events = |mode: &str| {
            manifest(&format!(
                "[worker.cloudevents]\nmode = \"{mode}\"\nsource = \"/test\"\n\
                 types = {{ \"out.x\" = \"com.example.x\" }}"
            ))
        };
        let world = World::start(kind, &events("binary")?).await?;
        let emit = |id: &str, options: &str| {
            message(
                "emit",
                &[("Nats-Msg-Id", id), ("traceparent", PARENT)],
                options,
            )
        };
        world.nats.publish_all(vec![emit("e1", "{}")]).await?;
        world.quiet(1).await?;
        world.write_manifest(&events("structured")?)?;
        world.oncely(&["deploy"]).await?;
        let other = r#"{"subject": "out.y"}"#;
        world.nats.publish_all(vec![emit("e2", other)]).await?;
        world.quiet(2).await?;

        let stored = world.nats.read_stream("OUT").await?;
        let (binary, structured) = (&stored[0], &stored[1]);
        for (name, value) in [
            ("ce-specversion", "1.0"),
            ("ce-id", "test:e1:0"),
            ("ce-source", "/test"),
            ("ce-type", "com.example.x"),
            ("ce-traceparent", PARENT),
            ("traceparent", PARENT),
            ("Content-Type", "application/json"),
        ] {
            assert_eq!(
                binary.headers.get(name).map(String::as_str),
                Some(value),
                "{name}"
            );
        }
        assert!(binary.headers.contains_key("ce-time"));
        assert_eq!(binary.body, b"0");

        let mut event: Value = serde_json::from_slice(&structured.body)?;
        let time = event["time"].take();
        assert!(
            time.as_str()
                .is_some_and(|time| time.parse::<jiff::Timestamp>().is_ok())
        );
        let expected = json!({
            "specversion": "1.0", "id": "test:e2:0", "source": "/test", "type": "out.y",
            "datacontenttype": "application/json", "traceparent": PARENT, "time": null, "data": 0,
        });
        assert_eq!(event, expected);
        let kind = structured.headers.get("Content-Type").map(String::as_str);
        assert_eq!(kind, Some("application/cloudevents+json"));
        Ok(())
    }
);
