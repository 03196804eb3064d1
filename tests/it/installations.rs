//! Two databases on one NATS server: the second installation is refused.

use std::future::ready;
use std::process::{Child, ExitStatus};

use anyhow::{Context, Result};
use support::database::Kind;
use support::eventually::eventually;
use support::nats::NewMessage;
use support::world::{World, manifest};

/// Waits for a process to exit.
async fn ended(child: &mut Child) -> Result<ExitStatus> {
    let exits = || ready(child.try_wait().context("poll a host"));
    let exited = eventually("a host of another installation exits", exits).await;
    if exited.is_err() {
        child.kill().context("kill a host")?;
    }
    exited
}

async fn installation(world: &World) -> Result<String> {
    let rows = world
        .database
        .rows("select id from oncely.installation")
        .await?;
    Ok(rows[0][0].clone())
}

both!(
    a_second_installation_is_refused_and_gets_no_message,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("batch = 4")?).await?;
        world
            .nats
            .publish_all((0..10).map(NewMessage::insert).collect())
            .await?;
        world.quiet(10).await?;
        let id = installation(&world).await?;
        let mut other = world.spawn_other_installation(&world.folder.path().join("other.db"))?;
        assert!(!ended(&mut other).await?.success());
        let said = world.host_log();
        assert!(
            said.contains(&format!("belongs to another installation, {id}")),
            "{said}"
        );
        assert!(
            said.contains("use a separate NATS account for each installation"),
            "{said}"
        );
        assert!(
            said.contains(&format!("oncely run --take-over {id}")),
            "{said}"
        );
        world
            .nats
            .publish_all((10..30).map(NewMessage::insert).collect())
            .await?;
        world.quiet(30).await?;
        world.ready().await
    }
);

both!(
    a_consumer_of_another_installation_is_refused,
    |kind: Kind| async move {
        let mut world = World::without_host(kind, &manifest("batch = 4")?).await?;
        let context = async_nats::jetstream::new(world.nats.client().await?);
        let stream = async_nats::jetstream::stream::Config {
            name: "IN".to_owned(),
            subjects: vec!["in.>".to_owned()],
            ..Default::default()
        };
        let stream = context.create_stream(stream).await?;
        let consumer = async_nats::jetstream::consumer::pull::Config {
            durable_name: Some("oncely-test".to_owned()),
            metadata: [(
                "oncely.installation".to_owned(),
                "00000000000000aa".to_owned(),
            )]
            .into(),
            ..Default::default()
        };
        stream.create_consumer(consumer).await?;
        world.spawn_host()?;
        world.nats.publish_all(vec![NewMessage::insert(0)]).await?;

        // The worker is not even deployed.
        let exits = || ready(Ok((!world.is_host_running()).then_some(())));
        eventually("the host exits", exits).await?;
        let log = world.host_log();
        assert!(
            log.contains(
                "the consumer oncely-test on the stream IN belongs to another installation"
            ),
            "{log}"
        );
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox")
                .await?,
            0
        );

        // The new installation takes over after the operator confirms that the other one is gone.
        world.kill_host()?;
        world
            .host_env
            .push(("ONCELY_TAKE_OVER".to_owned(), "00000000000000aa".to_owned()));
        world.start_host().await?;
        world.quiet(1).await
    }
);

both!(
    an_installation_that_was_taken_over_stops,
    |kind: Kind| async move {
        let mut world = World::start(kind, &manifest("batch = 4")?).await?;
        world
            .nats
            .publish_all((0..10).map(NewMessage::insert).collect())
            .await?;
        world.quiet(10).await?;
        let id = installation(&world).await?;

        // Another installation takes over.
        world.host_env.push(("ONCELY_TAKE_OVER".to_owned(), id));
        let path = world.folder.path().join("other.db");
        let mut other = world.spawn_other_installation(&path)?;
        world.not_ready("belongs to another installation").await?;
        let workers = world.oncely_json(&["workers", "--json"]).await?;
        assert_eq!(workers[0]["state"], "held", "{workers}");
        world
            .nats
            .publish_all((10..30).map(NewMessage::insert).collect())
            .await?;
        let taken = support::database::Database::Sqlite(path);
        world
            .eventually("the new installation has handled 20 messages", || async {
                let handled = taken.number("select count(*) from oncely.inbox").await?;
                anyhow::ensure!(handled >= 20, "it has handled {handled}");
                Ok(Some(()))
            })
            .await?;

        // The first one has stopped handling, and refuses a recovery.
        assert_eq!(
            world
                .database
                .number("select count(*) from oncely.inbox")
                .await?,
            10
        );
        let refused = world
            .oncely(&["recover"])
            .await
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("belongs to another installation"),
            "{refused}"
        );
        other.kill()?;
        other.wait()?;
        Ok(())
    }
);
