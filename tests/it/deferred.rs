//! Deferred statements of a batch: together in one round trip, each charged to its own message.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use oncely::delivery::{BatchResult, Savepoints};
use oncely::model::verdict::Verdict;
use support::database::Kind;

use crate::positions::{DeliveryHarness, message};

const ONE_ATTEMPT: &str = "[worker.retry]\nattempts = 1\n";

/// A deferred statement that violates a constraint when it runs.
const TWICE: &str = r#"{"statements": [
    {"sql": "insert into once (id) values ($1)", "params": ["same"]},
    {"sql": "insert into once (id) values ($1)", "params": ["same"]}
]}"#;

/// `done` or the failure code of each message, in order.
fn verdicts(delivered: &BatchResult) -> Vec<String> {
    let name = |verdict: &Verdict| match verdict {
        Verdict::Done(_) => "done".to_owned(),
        Verdict::Dead(dead_letter) => dead_letter.code.clone().unwrap_or_default(),
        other => format!("{other:?}"),
    };
    delivered.verdicts.iter().map(name).collect()
}

async fn effects(harness: &DeliveryHarness) -> Result<i64> {
    harness
        .database
        .number("select count(*) from app.effect")
        .await
}

both!(
    a_batch_takes_effect_without_a_rerun,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, "").await?;
        for (round, savepoints) in [Savepoints::None, Savepoints::PerItem].iter().enumerate() {
            let item = |n: usize| message(&format!("{round}-{n}"), "defer", r#"{"n": 1}"#);
            let batch: Vec<_> = (0..32).map(item).collect();
            let delivered = harness.delivery.deliver(&batch, *savepoints).await?;
            assert_eq!(verdicts(&delivered), vec!["done"; 32]);
            assert_eq!((delivered.reruns, delivered.outputs.len()), (0, 32));
        }
        assert_eq!(effects(&harness).await?, 2 * 32 * 2);
        Ok(())
    }
);

both!(
    a_failing_statement_fails_its_own_message_only,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, ONE_ATTEMPT).await?;
        for (round, savepoints) in [Savepoints::None, Savepoints::PerItem].iter().enumerate() {
            for place in [0, 3, 7] {
                let item = |n: usize| {
                    let body = if n == place { TWICE } else { "" };
                    message(&format!("{round}-{place}-{n}"), "defer", body)
                };
                let batch: Vec<_> = (0..8).map(item).collect();
                let delivered = harness.delivery.deliver(&batch, *savepoints).await?;
                let mut expected = vec!["done"; 8];
                expected[place] = "constraint-violation";
                assert_eq!(verdicts(&delivered), expected);
                assert!(delivered.reruns <= 1, "{} reruns", delivered.reruns);
            }
        }
        assert_eq!(effects(&harness).await?, 2 * 3 * 7 * 2);
        let attempts = harness
            .database
            .number("select count(*) from oncely.attempt");
        assert_eq!(attempts.await?, 2 * 3);
        assert_eq!(
            harness
                .database
                .number("select count(*) from app.once")
                .await?,
            0
        );
        Ok(())
    }
);

both!(
    a_later_statement_sees_the_deferred_ones_of_all_messages,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, ONE_ATTEMPT).await?;
        let count = r#"{"sql": "select count(*) from effect"}"#;
        let batch = [
            message("first", "defer", ""),
            message("second", "defer,insert", r#"{"n": 0}"#),
            message("third", "sql_text", count),
        ];
        let delivered = harness.deliver(&batch).await?;
        assert_eq!(verdicts(&delivered), ["done"; 3]);
        let counted = &delivered.outputs.last().context("no output")?.body;
        assert!(
            String::from_utf8_lossy(counted).contains("[[6]]"),
            "{counted:?}"
        );
        Ok(())
    }
);

// The statement that fails belongs to an earlier message than the one that makes it run.
both!(
    a_message_is_not_charged_for_an_earlier_one,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, ONE_ATTEMPT).await?;
        let batch = [
            message("good", "defer", ""),
            message("bad", "defer", TWICE),
            message("victim", "insert", r#"{"n": 0}"#),
        ];
        let delivered = harness.deliver(&batch).await?;
        assert_eq!(
            verdicts(&delivered),
            ["done", "constraint-violation", "done"]
        );
        assert_eq!(effects(&harness).await?, 4);
        Ok(())
    }
);

both!(
    a_message_that_fails_takes_its_deferred_statements_with_it,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, ONE_ATTEMPT).await?;
        for (round, savepoints) in [Savepoints::None, Savepoints::PerItem].iter().enumerate() {
            let item = |n: usize| {
                let behaviour = match n % 4 {
                    1 => "defer,reject",
                    2 => "defer,trap",
                    _ => "defer",
                };
                message(&format!("{round}-{n}"), behaviour, "")
            };
            let batch: Vec<_> = (0..16).map(item).collect();
            let delivered = harness.delivery.deliver(&batch, *savepoints).await?;
            // Its statements did not run, so the others need no other run.
            assert_eq!(delivered.reruns, 0);
            let done = verdicts(&delivered);
            assert_eq!(done.iter().filter(|verdict| *verdict == "done").count(), 8);
        }
        assert_eq!(effects(&harness).await?, 2 * 8 * 2);
        Ok(())
    }
);

both!(the_error_is_that_of_the_database, |kind: Kind| async move {
    let harness = DeliveryHarness::new(kind, ONE_ATTEMPT).await?;
    let once = "insert into once (id) values ('x'), ('x')";
    let cases = BTreeMap::from([
        // At once.
        ("create table t (id int)", "not-allowed"),
        ("select 1; select 2", "not-allowed"),
        // At the next statement, or at the end.
        (once, "constraint-violation"),
        ("insert into nowhere values (1)", "sql"),
    ]);
    for (statement, code) in cases {
        let body = serde_json::json!({ "statements": [{ "sql": statement }] });
        for behaviour in ["defer", "defer,insert"] {
            let id = format!("{statement}{behaviour}");
            let batch = [message(&id, behaviour, &body.to_string())];
            let delivered = harness.deliver(&batch).await?;
            assert_eq!(verdicts(&delivered), [code], "{statement} with {behaviour}");
        }
    }
    assert_eq!(effects(&harness).await?, 0);
    Ok(())
});

both!(
    more_statements_than_the_queue_takes_run_before_the_end,
    |kind: Kind| async move {
        let harness = DeliveryHarness::new(kind, ONE_ATTEMPT).await?;
        let body = "x".repeat(100_000);
        let statement = serde_json::json!({
            "sql": "insert into effect values ($1, $2, 1, 'deferred')", "params": ["e", body],
        });
        let body = serde_json::json!({ "statements": vec![statement; 25] }).to_string();
        let batch: Vec<_> = (0..4)
            .map(|n| {
                let behaviour = if n == 2 { "defer,reject" } else { "defer" };
                message(&format!("e{n}"), behaviour, &body)
            })
            .collect();
        let delivered = harness.deliver(&batch).await?;
        let done = verdicts(&delivered);
        assert_eq!(done.iter().filter(|verdict| *verdict == "done").count(), 3);
        assert_eq!(effects(&harness).await?, 3 * 25);
        Ok(())
    }
);
