//! Statements that run together, in one round trip.

use oncely::model::sql::{SqlError, Value};
use oncely::store::{DeferredStatement, Tx};

use super::{World, execute, query, text};

on_every_database!(
    values_arrive_as_with_single_statements,
    the_position_of_a_failed_statement_is_known,
    a_failed_run_leaves_the_connection_usable,
    a_savepoint_survives_a_failed_run,
    texts_cannot_end_their_literal,
);

/// Checks a statement once for each list of parameters.
async fn defer(tx: &mut Tx, statement: &str, params: &[Vec<Value>]) -> Vec<DeferredStatement> {
    let mut deferred = Vec::new();
    for params in params {
        let checked = tx.check_deferred(statement.to_owned(), params.clone());
        deferred.push(checked.await.unwrap().unwrap());
    }
    deferred
}

/// The position and the error of the first statement that failed.
async fn run(tx: &mut Tx, deferred: &[DeferredStatement]) -> Result<(), (usize, SqlError)> {
    let ran = tx.execute_all(deferred).await.unwrap();
    ran.map_err(|failed| (failed.position, failed.error))
}

fn kinds() -> Vec<Value> {
    vec![
        Value::Boolean(true),
        Value::Int64(i64::MIN),
        Value::Float64(0.1 + 0.2),
        Value::Decimal("-12345678901234567890.50".to_owned()),
        text("é'\"\\ $1 😀 \u{1}\t\n-- /* $$"),
        Value::Bytes(vec![0, 39, 92, 255]),
        Value::Uuid("0190163d-8694-739b-aea5-966c26f8ad91".to_owned()),
        Value::Json("{\"a\": [1, null, \"\\u00e9'\\\\\"]}".to_owned()),
        Value::Timestamp(1_769_867_159_123_456),
        Value::Date("2026-01-31".to_owned()),
        Value::Time("13:05:59.25".to_owned()),
    ]
}

/// Parameters of one row each: all kinds, nulls, and the edges of the kinds.
fn rows() -> Vec<Vec<Value>> {
    let with = |place: usize, value: Value| {
        let mut row = kinds();
        row[place] = value;
        row
    };
    vec![
        kinds(),
        vec![Value::Null; 11],
        with(0, Value::Boolean(false)),
        with(1, Value::Int64(i64::MAX)),
        with(2, Value::Float64(f64::MAX)),
        with(2, Value::Float64(5e-324)),
        with(2, Value::Float64(-0.0)),
        with(3, Value::Decimal("0".to_owned())),
        with(4, text("")),
        with(5, Value::Bytes(Vec::new())),
        with(8, Value::Timestamp(-62_000_000_000_000_000)),
        with(8, Value::Timestamp(253_000_000_000_000_001)),
    ]
}

async fn values_arrive_as_with_single_statements(world: World) {
    let columns = match world.is_postgres() {
        true => {
            "b boolean, i bigint, f double precision, m numeric, t text, y bytea, u uuid, j jsonb,
             s timestamptz, d date, c time"
        }
        false => {
            "b integer, i integer, f real, m text, t text, y blob, u text, j text, s integer,
             d text, c text"
        }
    };
    let table = format!("create table single ({columns}); create table together ({columns});");
    world.migrate("1.sql", &table).await;
    let insert = |table: &str| {
        format!("insert into {table} values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)")
    };
    let mut tx = world.begin().await;
    for row in rows() {
        assert_eq!(execute(&mut tx, &insert("single"), &row).await, 1);
    }
    // Repeated, so that each combination of types occurs often enough to run together.
    for _ in 0..8 {
        let deferred = defer(&mut tx, &insert("together"), &rows()).await;
        run(&mut tx, &deferred).await.unwrap();
    }
    let nulls = defer(
        &mut tx,
        &insert("together"),
        &vec![vec![Value::Null; 11]; 9],
    )
    .await;
    run(&mut tx, &nulls).await.unwrap();
    for (one, other) in [("single", "together"), ("together", "single")] {
        let missing =
            format!("select count(*) from (select * from {one} except select * from {other}) x");
        let found = query(&mut tx, &missing, &[]).await;
        assert_eq!(found.rows, [[Value::Int64(0)]], "{one} without {other}");
    }
    let count = query(&mut tx, "select count(*) from together", &[]).await;
    assert_eq!(count.rows, [[Value::Int64(8 * 12 + 9)]]);
    tx.commit().await.unwrap();
}

async fn unique_table(world: &World) {
    world
        .migrate("1.sql", "create table once (id integer primary key)")
        .await;
}

fn numbers(numbers: impl IntoIterator<Item = i64>) -> Vec<Vec<Value>> {
    let params = |number| vec![Value::Int64(number)];
    numbers.into_iter().map(params).collect()
}

const INSERT: &str = "insert into once (id) values ($1)";

async fn the_position_of_a_failed_statement_is_known(world: World) {
    unique_table(&world).await;
    for place in [0, 1, 7, 19] {
        let mut tx = world.begin().await;
        assert_eq!(execute(&mut tx, INSERT, &[Value::Int64(-1)]).await, 1);
        let mut ids: Vec<i64> = (0..20).collect();
        ids[place] = -1;
        let deferred = defer(&mut tx, INSERT, &numbers(ids)).await;
        let (position, error) = run(&mut tx, &deferred).await.unwrap_err();
        assert_eq!(position, place);
        assert!(matches!(error, SqlError::ConstraintViolation(_)), "{error}");
        let after = tx.execute(INSERT, &[Value::Int64(99)]).await.unwrap();
        assert!(
            matches!(after, Err(SqlError::TransactionFailed(_))),
            "{after:?}"
        );
        tx.rollback().await;
    }
    assert_eq!(world.rows("select * from once").await.len(), 0);
}

async fn a_failed_run_leaves_the_connection_usable(world: World) {
    unique_table(&world).await;
    for statement in [INSERT, "insert into nowhere values ($1)"] {
        // As many as the pool has connections, and more.
        for _ in 0..12 {
            let mut tx = world.begin().await;
            let deferred = defer(&mut tx, statement, &numbers([1, 2, 3, 4, 4])).await;
            run(&mut tx, &deferred).await.unwrap_err();
            tx.rollback().await;
        }
    }
    for round in 0..12 {
        let mut tx = world.begin().await;
        let ids = numbers(round * 10..round * 10 + 5);
        let deferred = defer(&mut tx, INSERT, &ids).await;
        run(&mut tx, &deferred).await.unwrap();
        tx.commit().await.unwrap();
    }
    assert_eq!(world.rows("select * from once").await.len(), 12 * 5);
}

async fn a_savepoint_survives_a_failed_run(world: World) {
    unique_table(&world).await;
    let mut tx = world.begin().await;
    let deferred = defer(&mut tx, INSERT, &numbers(0..5)).await;
    run(&mut tx, &deferred).await.unwrap();
    tx.savepoint().await.unwrap();
    let failing = defer(&mut tx, INSERT, &numbers(4..9)).await;
    assert_eq!(run(&mut tx, &failing).await.unwrap_err().0, 0);
    tx.rollback_to_savepoint().await.unwrap();
    let others = defer(&mut tx, INSERT, &numbers(5..10)).await;
    run(&mut tx, &others).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.rows("select * from once").await.len(), 10);
}

/// A worker's function may change the settings of the transaction by which literals are read.
async fn texts_cannot_end_their_literal(world: World) {
    world.migrate("1.sql", "create table kept (t text)").await;
    if world.is_postgres() {
        let change = "create function change() returns text language plpgsql as
            'begin
                 set standard_conforming_strings = off;
                 set escape_string_warning = off;
                 set backslash_quote = on;
                 set client_encoding = ''SJIS'';
                 return ''changed'';
             end'";
        world.migrate("2.sql", change).await;
    }
    let hostile = [
        "'); commit; drop table kept; --",
        "\\'); commit; drop table kept; --",
        "\u{bf}'); commit; drop table kept; --",
        "\u{85}\\'); commit; --",
        "E'\\', '$$; commit; $$",
        "\\u0027); commit; --",
    ];
    let params: Vec<Vec<Value>> = hostile.iter().map(|it| vec![text(it)]).collect();

    let mut tx = world.begin().await;
    if world.is_postgres() {
        query(&mut tx, "select change()", &[]).await;
    }
    let deferred = defer(&mut tx, "insert into kept (t) values ($1)", &params).await;
    run(&mut tx, &deferred).await.unwrap();
    assert_eq!(world.count_directly(&table(&world, "kept")).await, 0);
    tx.commit().await.unwrap();

    let kept = world.rows("select t from kept").await;
    let expected: Vec<Vec<Value>> = params;
    assert_eq!(kept, expected);
}

/// A table of the worker as others see it.
fn table(world: &World, name: &str) -> String {
    match world.is_postgres() {
        true => format!("app_default.{name}"),
        false => name.to_owned(),
    }
}
