//! One batch in the harness itself: runs of each item when one fails, at every position.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use bytes::Bytes;
use oncely::cache::Cache;
use oncely::config::manifest::Manifest;
use oncely::config::{CacheSettings, CompileSettings};
use oncely::delivery::{BatchResult, ConnectionBreaks, Delivery, Savepoints};
use oncely::guest::{Guest, GuestEngine, SharedGuests};
use oncely::metrics::Metrics;
use oncely::model::message::Message;
use oncely::model::verdict::Verdict;
use oncely::store::{PostgresStore, SqliteStore, Store};
use oncely::traces::Traces;
use support::database::{Database, Kind};
use support::eventually::until_at_least;
use support::guests;
use support::world::manifest;

const BATCH: usize = 32;

/// The delivery with a real database and the test component, without a broker.
pub struct DeliveryHarness {
    pub delivery: Delivery,
    pub database: Database,
    _folder: tempfile::TempDir,
}

impl DeliveryHarness {
    pub async fn new(kind: Kind, settings: &str) -> Result<DeliveryHarness> {
        let folder = tempfile::tempdir()?;
        let database = Database::fresh(kind, folder.path()).await?;
        let store: Arc<Store> = match &database {
            Database::Sqlite(path) => Arc::new(SqliteStore::open(path).await?.into()),
            Database::Postgres { host, .. } => {
                Arc::new(PostgresStore::connect(host, 4).await?.into())
            }
        };
        let entry = Manifest::parse(&manifest(settings)?, "oncely.toml")?
            .workers
            .remove(0);
        let wasm = std::fs::read(guests::component()?).context("read the test component")?;
        let compile = CompileSettings {
            program: guests::oncely()?,
            ..CompileSettings::default()
        };
        let engine = GuestEngine::new(&folder.path().join("compiled"), compile)?;
        let guest = Guest::load(&engine, wasm.clone().into()).await?;
        let digest = "a".repeat(64);
        store.put_component(&digest, &wasm).await?;
        store
            .deploy(
                "test",
                &digest,
                "{}",
                &entry.migrations_for(store.dialect())?,
            )
            .await?;
        let metrics = Arc::<Metrics>::default();
        let delivery = Delivery {
            store,
            guest,
            config: Arc::new(entry.worker.resolve_config()?),
            worker: Arc::new(entry.worker),
            version: 1,
            payload_max: 1 << 20,
            cache: Cache::open(&CacheSettings::default(), Arc::clone(&metrics))?,
            connection_breaks: ConnectionBreaks::default(),
            health: Arc::default(),
            traces: Traces::default(),
            metrics,
        };
        Ok(DeliveryHarness {
            delivery,
            database,
            _folder: folder,
        })
    }

    pub async fn deliver(&self, batch: &[Arc<Message>]) -> Result<BatchResult> {
        Ok(self.delivery.deliver(batch, Savepoints::None).await?)
    }
}

pub fn message(event_id: &str, behaviour: &str, body: &str) -> Arc<Message> {
    Arc::new(Message {
        event_id: event_id.to_owned(),
        subject: "in.x".to_owned(),
        headers: vec![
            ("do".to_owned(), behaviour.to_owned()),
            ("Account".to_owned(), format!("a{event_id}")),
        ],
        body: Bytes::copy_from_slice(body.as_bytes()),
        origin: None,
        redriven: None,
    })
}

/// A batch of 32 whose item at `place` fails by `behaviour`.
fn batch_with(behaviour: &str, place: usize) -> Vec<Arc<Message>> {
    let item = |n: usize| {
        let behaviour = if n == place { behaviour } else { "insert" };
        message(&format!("{place:02}-{n:02}"), behaviour, r#"{"n": 1}"#)
    };
    (0..BATCH).map(item).collect()
}

async fn one_failing_item_at_each_position(kind: Kind, behaviour: &str, reruns: u32) -> Result<()> {
    let harness = DeliveryHarness::new(kind, "[worker.retry]\nattempts = 1\n").await?;
    for place in 0..BATCH {
        let batch = batch_with(behaviour, place);
        let delivered = harness.deliver(&batch).await?;
        assert!(
            delivered.reruns <= reruns,
            "with a failure at {place} the batch was rerun {} times",
            delivered.reruns
        );
        for (n, verdict) in delivered.verdicts.iter().enumerate() {
            let right = match verdict {
                Verdict::Done(_) => n != place,
                Verdict::Dead(dead_letter) => n == place && dead_letter.attempts == 1,
                _ => false,
            };
            assert!(
                right,
                "with the poison at {place}, unexpected verdict of item {n}: {verdict:?}"
            );
        }
        let output_ids: BTreeSet<&str> = delivered
            .outputs
            .iter()
            .map(|output| output.id.as_str())
            .collect();
        assert_eq!(
            (output_ids.len(), delivered.outputs.len()),
            (BATCH - 1, BATCH - 1)
        );
    }
    let number = async |sql: &str| harness.database.number(sql).await;
    let (all, good) = (BATCH as i64, (BATCH * (BATCH - 1)) as i64);
    assert_eq!(number("select count(*) from oncely.attempt").await?, all);
    assert_eq!(
        number("select count(*) from oncely.inbox where state = 'done'").await?,
        good
    );
    assert_eq!(
        number("select count(distinct event_id) from app.effect").await?,
        good
    );
    Ok(())
}

both!(
    a_failing_item_without_sql_costs_other_items_nothing,
    |kind: Kind| async move { one_failing_item_at_each_position(kind, "reject", 0).await }
);

both!(
    a_failing_item_that_ran_sql_costs_others_one_more_run,
    |kind: Kind| async move { one_failing_item_at_each_position(kind, "insert,trap", 1).await }
);

both!(
    many_failing_items_cost_one_more_run_or_none_with_savepoints,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, "[worker.retry]\nattempts = 1\n").await?;
        for (round, savepoints) in [(0, Savepoints::None), (1, Savepoints::PerItem)] {
            let with_savepoints = savepoints == Savepoints::PerItem;
            let behaviour = |n: usize| match n % 4 {
                1 => "insert,reject",
                2 => "insert,trap",
                3 => "sql_text",
                _ => "insert",
            };
            let body = r#"{"n": 1, "sql": "insert into effect values (null, null, null, null)"}"#;
            let item = |n: usize| message(&format!("{round}-{n:02}"), behaviour(n), body);
            let batch: Vec<_> = (0..BATCH).map(item).collect();
            let delivered = harness.delivery.deliver(&batch, savepoints).await?;
            assert_eq!(delivered.reruns, u32::from(!with_savepoints));
            assert_eq!(
                delivered.savepoint_rollbacks,
                if with_savepoints { 24 } else { 23 }
            );
            for (n, verdict) in delivered.verdicts.iter().enumerate() {
                let right = if n % 4 == 0 {
                    matches!(verdict, Verdict::Done(_))
                } else {
                    matches!(verdict, Verdict::Dead(_))
                };
                assert!(right, "unexpected verdict of item {n}: {verdict:?}");
            }
        }
        let number = async |sql: &str| harness.database.number(sql).await;
        assert_eq!(number("select count(*) from oncely.inbox").await?, 2 * 8);
        assert_eq!(
            number("select count(distinct event_id) from app.effect").await?,
            2 * 8
        );
        assert_eq!(number("select count(*) from app.effect").await?, 2 * 8 * 2);
        assert_eq!(number("select count(*) from oncely.attempt").await?, 2 * 24);
        Ok(())
    }
);

/// A statement that ends its own session would break the connection on every attempt. The message
/// becomes a dead letter, and its neighbours take effect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_whose_statement_ends_its_session_fails_alone() -> Result<()> {
    let harness = DeliveryHarness::new(Kind::Postgres, "[worker.retry]\nattempts = 1\n").await?;

    // Created by a superuser: guests have no privilege on the inner function.
    let leave = "create function app_default.leave() returns void language sql security definer
        as 'select pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())'";
    harness.database.execute(leave).await?;
    let item = |n: usize| match n {
        3 => message(
            "leaves",
            "insert,sql_text",
            r#"{"n": 1, "sql": "select leave()"}"#,
        ),
        n => message(&format!("stays{n}"), "insert", r#"{"n": 1}"#),
    };
    let batch: Vec<_> = (0..8).map(item).collect();
    let mut tries = 0;
    let delivered = loop {
        tries += 1;
        match harness.deliver(&batch).await {
            Ok(delivered) => break delivered,
            Err(error) => assert!(tries < 5, "{error:#}"),
        }
    };

    // Once in the batch, once alone, and once more: an outage would be over by then.
    assert_eq!(tries, 2);
    for (n, verdict) in delivered.verdicts.iter().enumerate() {
        let right = match verdict {
            Verdict::Done(_) | Verdict::Duplicate(_) => n != 3,
            Verdict::Dead(dead_letter) => {
                n == 3 && dead_letter.code.as_deref() == Some("connection-broken")
            }
            _ => false,
        };
        assert!(right, "unexpected verdict of item {n}: {verdict:?}");
    }
    assert_eq!(
        harness
            .database
            .number("select count(distinct event_id) from app.effect")
            .await?,
        7
    );
    Ok(())
}

/// The server counts the calls of the definer function that reads state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_keys_are_read_for_a_batch_with_one_statement() -> Result<()> {
    let harness = DeliveryHarness::new(
        Kind::Postgres,
        "state_keys = [\"{header:Account}\", \"{header:Absent}\"]",
    )
    .await?;
    let Database::Postgres { direct, .. } = &harness.database else {
        unreachable!()
    };
    let name = direct
        .rsplit('/')
        .next()
        .context("find the database's name")?;
    harness
        .database
        .execute(&format!(
            "alter database \"{name}\" set track_functions = 'pl'"
        ))
        .await?;

    // Only connections opened from now on are counted.
    let store = Store::from(PostgresStore::connect(direct, 4).await?);
    let delivery = Delivery {
        store: Arc::new(store),
        ..harness.delivery.clone()
    };

    // Two batches
    for round in 0..2 {
        let count = |n: usize| {
            message(
                &format!("{round}-{n}"),
                "state_counter",
                &format!(r#"{{"key": "a{round}-{n}"}}"#),
            )
        };
        let batch: Vec<_> = (0..BATCH).map(count).collect();
        let delivered = delivery.deliver(&batch, Savepoints::None).await?;
        assert!(
            delivered
                .verdicts
                .iter()
                .all(|verdict| matches!(verdict, Verdict::Done(_)))
        );
    }

    // A session's counts become visible when it ends.
    delivery.store.close().await;
    let calls =
        "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname = 'load_state'";
    let counted = until_at_least("calls", 2, || harness.database.number(calls));
    assert_eq!(counted.await?, 2);
    assert_eq!(
        harness
            .database
            .number("select count(*) from oncely.state where version = 1")
            .await?,
        2 * BATCH as i64
    );
    Ok(())
}

both!(
    prefetched_state_is_consistent_across_items,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, "state_keys = [\"same\", \"never-used\"]").await?;
        let count = |n: usize| message(&format!("e{n}"), "state_counter", r#"{"key": "same"}"#);
        for round in 0..3 {
            let batch: Vec<_> = (round * BATCH..(round + 1) * BATCH).map(count).collect();
            harness.deliver(&batch).await?;
        }
        let rows = harness
            .database
            .rows("select key, version from oncely.state")
            .await?;
        assert_eq!(rows, [["same".to_owned(), (3 * BATCH).to_string()]]);
        Ok(())
    }
);

// Otherwise the dead letter of the other body would settle the event, and the first message could
// not be retried.
both!(
    another_body_with_the_event_id_waits_while_the_first_is_retried,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, "[worker.retry]\nattempts = 3\n").await?;
        let first = message("e", "fail_once", "");
        let other = message("e", "insert", r#"{"n": 0}"#);
        let delivered = harness.deliver(&[first.clone(), other.clone()]).await?;
        assert!(
            matches!(
                delivered.verdicts.as_slice(),
                [Verdict::Retry { .. }, Verdict::Wait { .. }]
            ),
            "{:?}",
            delivered.verdicts
        );
        let delivered = harness.deliver(&[first, other]).await?;
        assert!(
            matches!(
                delivered.verdicts.as_slice(),
                [Verdict::Done(_), Verdict::Dead(_)]
            ),
            "{:?}",
            delivered.verdicts
        );
        Ok(())
    }
);

/// Workers with the same component share its linked guest, and the component is read once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_component_is_loaded_once_for_all_workers_that_run_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let compile = CompileSettings {
        program: guests::oncely()?,
        ..CompileSettings::default()
    };
    let engine = GuestEngine::new(&folder.path().join("compiled"), compile)?;
    let wasm = std::fs::read(guests::component()?).context("read the test component")?;
    let (shared, reads) = (SharedGuests::default(), AtomicUsize::new(0));
    let load = async || {
        let read = async || {
            reads.fetch_add(1, Ordering::Relaxed);
            Ok(wasm.clone().into())
        };
        shared.get(&engine, "digest", read).await
    };
    let (one, other) = tokio::try_join!(load(), load())?;
    assert_eq!(reads.load(Ordering::Relaxed), 1);

    // Nothing is kept for workers that have ended.
    drop((one, other));
    load().await?;
    assert_eq!(reads.load(Ordering::Relaxed), 2);

    // A component that cannot be loaded is tried again.
    let missing = async || Err(anyhow::anyhow!("missing"));
    assert!(shared.get(&engine, "other", missing).await.is_err());
    let read = async || Ok(wasm.clone().into());
    shared.get(&engine, "other", read).await.map(drop)
}
