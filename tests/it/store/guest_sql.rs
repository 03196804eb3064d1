//! Guests' statements: values, limits, errors.

use std::time::{Duration, Instant};

use oncely::model::sql::{SqlError, SqlLimits, Value};
use oncely::store::{Claimed, StoreError};

use super::{LIMITS, WORKER, World, claim, execute, query, text};

on_every_database!(
    values_round_trip,
    a_parameter_may_change_its_type_from_call_to_call,
    a_mistyped_parameter_is_refused_before_execution,
    a_missing_parameter_is_refused,
    results_stop_at_their_limits,
    a_statement_over_its_time_limit_is_cancelled,
    the_rows_that_changed_are_counted,
    a_violated_constraint_is_named,
    a_commit_after_a_swallowed_error_is_refused,
    a_deferred_constraint_is_refused_at_the_commit,
    a_batch_reads_its_own_writes,
);

/// A table with a column for each kind of value.
fn table(world: &World) -> &'static str {
    if world.is_postgres() {
        "create table v (b boolean, i bigint, f double precision, m numeric, t text, y bytea, u uuid, j jsonb,
             s timestamptz, d date, c time)"
    } else {
        "create table v (b integer, i integer, f real, m text, t text, y blob, u text, j text, s integer, d text,
             c text) strict"
    }
}

fn values() -> [Value; 11] {
    [
        Value::Boolean(true),
        Value::Int64(i64::MIN),
        Value::Float64(0.1),
        Value::Decimal("-12345678901234567890.50".to_owned()),
        text("é'\"\\ $1"),
        Value::Bytes(vec![0, 255]),
        Value::Uuid("0190163d-8694-739b-aea5-966c26f8ad91".to_owned()),
        Value::Json("{\"a\": [1, null]}".to_owned()),
        Value::Timestamp(1_769_867_159_123_456),
        Value::Date("2026-01-31".to_owned()),
        Value::Time("13:05:59.25".to_owned()),
    ]
}

async fn values_round_trip(world: World) {
    world.migrate("1.sql", table(&world)).await;
    let insert = "insert into v values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";
    let mut tx = world.begin().await;
    assert_eq!(execute(&mut tx, insert, &values()).await, 1);
    assert_eq!(
        execute(&mut tx, insert, &[const { Value::Null }; 11]).await,
        1
    );
    tx.commit().await.unwrap();

    let mut tx = world.begin().await;
    let rows = query(&mut tx, "select * from v order by i is null", &[]).await;
    assert_eq!(
        rows.columns,
        ["b", "i", "f", "m", "t", "y", "u", "j", "s", "d", "c"]
    );
    let as_text = |value: Value| match value {
        Value::Decimal(text)
        | Value::Uuid(text)
        | Value::Json(text)
        | Value::Date(text)
        | Value::Time(text) => Value::Text(text),
        Value::Boolean(truth) => Value::Int64(truth.into()),
        Value::Timestamp(micros) => Value::Int64(micros),
        other => other,
    };
    let expected = if world.is_postgres() {
        values()
    } else {
        values().map(as_text)
    };
    assert_eq!(rows.rows[0], expected);
    assert_eq!(rows.rows[1], [const { Value::Null }; 11]);
    tx.rollback().await;
}

async fn a_parameter_may_change_its_type_from_call_to_call(world: World) {
    world
        .migrate("1.sql", "create table t (a integer, b text)")
        .await;
    let mut tx = world.begin().await;
    let insert = "insert into t values ($1, $2) -- a comment";
    for a in [Value::Null, Value::Int64(7), Value::Null] {
        assert_eq!(execute(&mut tx, insert, &[a, text("x")]).await, 1);
    }
    let rows = query(
        &mut tx,
        "select a from t where b = $1 order by a is null",
        &[text("x")],
    )
    .await
    .rows;
    assert_eq!(rows, [[Value::Int64(7)], [Value::Null], [Value::Null]]);
    tx.rollback().await;
}

async fn a_mistyped_parameter_is_refused_before_execution(world: World) {
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    for value in [
        Value::Decimal("1e9".to_owned()),
        Value::Uuid("x".to_owned()),
        Value::Json("{".to_owned()),
        Value::Date("yesterday".to_owned()),
        Value::Time("noon".to_owned()),
        text("a\0b"),
    ] {
        let result = tx
            .query("select $1", std::slice::from_ref(&value), LIMITS)
            .await
            .unwrap();
        assert!(
            matches!(result, Err(SqlError::InvalidParameter(_))),
            "{value:?}: {result:?}"
        );
    }
    tx.commit().await.unwrap();
}

async fn a_missing_parameter_is_refused(world: World) {
    let mut tx = world.begin().await;
    let result = tx
        .query("select $1, $2", &[text("a")], LIMITS)
        .await
        .unwrap();
    assert!(
        matches!(result, Err(SqlError::InvalidParameter(_))),
        "{result:?}"
    );
    tx.rollback().await;
}

const COUNT: &str =
    "with recursive n (i) as (select 1 union all select i + 1 from n where i < 1000000000)";

async fn results_stop_at_their_limits(world: World) {
    let too_many = format!("{COUNT} select i from n limit 1000000");
    let ten = format!("{COUNT} select i from n limit 10");
    let mut tx = world.begin().await;
    let result = tx
        .query(
            &ten,
            &[],
            SqlLimits {
                rows: 10,
                bytes: 80,
            },
        )
        .await
        .unwrap();
    assert_eq!(result.unwrap().rows.len(), 10);
    let result = tx
        .query(
            &too_many,
            &[],
            SqlLimits {
                rows: 10,
                bytes: 10_000,
            },
        )
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::TooLarge(_))), "{result:?}");
    let result = tx.query("select 1", &[], LIMITS).await.unwrap();
    assert!(
        matches!(result, Err(SqlError::TransactionFailed(_))),
        "{result:?}"
    );
    assert!(matches!(tx.commit().await, Err(StoreError::Refused(_))));
    let mut tx = world.begin().await;
    let result = tx
        .query(
            &ten,
            &[],
            SqlLimits {
                rows: 10,
                bytes: 79,
            },
        )
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::TooLarge(_))), "{result:?}");
    tx.rollback().await;
    assert_eq!(world.rows("select 1").await, [[Value::Int64(1)]]);
}

async fn a_statement_over_its_time_limit_is_cancelled(world: World) {
    let mut tx = world
        .store
        .begin(WORKER, Duration::from_millis(300))
        .await
        .unwrap();
    claim(&mut tx, "e1", 1).await;
    let began = Instant::now();
    let result = tx
        .query(&format!("{COUNT} select max(i) from n"), &[], LIMITS)
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::Timeout)), "{result:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(matches!(tx.commit().await, Err(StoreError::Refused(_))));
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { .. }
    ));
}

async fn the_rows_that_changed_are_counted(world: World) {
    world
        .migrate("1.sql", "create table t (a integer primary key)")
        .await;
    let mut tx = world.begin().await;
    for (statement, changed) in [
        ("insert into t values (1), (2), (3)", 3),
        ("select * from t", 0),
        ("with x as (select 1) select * from x", 0),
        ("insert into t values (1), (4) on conflict do nothing", 1),
        ("update t set a = a + 10 where a > 9", 0),
        ("insert into t values (5) returning a", 1),
        ("delete from t", 5),
    ] {
        assert_eq!(
            execute(&mut tx, statement, &[]).await,
            changed,
            "{statement}"
        );
    }
    let rows = query(
        &mut tx,
        "insert into t values (9) returning a + 1 as b",
        &[],
    )
    .await;
    assert_eq!(
        (rows.columns, rows.rows),
        (vec!["b".to_owned()], vec![vec![Value::Int64(10)]])
    );
    tx.rollback().await;
}

async fn a_violated_constraint_is_named(world: World) {
    let ddl = "create table t (a integer constraint enough check (a >= 0), b integer not null, unique (a))";
    world.migrate("1.sql", ddl).await;
    let unique = if world.is_postgres() {
        "t_a_key"
    } else {
        "t.a"
    };
    let not_null = if world.is_postgres() {
        None
    } else {
        Some("t.b")
    };
    for (statement, name) in [
        ("insert into t values (-1, 1)", Some("enough")),
        ("insert into t values (1, 1), (1, 1)", Some(unique)),
        ("insert into t values (1, null)", not_null),
    ] {
        let mut tx = world.begin().await;
        match tx.execute(statement, &[]).await.unwrap() {
            Err(SqlError::ConstraintViolation(error)) => {
                assert_eq!(error.constraint.as_deref(), name, "{error:?}")
            }
            other => panic!("{statement}: {other:?}"),
        }
        tx.rollback().await;
    }
}

async fn a_commit_after_a_swallowed_error_is_refused(world: World) {
    world
        .migrate("1.sql", "create table t (a integer primary key)")
        .await;
    let cases = [
        "insert into t values (1)",
        "insert into t select 'x' from nowhere",
        "select no_such_function()",
        "select from where",
    ];
    for failing in cases {
        let mut tx = world.begin().await;
        claim(&mut tx, "e1", 1).await;
        assert_eq!(execute(&mut tx, "insert into t values (1)", &[]).await, 1);
        assert!(
            tx.execute(failing, &[]).await.unwrap().is_err(),
            "{failing}"
        );
        let next = tx.execute("insert into t values (2)", &[]).await.unwrap();
        assert!(
            matches!(next, Err(SqlError::TransactionFailed(_))),
            "{next:?}"
        );
        assert!(matches!(tx.commit().await, Err(StoreError::Refused(_))));
        assert!(world.rows("select * from t").await.is_empty());
        assert!(matches!(
            world.claim_and_roll_back("e1", 1).await,
            Claimed::Fresh { .. }
        ));
    }
}

async fn a_deferred_constraint_is_refused_at_the_commit(world: World) {
    let ddl = "create table t (a integer primary key, b integer references t (a) deferrable initially deferred)";
    world.migrate("1.sql", ddl).await;
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    assert_eq!(
        execute(&mut tx, "insert into t values (1, 2)", &[]).await,
        1
    );
    let result = tx.commit().await;
    assert!(matches!(result, Err(StoreError::Refused(_))), "{result:?}");
    assert!(world.rows("select * from t").await.is_empty());
    let mut tx = world.begin().await;
    assert!(matches!(
        claim(&mut tx, "e1", 1).await,
        Claimed::Fresh { .. }
    ));
    assert_eq!(
        execute(&mut tx, "insert into t values (1, 2), (2, 1)", &[]).await,
        2
    );
    tx.commit().await.unwrap();
}

async fn a_batch_reads_its_own_writes(world: World) {
    world.migrate("1.sql", "create table t (a integer)").await;
    let mut tx = world.begin().await;
    execute(&mut tx, "insert into t values ($1)", &[Value::Int64(1)]).await;
    assert_eq!(
        query(&mut tx, "select count(*) from t", &[]).await.rows,
        [[Value::Int64(1)]]
    );
    tx.rollback().await;
}

#[tokio::test]
async fn every_supported_postgres_type_is_passed_through() {
    let world = World::postgres().await;
    let rows = world
        .rows(
            "select 1::smallint, 2::integer, 3::oid, 1.5::real, 'a'::varchar(3), 'b'::char(3), 'c'::name, '{\"b\":1,  \"a\":2}'::json,
                 timestamp '2000-01-01 00:00:00.5', time '24:00', numeric 'NaN', '-Infinity'::numeric, 0.000::numeric,
                 1e-7::numeric, 1234567.00::numeric, 'x', null, date '0001-01-01', timestamptz '1969-12-31 23:59:59.999999Z'",
        )
        .await;
    let decimal = |text: &str| Value::Decimal(text.to_owned());
    let expected = vec![
        Value::Int64(1),
        Value::Int64(2),
        Value::Int64(3),
        Value::Float64(1.5),
        text("a"),
        text("b  "),
        text("c"),
        Value::Json("{\"b\":1,  \"a\":2}".to_owned()),
        Value::Timestamp(946_684_800_500_000),
        Value::Time("24:00:00".to_owned()),
        decimal("NaN"),
        decimal("-Infinity"),
        decimal("0.000"),
        decimal("0.0000001"),
        decimal("1234567.00"),
        text("x"),
        Value::Null,
        Value::Date("0001-01-01".to_owned()),
        Value::Timestamp(-1),
    ];
    assert_eq!(rows, [expected]);
}

#[tokio::test]
async fn an_unsupported_postgres_type_is_named_with_a_hint() {
    let world = World::postgres().await;
    world
        .migrate(
            "1.sql",
            "create type mood as enum ('sad', 'happy'); create table t (m mood, a integer[])",
        )
        .await;
    for statement in [
        "select interval '1 day' as x",
        "select array[1] as x",
        "select 'sad'::mood as x",
        "select 'infinity'::date as x",
    ] {
        let mut tx = world.begin().await;
        match tx.query(statement, &[], LIMITS).await.unwrap() {
            Err(SqlError::UnsupportedType(why)) => {
                assert!(why.contains("`x`") && why.contains("`x::text`"), "{why}")
            }
            other => panic!("{statement}: {other:?}"),
        }
        tx.rollback().await;
    }
    let mut tx = world.begin().await;
    assert_eq!(
        execute(
            &mut tx,
            "insert into t (m) values ($1::mood)",
            &[text("sad")]
        )
        .await,
        1
    );
    assert_eq!(
        query(
            &mut tx,
            "select m::text from t where m = $1::mood",
            &[text("sad")]
        )
        .await
        .rows,
        [[text("sad")]]
    );
    tx.rollback().await;
}

/// Behind a pooler, the connection has to look up such a type in the middle of the statement.
#[tokio::test]
async fn an_unsupported_type_is_a_guest_error_behind_pgbouncer() {
    let world = World::pgbouncer().await;
    world
        .migrate("1.sql", "create type mood as enum ('sad', 'happy')")
        .await;
    let mut tx = world.begin().await;
    let result = tx
        .query("select 'sad'::mood as x", &[], LIMITS)
        .await
        .unwrap();
    assert!(
        matches!(result, Err(SqlError::UnsupportedType(_))),
        "{result:?}"
    );
    tx.rollback().await;
}

#[tokio::test]
async fn a_table_changed_under_a_prepared_statement_conflicts_once() {
    let world = World::postgres().await;
    let store = oncely::store::PostgresStore::connect(world.url.as_deref().unwrap(), 1)
        .await
        .unwrap();
    let world = World {
        store: std::sync::Arc::new(store.into()),
        ..world
    };
    world
        .run_directly("create table app_default.t (a integer)")
        .await;
    assert!(world.rows("select * from t").await.is_empty());
    world
        .run_directly(
            "alter table app_default.t add b text; insert into app_default.t values (1, 'b')",
        )
        .await;
    let mut tx = world.begin().await;
    let result = tx.query("select * from t", &[], LIMITS).await.unwrap();
    assert!(matches!(result, Err(SqlError::Conflict(_))), "{result:?}");
    tx.rollback().await;
    assert_eq!(
        world.rows("select * from t").await,
        [[Value::Int64(1), text("b")]]
    );
}

#[tokio::test]
async fn a_lock_wait_is_a_conflict_and_not_a_slow_statement() {
    let world = World::postgres().await;
    world
        .migrate(
            "1.sql",
            "create table t (a integer primary key); insert into t values (1)",
        )
        .await;
    let mut first = world.begin().await;
    execute(&mut first, "update t set a = 2", &[]).await;
    let mut second = world
        .store
        .begin(WORKER, Duration::from_millis(400))
        .await
        .unwrap();
    let result = second.execute("update t set a = 3", &[]).await.unwrap();
    assert!(
        matches!(&result, Err(SqlError::Conflict(error)) if error.code == "55P03"),
        "{result:?}"
    );
    second.rollback().await;
    first.commit().await.unwrap();
}
