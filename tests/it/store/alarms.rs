//! Alarms are raised and cleared once by concurrent hosts; equal failures form one group.

use std::sync::Arc;
use std::time::Duration;

use oncely::model::alarm::{Alarm, AlarmStep, AlarmUpdate, Kind};
use oncely::model::message::Redriven;
use oncely::model::verdict::{DeadLetter, Reason};
use oncely::store::{Attribution, DeadLetterFilter, Redrive, Store, grouped_dead_letters};

use super::{LEASE, Output, WORKER, World, new_dead_letter};

on_every_database!(
    an_alarm_is_raised_and_cleared_once_by_concurrent_hosts,
    an_alarm_that_is_no_longer_calm_stays_raised,
    only_the_first_dead_letter_of_a_failure_raises_an_alarm,
    concurrent_dead_letters_of_a_new_failure_raise_one_alarm,
    new_failures_beyond_the_limit_raise_no_alarm,
    a_failure_that_returns_later_is_new_again,
    dead_letters_are_grouped_and_filtered_by_group,
    depths_count_open_dead_letters_only,
);

fn alarm_change(standing: Option<&Alarm>, step: AlarmStep, value: u64) -> AlarmUpdate {
    AlarmUpdate {
        why: None,
        worker: WORKER.to_owned(),
        kind: Kind::DeadLetters,
        group: standing.and_then(|alarm| alarm.group.clone()),
        times: standing.map_or(0, |alarm| alarm.times),
        step,
        value,
        threshold: 100,
    }
}

fn died_of(event_id: &str, detail: &str) -> (DeadLetter, Output) {
    let (dead_letter, notice) = new_dead_letter(event_id, b"body", Reason::Rejected);
    (
        DeadLetter {
            detail: detail.to_owned(),
            ..dead_letter
        },
        notice,
    )
}

async fn only_alarm(store: &Arc<Store>) -> Alarm {
    let mut alarms = store.alarms().await.unwrap();
    assert_eq!(alarms.len(), 1);
    alarms.remove(0)
}

async fn messages(world: &World) -> Vec<(String, String)> {
    // The host that raised an alarm publishes its notice; the lease keeps the poller away.
    let past = if world.is_postgres() { "now()" } else { "0" };
    world
        .execute_directly(&format!("update oncely.outbox set leased_until = {past}"))
        .await;
    let rows = world.store.lease_outputs(100, LEASE).await.unwrap();
    let alarms = rows
        .into_iter()
        .filter(|row| row.subject.starts_with("oncely.alarm."));
    alarms
        .map(|row| (row.output_id().to_owned(), row.subject))
        .collect()
}

async fn an_alarm_is_raised_and_cleared_once_by_concurrent_hosts(world: World) {
    // Raise
    let raise = [alarm_change(None, AlarmStep::Raise, 120)];
    let (one, other) = tokio::join!(
        world.store.apply_alarm_updates(&raise),
        world.store.apply_alarm_updates(&raise)
    );
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one.notices.len() + other.notices.len(), 1);
    assert_eq!(one.rows.len() + other.rows.len(), 1);
    let alarm = only_alarm(&world.store).await;
    assert!(
        alarm.is_raised() && (alarm.times, alarm.value, alarm.threshold) == (1, 120, 100),
        "{alarm:?}"
    );

    // Clear
    let clear = [alarm_change(Some(&alarm), AlarmStep::Clear, 3)];
    let (one, other) = tokio::join!(
        world.store.apply_alarm_updates(&clear),
        world.store.apply_alarm_updates(&clear)
    );
    let notices: Vec<_> = [one.unwrap().notices, other.unwrap().notices].concat();
    assert_eq!(
        (notices.len(), notices[0].id().as_str()),
        (1, "alarm:payments:dead-letters:1:cleared")
    );
    assert!(!only_alarm(&world.store).await.is_raised());

    // A host with the previous state is too late.
    let late = [alarm_change(None, AlarmStep::Raise, 120)];
    assert!(
        world
            .store
            .apply_alarm_updates(&late)
            .await
            .unwrap()
            .notices
            .is_empty()
    );

    // Raise again
    let again = [alarm_change(
        Some(&only_alarm(&world.store).await),
        AlarmStep::Raise,
        120,
    )];
    let changes = world.store.apply_alarm_updates(&again).await.unwrap();
    assert_eq!(
        changes.notices[0].id(),
        "alarm:payments:dead-letters:2:raised"
    );
    let published = messages(&world).await;
    let ids: Vec<&str> = published.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "alarm:payments:dead-letters:1:raised",
            "alarm:payments:dead-letters:1:cleared",
            "alarm:payments:dead-letters:2:raised"
        ]
    );
    assert!(
        published
            .iter()
            .all(|(_, subject)| subject == "oncely.alarm.payments")
    );
}

async fn an_alarm_that_is_no_longer_calm_stays_raised(world: World) {
    world
        .store
        .apply_alarm_updates(&[alarm_change(None, AlarmStep::Raise, 120)])
        .await
        .unwrap();
    let alarm = only_alarm(&world.store).await;
    assert_eq!(alarm.recovering_ms, None);
    assert!(
        world
            .store
            .apply_alarm_updates(&[alarm_change(Some(&alarm), AlarmStep::Recover, 50)])
            .await
            .unwrap()
            .notices
            .is_empty()
    );
    tokio::time::sleep(Duration::from_millis(50)).await;
    let recovering_ms = only_alarm(&world.store).await.recovering_ms.unwrap();
    assert!((50..20_000).contains(&recovering_ms), "{recovering_ms}");

    // Another host that also finds it calm does not restart the delay.
    world
        .store
        .apply_alarm_updates(&[alarm_change(Some(&alarm), AlarmStep::Recover, 50)])
        .await
        .unwrap();
    assert!(only_alarm(&world.store).await.recovering_ms.unwrap() >= recovering_ms);
    world
        .store
        .apply_alarm_updates(&[alarm_change(Some(&alarm), AlarmStep::Relapse, 70)])
        .await
        .unwrap();
    let alarm = only_alarm(&world.store).await;
    assert!(alarm.recovering_ms.is_none() && alarm.is_raised());
}

async fn only_the_first_dead_letter_of_a_failure_raises_an_alarm(world: World) {
    let dead_letters = [
        died_of("e1", "line 1 column 2"),
        died_of("e2", "line 3 column 4"),
        died_of("e3", "other"),
    ];
    let dead_lettered = world.store.dead_letter(&dead_letters, 20).await.unwrap();
    assert_eq!(
        (
            dead_lettered.proofs.len(),
            dead_lettered.notices.len(),
            dead_lettered.alarms.notices.len()
        ),
        (3, 3, 2)
    );
    let group = dead_lettered
        .alarms
        .notices
        .iter()
        .filter_map(|notice| notice.group.as_ref());
    let mut shapes: Vec<&str> = group.map(|group| group.shape.as_str()).collect();
    shapes.sort_unstable();
    assert_eq!(shapes, ["line # column #", "other"]);

    // The notice names the group, and a similar failure raises no alarm.
    let header = |name: &str| {
        dead_lettered.notices[0]
            .headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    };
    assert_eq!(header("Oncely-Group").map(String::len), Some(16));
    let again = world
        .store
        .dead_letter(&[died_of("e4", "line 7 column 7")], 20)
        .await
        .unwrap();
    assert_eq!((again.notices.len(), again.alarms.notices.len()), (1, 0));

    // Repeated dead letters are not new.
    assert!(
        world
            .store
            .dead_letter(&dead_letters, 20)
            .await
            .unwrap()
            .alarms
            .notices
            .is_empty()
    );

    // One alarm per group
    let alarms = world.store.alarms().await.unwrap();
    let mut open_dead_letters: Vec<u64> =
        alarms.iter().map(|alarm| alarm.open_dead_letters).collect();
    open_dead_letters.sort_unstable();
    assert_eq!(open_dead_letters, [1, 3]);
    assert!(
        alarms
            .iter()
            .all(|alarm| alarm.kind == Kind::NewFailure && alarm.is_raised())
    );
}

async fn concurrent_dead_letters_of_a_new_failure_raise_one_alarm(world: World) {
    let calls = (0..8).map(|n| {
        let store = Arc::clone(&world.store);
        tokio::spawn(async move {
            let dead_letters = [
                died_of(&format!("e{n}"), &format!("account {n} is short")),
                died_of(&format!("f{n}"), "x"),
            ];
            store
                .dead_letter(&dead_letters, 20)
                .await
                .unwrap()
                .alarms
                .notices
                .len()
        })
    });
    let raised: usize = futures::future::join_all(calls)
        .await
        .into_iter()
        .map(Result::unwrap)
        .sum();
    assert_eq!(raised, 2);
    assert_eq!(
        world
            .store
            .alarms()
            .await
            .unwrap()
            .iter()
            .map(|alarm| alarm.open_dead_letters)
            .sum::<u64>(),
        16
    );
}

async fn new_failures_beyond_the_limit_raise_no_alarm(world: World) {
    let dead_letters: Vec<_> = (0..5)
        .map(|n| died_of(&format!("e{n}"), &"x".repeat(n + 1)))
        .collect();
    assert_eq!(
        world
            .store
            .dead_letter(&dead_letters, 3)
            .await
            .unwrap()
            .alarms
            .notices
            .len(),
        3
    );
    assert!(
        world
            .store
            .dead_letter(&[died_of("e9", "y")], 3)
            .await
            .unwrap()
            .alarms
            .notices
            .is_empty()
    );
    assert_eq!(
        world
            .store
            .dead_letter(&[died_of("e10", "z")], 4)
            .await
            .unwrap()
            .alarms
            .notices
            .len(),
        1
    );
    let filter = DeadLetterFilter {
        limit: 100,
        ..DeadLetterFilter::default()
    };
    assert_eq!(
        grouped_dead_letters(&world.store, &filter)
            .await
            .unwrap()
            .len(),
        7
    );
}

async fn a_failure_that_returns_later_is_new_again(world: World) {
    world
        .store
        .dead_letter(&[died_of("e1", "one 1")], 20)
        .await
        .unwrap();
    let away = |minutes: u64| match world.is_postgres() {
        true => format!(
            "update oncely.dead_letter_group set last_seen = now() - interval '{minutes} minutes'"
        ),
        false => format!(
            "update oncely.dead_letter_group set last_seen = last_seen - {}",
            minutes * 60_000_000
        ),
    };

    // While a dead letter is open, the failure is not new.
    world.execute_directly(&away(61)).await;
    assert!(
        world
            .store
            .dead_letter(&[died_of("e2", "one 2")], 20)
            .await
            .unwrap()
            .alarms
            .notices
            .is_empty()
    );

    // Resolve and clear
    let by = Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: None,
    };
    world
        .store
        .update_dead_letters(&[1, 2], &oncely::store::DeadLetterAction::Resolve, &by)
        .await
        .unwrap();
    let alarm = only_alarm(&world.store).await;
    assert_eq!(alarm.open_dead_letters, 0);
    let clear = AlarmUpdate {
        kind: Kind::NewFailure,
        ..alarm_change(Some(&alarm), AlarmStep::Clear, 0)
    };
    assert_eq!(
        world
            .store
            .apply_alarm_updates(&[clear])
            .await
            .unwrap()
            .notices
            .len(),
        1
    );
    assert!(world.store.alarms().await.unwrap().is_empty());

    // Right after the resolution, the failure is not new.
    assert!(
        world
            .store
            .dead_letter(&[died_of("e3", "one 3")], 20)
            .await
            .unwrap()
            .alarms
            .notices
            .is_empty()
    );

    // Much later, the failure is new again.
    world
        .store
        .update_dead_letters(&[3], &oncely::store::DeadLetterAction::Resolve, &by)
        .await
        .unwrap();
    world.execute_directly(&away(61)).await;
    let back = world
        .store
        .dead_letter(&[died_of("e4", "one 4")], 20)
        .await
        .unwrap()
        .alarms
        .notices;
    assert_eq!(back.len(), 1);
    assert!(
        back[0].id().ends_with(":2:raised")
            && back[0].text().contains("dead-letters messages again"),
        "{}",
        back[0].text()
    );
}

async fn dead_letters_are_grouped_and_filtered_by_group(world: World) {
    let dead_letters = [
        died_of("e1", "one 1"),
        died_of("e2", "one 2"),
        died_of("e3", "two"),
    ];
    world.store.dead_letter(&dead_letters, 20).await.unwrap();
    let filter = DeadLetterFilter {
        limit: 100,
        ..DeadLetterFilter::default()
    };

    // Groups, and a filter by group
    let groups = grouped_dead_letters(&world.store, &filter).await.unwrap();
    let counts: Vec<(u64, &str)> = groups
        .iter()
        .map(|found| {
            (
                found.dead_letters,
                found
                    .group
                    .as_ref()
                    .map_or("-", |group| group.shape.as_str()),
            )
        })
        .collect();
    assert_eq!(counts, [(2, "one #"), (1, "two")]);
    let id = groups[0].group.as_ref().map(|group| group.id.clone());
    let of_group = DeadLetterFilter {
        group: id.clone(),
        ..filter.clone()
    };
    let found = world.store.dead_letters(&of_group).await.unwrap();
    assert!(
        found.len() == 2 && found.iter().all(|dead_letter| dead_letter.group == id),
        "{found:?}"
    );

    // A dead letter that fails differently after its redrive moves to the new group.
    let by = Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: None,
    };
    let back = Redrive {
        id: found[1].id,
        generation: None,
        again: false,
    };
    world.store.redrive(&[back], &by).await.unwrap();
    let mut again = died_of("e1", "two");
    again.0.message.redriven = Some(Redriven {
        attempts_before: 1,
        payload_sha256: again.0.message.payload_sha256(),
    });
    world.store.dead_letter(&[again], 20).await.unwrap();
    let groups = grouped_dead_letters(&world.store, &filter).await.unwrap();
    assert_eq!(
        groups
            .iter()
            .map(|found| found.dead_letters)
            .collect::<Vec<_>>(),
        [2, 1]
    );

    // A dead letter older than the groups has none.
    world
        .execute_directly("update oncely.dead_letter set group_id = null where event_id = 'e2'")
        .await;
    let groups = grouped_dead_letters(&world.store, &filter).await.unwrap();
    assert_eq!(
        groups
            .iter()
            .filter(|found| found.group.is_none())
            .map(|found| found.dead_letters)
            .sum::<u64>(),
        1
    );
    let elsewhere = DeadLetterFilter {
        subject: Some("other.>".to_owned()),
        ..filter
    };
    assert!(
        grouped_dead_letters(&world.store, &elsewhere)
            .await
            .unwrap()
            .is_empty()
    );
}

async fn depths_count_open_dead_letters_only(world: World) {
    assert!(world.store.dead_letter_depths().await.unwrap().is_empty());
    world
        .store
        .dead_letter(
            &[died_of("e1", "a"), died_of("e2", "a"), died_of("e3", "a")],
            0,
        )
        .await
        .unwrap();
    let by = Attribution {
        actor: "ada".to_owned(),
        stated_name: None,
        note: None,
    };
    world
        .store
        .update_dead_letters(&[1], &oncely::store::DeadLetterAction::Drop, &by)
        .await
        .unwrap();
    let depths = world.store.dead_letter_depths().await.unwrap();
    assert_eq!(
        (depths.len(), depths[0].worker.as_str(), depths[0].open),
        (1, WORKER, 2)
    );
    assert!(depths[0].oldest_ms < 20_000);
}
