//! WAL mode: the order of commits and keys, one reader at a time, and switches of the relay mode.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use support::books;
use support::counting::{check_order, count, counting_messages};
use support::database::{Database, Kind};
use support::eventually::eventually;
use support::nats::NewMessage;
use support::postgres::Cluster;
use support::world::{PATIENCE, QUICK_RETRIES, World, manifest, signal};

use crate::relay_modes::{
    IN_WAL_MODE, RelayMode, lost_outputs_are_published_again, order_across_hosts,
    order_when_the_broker_dies, order_when_the_host_is_killed, publish_parked_output,
    world_with_parked_output,
};

const IN_POLL_MODE: &str = "select count(*) from oncely.relay where mode = 'poll'";
const SLOTS: &str = "select count(*) from pg_replication_slots where database = current_database()";

/// Four lanes and small batches.
fn settings() -> String {
    format!("batch = 8\nconcurrency = 4\nack_wait = \"1s\"\n{QUICK_RETRIES}")
}

/// A world whose hosts request WAL mode.
async fn world_in_wal_mode(cluster: Option<&Cluster>) -> Result<World> {
    let mut world = RelayMode::Wal.world(&settings()).await?;
    if let Some(cluster) = cluster {
        world.database = Database::on(cluster).await?;
    }
    Ok(world)
}

async fn start(world: &mut World) -> Result<()> {
    RelayMode::Wal.start(world).await
}

/// Requests another relay mode, like a starting host.
async fn request_relay_mode(world: &World, how: &str) -> Result<()> {
    world
        .database
        .execute(&format!(
            "update oncely.relay set requested_mode = '{how}', reason = null"
        ))
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_outputs_come_in_order_and_rows_are_written_once() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 600)).await?;
    world.quiet(600).await?;
    check_order(&world, 600).await?;
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.outbox where via = 'wal'")
            .await?,
        600
    );
    assert_eq!(
        world
            .database
            .number("select sum(cardinality(seqs)) from oncely.relay_record")
            .await?,
        600
    );

    // The server publishes its statistics a second later.
    let counted = "select count(*) from pg_stat_user_tables where schemaname = 'oncely' and relname = 'outbox_0' \
                   and n_tup_ins = 600 and n_tup_upd = 0";
    world.until(counted, 1).await?;
    let list = world
        .oncely_json(&["outbox", "list", "--unpublished", "--json"])
        .await?;
    assert_eq!(list, serde_json::json!([]));
    let shown = world.oncely(&["outbox", "show", "5"]).await?;
    assert!(
        shown.contains("state: published") && shown.contains("OUT"),
        "{shown}"
    );

    // All record numbers are confirmed soon after, and no output is waiting.
    world
        .until(
            "select count(*) from oncely.relay_position where published_seq >= 600",
            1,
        )
        .await?;
    let status = world.oncely_json(&["status", "--json"]).await?;
    assert_eq!(status.pointer("/totals/0/unpublished"), Some(&0.into()));
    assert_eq!(status.pointer("/wal/mode"), Some(&"wal".into()), "{status}");
    world.stop_host().await
}

/// The server sends a commit as soon as it is in the WAL, perhaps before its rows are visible. A
/// commit that waits for a standby stays in between. A server process suspended there stays there,
/// while all others continue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_output_is_published_before_its_effects_are_visible() -> Result<()> {
    let cluster = Cluster::start()?;
    let mut world = world_in_wal_mode(Some(&cluster)).await?;
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 20)).await?;
    world.quiet(20).await?;

    // Hold one commit between its WAL record and its visibility
    wait_for_standby(&world, "absent").await?;
    world.nats.publish_all(vec![count(20, "late", 0)]).await?;
    let commits = "from pg_stat_activity join pg_locks using (pid) \
                   where wait_event = 'SyncRep' and relation = 'oncely.inbox'::regclass and mode = 'RowExclusiveLock'";
    world
        .until(&format!("select count(*) {commits}"), 1)
        .await?;
    let between = Stopped::new(
        world
            .database
            .number(&format!("select pid {commits}"))
            .await?,
    )?;
    let end = world
        .database
        .rows("select pg_current_wal_flush_lsn()")
        .await?
        .concat()
        .concat();
    wait_for_standby(&world, "").await?;
    world
        .until(
            &format!("select count(*) from pg_stat_replication where sent_lsn >= '{end}'"),
            1,
        )
        .await?;

    // The reader has received the commit and keeps recording its position.
    for _ in 0..4 {
        let now = world
            .database
            .rows("select clock_timestamp()")
            .await?
            .concat()
            .concat();
        world
            .until(
                &format!("select count(*) from oncely.relay_position where recorded_at > '{now}'"),
                1,
            )
            .await?;
        let published = world.nats.read_stream("OUT").await?.len();
        assert_eq!(
            (
                published,
                world
                    .database
                    .number("select count(*) from oncely.outbox")
                    .await?
            ),
            (20, 20)
        );
    }

    // Let it continue
    drop(between);
    world.quiet(21).await?;
    let via_wal = "select count(*) from oncely.outbox where via = 'wal'";
    assert_eq!(
        (
            world.nats.read_stream("OUT").await?.len(),
            world.database.number(via_wal).await?
        ),
        (21, 21)
    );
    check_order(&world, 21).await
}

/// Makes commits wait for this standby, or for none.
async fn wait_for_standby(world: &World, name: &str) -> Result<()> {
    world
        .database
        .execute(&format!(
            "alter system set synchronous_standby_names = '{name}'"
        ))
        .await?;
    world.database.execute("select pg_reload_conf()").await?;
    let is_set = format!(
        "select count(*) from pg_settings where name = 'synchronous_standby_names' and setting = '{name}'"
    );
    world.until(&is_set, 1).await
}

/// A process that is suspended until drop.
struct Stopped(u32);

impl Stopped {
    fn new(pid: i64) -> Result<Self> {
        let pid = u32::try_from(pid)?;
        signal(pid, "STOP")?;
        Ok(Stopped(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = signal(self.0, "CONT");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_host_publishes_all_committed_outputs() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 200)).await?;
    world
        .until_at_least("select count(*) from oncely.inbox", 51)
        .await?;
    world.stop_host().await?;
    assert_eq!(
        world.database.number(world.database.unpublished()).await?,
        0
    );
    let settled = world
        .database
        .number("select count(*) from oncely.inbox")
        .await?;
    check_order(&world, settled as usize).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_reader_loses_and_repeats_nothing() -> Result<()> {
    order_when_the_host_is_killed(RelayMode::Wal, &settings()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_host_takes_over_the_slot_within_seconds() -> Result<()> {
    order_across_hosts(RelayMode::Wal, &settings()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_keep_their_order_when_the_broker_dies() -> Result<()> {
    order_when_the_broker_dies(RelayMode::Wal, &settings(), Duration::from_secs(3)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_outputs_are_published_again_in_order() -> Result<()> {
    lost_outputs_are_published_again(RelayMode::Wal, &settings())
        .await
        .map(drop)
}

/// Nothing else would miss the outputs that the reader has not recorded when the stream loses them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_unrecorded_outputs_are_published_again_in_order() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    start(&mut world).await?;
    let mut count = 0;
    for _ in 0..4 {
        world
            .nats
            .publish_all(counting_messages(count, count + 300))
            .await?;
        let handled = "select count(*) from oncely.inbox";
        world.until_at_least(handled, count as i64 + 61).await?;
        world.nats.kill()?;
        world.nats.copy_stream("OUT")?;
        world.nats.restart().await?;
        world.until_at_least(handled, count as i64 + 151).await?;
        world.nats.kill()?;
        world.nats.roll_back_stream("OUT")?;
        world.nats.restart().await?;
        count += 300;
        world.quiet(count as i64).await?;
        check_order(&world, count).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_output_blocks_its_key_and_nothing_else() -> Result<()> {
    let world = world_with_parked_output(RelayMode::Wal).await?;
    publish_parked_output(&world).await?;

    // The key uses WAL mode again.
    world.nats.publish_all(vec![count(8, "held", 0)]).await?;
    world.quiet(9).await?;
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.outbox where via = 'wal' and seq = 9")
            .await?,
        1
    );
    check_order(&world, 9).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relay_mode_changes_under_load_keep_outputs_once_in_order() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    world.host_env.clear();
    world.start_host().await?;
    let count = 2_400;
    let (mut sent, mut rounds) = (0, 0);
    while sent < count {
        world
            .nats
            .publish_all(counting_messages(sent, sent + 200))
            .await?;
        sent += 200;
        rounds += 1;
        let enough = sent as i64 - 149;
        world
            .until_at_least("select count(*) from oncely.inbox", enough)
            .await?;
        if rounds == 2 {
            // Some outputs are published before WAL mode is left again.
            world
                .until_at_least("select count(*) from oncely.relay_record", 1)
                .await?;
        }
        request_relay_mode(&world, if rounds % 2 == 1 { "wal" } else { "poll" }).await?;
        if rounds % 3 == 0 {
            world.kill_host()?;
            world.start_host().await?;
        }
        if rounds % 4 == 1 {
            world.until(IN_WAL_MODE, 1).await?;
        }
        if rounds == 1 {
            // The poller finishes a per-key queue that it has begun, which takes as long as a lease
            // after a kill. All queues are empty now, so the next outputs use WAL mode.
            world.quiet(sent as i64).await?;
        }
    }
    request_relay_mode(&world, "poll").await?;
    world.quiet(count as i64).await?;
    world.until(IN_POLL_MODE, 1).await?;
    world.until(SLOTS, 0).await?;
    check_order(&world, count).await
}

/// A transaction that began in the old relay mode may end long after the switch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_mode_ends_only_after_its_last_writing_transaction() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    start(&mut world).await?;
    let slow = NewMessage::new("in.x", "slow", "insert,slow", r#"{"n": 1, "ms": 2500}"#);
    world.nats.publish_all(vec![slow]).await?;
    let open = "select count(*) from pg_stat_activity where application_name like 'oncely guests%' \
                and state = 'idle in transaction' and datname = current_database()";
    world.until(open, 1).await?;
    request_relay_mode(&world, "poll").await?;
    world
        .until(
            "select count(*) from oncely.relay where mode = 'leaving'",
            1,
        )
        .await?;
    world.quiet(1).await?;
    world.until(IN_POLL_MODE, 1).await?;
    assert_eq!(world.nats.read_stream("OUT").await?.len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_invalidated_by_the_server_loses_nothing() -> Result<()> {
    let cluster = Cluster::start()?;
    let mut world = world_in_wal_mode(Some(&cluster)).await?;
    world
        .database
        .execute("alter system set max_slot_wal_keep_size = '1MB'")
        .await?;
    world
        .database
        .execute("alter system set min_wal_size = '32MB'")
        .await?;
    world
        .database
        .execute("alter system set max_wal_size = '32MB'")
        .await?;
    world.database.execute("select pg_reload_conf()").await?;
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 100)).await?;
    world.quiet(100).await?;

    // Kill the reader under load
    world.nats.publish_all(counting_messages(100, 400)).await?;
    world
        .until_at_least("select count(*) from oncely.inbox", 151)
        .await?;
    world.kill_host()?;

    // Without a reader, the WAL grows.
    let lost = "select count(*) from pg_replication_slots where database = current_database() and wal_status = 'lost'";
    let end = Instant::now() + PATIENCE;
    while world.database.number(lost).await? == 0 {
        ensure!(
            Instant::now() < end,
            "the server did not invalidate the slot"
        );
        world
            .database
            .execute("create table junk as select generate_series(1, 300000); drop table junk")
            .await?;
        world.database.execute("select pg_switch_wal()").await?;
        world.database.execute("checkpoint").await?;
    }

    // Back to polling, with every output in order
    world.host_env.clear();
    world.start_host().await?;
    world.until(IN_POLL_MODE, 1).await?;
    world.quiet(400).await?;
    check_order(&world, 400).await?;
    world.until(SLOTS, 0).await?;
    let status = world.oncely(&["status"]).await?;
    assert!(status.contains("max_slot_wal_keep_size"), "{status}");

    // A host with the setting requests WAL mode again at its start.
    world.kill_host()?;
    world.host_env = vec![("ONCELY_RELAY".to_owned(), "wal".to_owned())];
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(400, 500)).await?;
    world.quiet(500).await?;
    check_order(&world, 500).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_slot_ends_wal_mode_while_the_host_runs() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 400)).await?;
    world
        .until_at_least("select count(*) from oncely.inbox", 101)
        .await?;
    let end_it = "select pg_terminate_backend(active_pid) from pg_replication_slots \
                  where database = current_database() and active_pid is not null";
    let drop_it = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
                   where database = current_database() and not active";
    eventually("the dropped slot ends WAL mode", || async {
        world.database.rows(end_it).await?;
        // The reader may have reconnected.
        let _ = world.database.rows(drop_it).await;
        Ok((world.database.number(IN_WAL_MODE).await? == 0).then_some(()))
    })
    .await?;
    world.quiet(400).await?;
    check_order(&world, 400).await?;
    world.until(IN_POLL_MODE, 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_pooler_relay_database_reaches_the_server_directly() -> Result<()> {
    let settings = format!("batch = 8\nconcurrency = 2\nack_wait = \"1s\"\n{QUICK_RETRIES}");
    let mut world = World::without_host(Kind::Pgbouncer, &manifest(&settings)?).await?;
    let Database::Postgres { direct, .. } = world.database.clone() else {
        unreachable!()
    };
    world.host_env = vec![("ONCELY_RELAY".to_owned(), "wal".to_owned())];
    let refused = world
        .start_host()
        .await
        .map_err(|error| error.to_string())
        .unwrap_err();
    assert!(refused.contains("relay_database"), "{refused}");
    world
        .host_env
        .push(("ONCELY_RELAY_DATABASE".to_owned(), direct));
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 200)).await?;
    world.quiet(200).await?;
    check_order(&world, 200).await?;
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.outbox where via = 'wal'")
            .await?,
        200
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_wal_is_reported_with_a_hint() -> Result<()> {
    let cluster = Cluster::start_with("-c fsync=off -c wal_level=replica")?;
    let mut world = world_in_wal_mode(Some(&cluster)).await?;
    let refused = world
        .start_host()
        .await
        .map_err(|error| error.to_string())
        .unwrap_err();
    assert!(
        refused.contains("wal_level = replica") && refused.contains("alter system set wal_level"),
        "{refused}"
    );
    // Nothing was changed, and a host without the setting starts.
    world.host_env.clear();
    world.start_host().await?;
    world.nats.publish_all(counting_messages(0, 20)).await?;
    world.quiet(20).await?;
    assert_eq!(world.database.number(IN_POLL_MODE).await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_wal_outputs_are_dropped_with_their_partition() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    world
        .host_env
        .push(("ONCELY_KEEP_OUTPUTS".to_owned(), "1m".to_owned()));
    start(&mut world).await?;
    world.nats.publish_all(counting_messages(0, 100)).await?;
    world.quiet(100).await?;
    let passed = "select count(*) from oncely.relay_position where published_seq >= 100";
    world.until(passed, 1).await?;
    world.kill_host()?;

    // Half of the outputs were published long ago, and the partition is closed.
    world
        .database
        .execute("update oncely.relay_record set published_at = now() - interval '1 day' where last_seq < 50")
        .await?;
    world
        .database
        .execute(
            "update oncely.partition_rotation set partition = 1, earlier = array[0]::smallint[], closed_at = array[now() - interval '1 day'] \
             where table_name = 'outbox'",
        )
        .await?;
    start(&mut world).await?;
    world.until("select count(*) from oncely.partition_rotation where table_name = 'outbox' and not 0 = any (earlier)", 1).await?;
    let left = world
        .database
        .number("select count(*) from oncely.outbox")
        .await?;
    let recorded =
        "select coalesce(sum(cardinality(seqs)), 0) from oncely.relay_record where last_seq >= 50";
    assert_eq!(left, world.database.number(recorded).await?);
    assert!(left < 100 && left > 0, "{left} outputs remain");
    assert_eq!(
        world
            .database
            .number("select count(*) from oncely.outbox where via = 'wal'")
            .await?,
        0
    );
    world.nats.publish_all(counting_messages(100, 160)).await?;
    world.quiet(160).await?;
    check_order(&world, 160).await
}

/// Delayed outputs use the poller in either mode.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delays_are_honoured_and_the_books_balance() -> Result<()> {
    let mut world = world_in_wal_mode(None).await?;
    start(&mut world).await?;
    let delayed = |n: u64| {
        let options = format!(r#"{{"n": 2, "delay_ms": {}}}"#, 500 + n * 50);
        NewMessage::new("in.x", &format!("d{n}"), "insert,emit", &options)
    };
    let plain = |n: u64| NewMessage::new("in.x", &format!("p{n}"), "insert", r#"{"n": 1}"#);
    world
        .nats
        .publish_all((0..40).flat_map(|n| [delayed(n), plain(n)]).collect())
        .await?;
    world.quiet(80).await?;
    let late = "select (extract(epoch from max(published_at - due_at)) * 1000)::bigint from oncely.outbox \
                where via = 'poll'";
    assert!(world.database.number(late).await? < 1_000);
    books::check(&world).await?;
    Ok(())
}
