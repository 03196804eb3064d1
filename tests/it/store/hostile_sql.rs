//! No guest statement leaves its transaction or reaches the platform's tables.

use oncely::model::sql::SqlError;
use oncely::store::{Claimed, StoreError};

use super::{LIMITS, World, claim, execute, query};

on_every_database!(
    statements_that_would_leave_the_transaction_are_refused,
    the_platforms_tables_are_out_of_reach,
    no_statement_breaks_the_connection,
);

const LEAVING: [&str; 24] = [
    "commit",
    "end",
    "rollback",
    "/* /* */ */ commit",
    "-- \n commit",
    "commit and chain",
    "prepare transaction 'x'",
    "do $$ begin commit; end $$",
    "begin",
    "savepoint a",
    "release savepoint a",
    "rollback to savepoint a",
    "set role none",
    "set local search_path = oncely",
    "reset all",
    "discard all",
    "create table u (a integer)",
    "drop table t",
    "pragma foreign_keys = off",
    "attach database ':memory:' as other",
    "vacuum",
    "select 1; commit",
    "insert into t values (7); commit; insert into t values (8)",
    "insert or rollback into t values (1)",
];

async fn statements_that_would_leave_the_transaction_are_refused(world: World) {
    world
        .migrate("1.sql", "create table t (a integer primary key)")
        .await;
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    execute(&mut tx, "insert into t values (1)", &[]).await;
    for statement in LEAVING {
        let result = tx.execute(statement, &[]).await.unwrap();
        assert!(
            matches!(result, Err(SqlError::NotAllowed(_))),
            "{statement}: {result:?}"
        );
        let result = tx.query(statement, &[], LIMITS).await.unwrap();
        assert!(
            matches!(result, Err(SqlError::NotAllowed(_))),
            "{statement}: {result:?}"
        );
    }
    assert_eq!(query(&mut tx, "select * from t", &[]).await.rows.len(), 1);
    tx.rollback().await;
    assert!(world.rows("select * from t").await.is_empty());
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Fresh { .. }
    ));
}

async fn the_platforms_tables_are_out_of_reach(world: World) {
    let postgres = [
        "select * from oncely.inbox",
        "select * from \"oncely\".\"inbox\"",
        "select * from U&\"\\006fncely\".inbox",
        "delete from oncely . outbox",
        "select set_config('role', 'none', true)",
        "select set_config('search_path', 'oncely', false)",
        "select pg_catalog.set_config('statement_timeout', '0', false)",
        "update pg_settings set setting = '0' where name = 'statement_timeout'",
        "select pg_advisory_lock(42)",
        "select pg_terminate_backend(1)",
        "select pg_sleep(100)",
        "select pg_read_file('/etc/passwd')",
        "select query_to_xml('select * from ' || 'onc' || 'ely.inbox', true, true, '')",
    ];
    let sqlite = [
        "select * from oncely_inbox",
        "select * from \"ONCELY_inbox\"",
        "select * from main.[oncely_inbox]",
        "delete from `oncely_outbox`",
        "insert into 'oncely_state' values (1)",
        "select * from sqlite_master",
        "select * from pragma_table_info('t')",
        "select * from pragma_database_list",
    ];
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    for statement in if world.is_postgres() {
        &postgres[..]
    } else {
        &sqlite[..]
    } {
        let result = tx.query(statement, &[], LIMITS).await.unwrap();
        assert!(
            matches!(result, Err(SqlError::NotAllowed(_))),
            "{statement}: {result:?}"
        );
    }
    tx.commit().await.unwrap();
}

async fn no_statement_breaks_the_connection(world: World) {
    for statement in [
        "select $0",
        "select $99999",
        "select $1a",
        "select ?0",
        "select :a",
        "select '",
        "select 1 /*",
        "select (",
        "(",
    ] {
        let mut tx = world.begin().await;
        let result = tx.query(statement, &[], LIMITS).await.unwrap();
        assert!(result.is_err(), "{statement}: {result:?}");
        tx.rollback().await;
    }
    assert_eq!(world.rows("select 1").await.len(), 1);
}

/// The text of these statements does not reveal their rollback.
#[tokio::test]
async fn a_transaction_that_sqlite_rolled_back_is_refused() {
    let world = World::sqlite().await;
    let ddl = "create table t (a integer);
         create table u (a integer unique on conflict rollback);
         create trigger ends before insert on t when new.a = 13 begin select raise(rollback, 'unlucky'); end;";
    world.migrate("1.sql", ddl).await;
    for ending in ["insert into t values (13)", "insert into u values (1), (1)"] {
        let mut tx = world.begin().await;
        claim(&mut tx, "e1", 1).await;
        execute(&mut tx, "insert into t values (1)", &[]).await;
        let result = tx.execute(ending, &[]).await.unwrap();
        assert!(
            matches!(result, Err(SqlError::ConstraintViolation(_))),
            "{result:?}"
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
