//! The changes that a rolled-back transaction would have made.

use oncely::store::{Changes, Tx};
use serde_json::{Value as Json, json};

use super::{World, execute, query};

on_every_database!(
    changed_rows_are_reported_before_and_after,
    rows_only_read_or_restored_are_no_change,
    watch_leaves_no_traces_in_the_database,
    a_deferred_violation_is_reported_before_the_commit,
);

const TABLES: &str = "create table item (id integer primary key, name text not null, note text);
    create table keyless (n integer);
    create table tally (id integer primary key, count integer not null);
    insert into item values (1, 'one', null), (2, 'two', 'x'), (3, 'three', null);
    insert into keyless values (7);
    insert into tally values (1, 0);";

const SQLITE_TRIGGER: &str =
    "create trigger counted after insert on item begin update tally set count = count + 1; end;";
const POSTGRES_TRIGGER: &str = "create function counted() returns trigger language plpgsql as
    $$ begin update app_default.tally set count = count + 1; return null; end $$;
    create trigger counted after insert on item for each row execute function counted();";

async fn with_tables(world: &World) {
    let trigger = if world.is_postgres() {
        POSTGRES_TRIGGER
    } else {
        SQLITE_TRIGGER
    };
    world
        .migrate("0001_items.sql", &format!("{TABLES}{trigger}"))
        .await;
}

async fn watched(world: &World, statements: &[&str]) -> Changes {
    let mut tx = world.begin().await;
    tx.track_changes().await.unwrap();
    for statement in statements {
        execute(&mut tx, statement, &[]).await;
    }
    changes(tx).await
}

async fn changes(mut tx: Tx) -> Changes {
    let changes = tx.changes(100).await.unwrap();
    tx.rollback().await;
    changes
}

/// PostgreSQL reports every value as text.
fn as_text(row: Option<Json>) -> Option<Json> {
    let text = |value: &Json| match value {
        Json::Number(number) => Json::from(number.to_string()),
        other => other.clone(),
    };
    row.map(|row| {
        row.as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.clone(), text(value)))
            .collect()
    })
}

fn change_rows(changes: &Changes) -> Vec<(String, Option<Json>, Option<Json>)> {
    let mut rows: Vec<_> = changes
        .rows
        .iter()
        .map(|change| {
            (
                change.table.clone(),
                as_text(change.before.clone()),
                as_text(change.after.clone()),
            )
        })
        .collect();
    rows.sort_by_key(|change| format!("{change:?}"));
    rows
}

async fn changed_rows_are_reported_before_and_after(world: World) {
    with_tables(&world).await;
    let changes = watched(
        &world,
        &[
            "insert into item values (4, 'four', null)",
            "update item set note = 'new' where id = 1",
            "update item set note = 'newer' where id = 1",
            "delete from item where id = 2",
            "insert into keyless values (8)",
        ],
    )
    .await;
    let item = |id: &str, name: &str, note: Json| json!({"id": id, "name": name, "note": note});
    let mut expected = vec![
        (
            "item".to_owned(),
            Some(item("1", "one", Json::Null)),
            Some(item("1", "one", "newer".into())),
        ),
        ("item".to_owned(), Some(item("2", "two", "x".into())), None),
        ("item".to_owned(), None, Some(item("4", "four", Json::Null))),
        ("keyless".to_owned(), None, Some(json!({"n": "8"}))),
        // By a trigger.
        (
            "tally".to_owned(),
            Some(json!({"id": "1", "count": "0"})),
            Some(json!({"id": "1", "count": "1"})),
        ),
    ];
    expected.sort_by_key(|change| format!("{change:?}"));
    assert_eq!(change_rows(&changes), expected);
    assert_eq!((changes.omitted, changes.refused), (Vec::new(), None));
    assert_eq!(
        world
            .rows("select count(*) from item where note = 'newer' or id = 4")
            .await,
        [[0_i64]].map(number)
    );
}

fn number(row: [i64; 1]) -> Vec<oncely::model::sql::Value> {
    row.map(oncely::model::sql::Value::Int64).to_vec()
}

async fn rows_only_read_or_restored_are_no_change(world: World) {
    with_tables(&world).await;
    let mut tx = world.begin().await;
    tx.track_changes().await.unwrap();
    let lock = if world.is_postgres() {
        "select * from item for update"
    } else {
        "select * from item"
    };
    query(&mut tx, lock, &[]).await;
    execute(&mut tx, "update item set note = 'y' where id = 2", &[]).await;
    execute(&mut tx, "update item set note = 'x' where id = 2", &[]).await;
    execute(&mut tx, "insert into item values (9, 'nine', null)", &[]).await;
    execute(&mut tx, "delete from item where id = 9", &[]).await;
    execute(&mut tx, "update tally set count = 0", &[]).await;
    assert_eq!(change_rows(&changes(tx).await), []);
}

async fn watch_leaves_no_traces_in_the_database(world: World) {
    with_tables(&world).await;
    let first = watched(&world, &["update item set note = 'y' where id = 2"]).await;
    assert_eq!(first.rows.len(), 1);
    // Also after a transaction whose changes were not read.
    let mut tx = world.begin().await;
    tx.track_changes().await.unwrap();
    execute(&mut tx, "update item set note = 'z' where id = 3", &[]).await;
    tx.rollback().await;
    let mut tx = world.begin().await;
    execute(&mut tx, "update item set note = 'kept' where id = 1", &[]).await;
    tx.commit().await.unwrap();
    let second = watched(&world, &["delete from item where id = 1"]).await;
    assert_eq!(second.rows.len(), 1);
    assert_eq!(second.rows[0].before.as_ref().unwrap()["note"], "kept");
    // A transaction cannot commit after its changes were read.
    let mut tx = world.begin().await;
    tx.track_changes().await.unwrap();
    tx.changes(100).await.unwrap();
    assert!(tx.commit().await.is_err());
}

async fn a_deferred_violation_is_reported_before_the_commit(world: World) {
    if !world.is_postgres() {
        // SQLite detects it only at the commit.
        return;
    }
    let tables = "create table parent (id integer primary key);
        create table child (parent integer references parent deferrable initially deferred);";
    world.migrate("0001_tables.sql", tables).await;
    let changes = watched(&world, &["insert into child values (1)"]).await;
    assert_eq!(changes.rows.len(), 1);
    assert!(
        changes
            .refused
            .unwrap()
            .contains("violates foreign key constraint")
    );
}
