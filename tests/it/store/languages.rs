//! Errors are classified by their codes.
//!
//! The texts depend on the server's language, and a worker's function may raise any code.

use oncely::model::sql::SqlError;
use oncely::store::{PostgresStore, Store, StoreError, Tx};
use support::postgres::Cluster;

use super::{World, claim, execute, query, text};

async fn fails(tx: &mut Tx, statement: &str, params: &[oncely::model::sql::Value]) -> SqlError {
    tx.execute(statement, params).await.unwrap().unwrap_err()
}

/// Statements with a wrong number of parameters, and that number.
const MISCOUNTED: [(&str, usize); 5] = [
    ("select $1::text, $2::text", 1),
    ("select $1::text", 2),
    ("select 1", 1),
    ("select $1::text", 0),
    ("insert into t values ($2, $1)", 1),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_a_german_server_are_classified() {
    let cluster = Cluster::start_in_german().unwrap();
    let world = World::on_postgres(&cluster.url("postgres"), &cluster.url("postgres")).await;
    world
        .migrate("1.sql", "create table t (a text, b text)")
        .await;
    let mut tx = world.begin().await;

    // The server reports in German if its translations are installed.
    let said = fails(&mut tx, "select * from nowhere", &[])
        .await
        .to_string();
    tx.rollback().await;
    println!("server message: {said}");
    for (statement, count) in MISCOUNTED {
        let mut tx = world.begin().await;
        let error = fails(&mut tx, statement, &vec![text("x"); count]).await;
        assert!(
            matches!(error, SqlError::InvalidParameter(_)),
            "{statement}: {error:?}"
        );
        // The statement was not sent: the transaction continues.
        execute(
            &mut tx,
            "insert into t values ($1, $2)",
            &[text("x"), text("y")],
        )
        .await;
        tx.commit().await.unwrap();
    }
    changes_under_a_prepared_statement(&world).await;

    // Without the filter, only the server counts parameters.
    let unfiltered = PostgresStore::connect(&cluster.url("postgres"), 8)
        .await
        .map(|store| Store::from(store.without_filter()))
        .unwrap();
    for (statement, count) in MISCOUNTED
        .into_iter()
        .filter(|(statement, count)| *count < statement.matches('$').count())
    {
        let mut tx = unfiltered.begin(super::WORKER, super::TIME).await.unwrap();
        let error = fails(&mut tx, statement, &vec![text("x"); count]).await;
        assert!(
            matches!(error, SqlError::InvalidParameter(_)),
            "{statement}: {error:?}"
        );
        tx.rollback().await;
    }
}

/// After a column is added, the statement of each connection fails once with a conflict and is
/// prepared again.
async fn changes_under_a_prepared_statement(world: &World) {
    let mut open = Vec::new();
    for _ in 0..4 {
        let mut tx = world.begin().await;
        query(&mut tx, "select * from t", &[]).await;
        open.push(tx);
    }
    for tx in open {
        tx.rollback().await;
    }
    world
        .run_directly("alter table app_default.t add column c int")
        .await;
    let mut failures = 0;
    for _ in 0..12 {
        let mut tx = world.begin().await;
        match tx
            .query("select * from t", &[], super::LIMITS)
            .await
            .unwrap()
        {
            Ok(rows) => assert_eq!(rows.columns.len(), 3),
            Err(error) => {
                assert!(matches!(error, SqlError::Conflict(_)), "{error:?}");
                failures += 1;
            }
        }
        tx.rollback().await;
    }
    assert!(failures <= 4, "{failures} failures on four connections");
}

/// Codes for server trouble and for conflicts with other transactions, and Oncely's own codes.
const CODES: [&str; 24] = [
    "08000", "08003", "08006", "08P01", "0A000", "22012", "25006", "25P02", "26000", "28P01",
    "40001", "40P01", "42P05", "53100", "53200", "53300", "55P03", "57014", "57P01", "57P03",
    "58030", "ONC01", "ONC03", "ONC04",
];

const RAISING: &str = "create table raising (code text);
    create function raise_code() returns trigger language plpgsql as
        $$ begin raise exception using errcode = new.code, message = 'it was raised'; end $$;
    create trigger raises before insert on raising for each row execute function raise_code();
    create table raising_late (code text);
    create constraint trigger raises_late after insert on raising_late deferrable initially deferred
        for each row execute function raise_code();";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_code_raised_by_a_function_is_no_outage() {
    let world = World::postgres().await;
    world.migrate("1.sql", RAISING).await;
    for code in CODES {
        let mut tx = world.begin().await;
        let error = fails(&mut tx, "insert into raising values ($1)", &[text(code)]).await;
        assert!(
            matches!(error, SqlError::QueryFailed(_) | SqlError::NotAllowed(_)),
            "{code}: {error:?}"
        );
        tx.rollback().await;

        let mut tx = world.begin().await;
        claim(&mut tx, code, 1).await;
        execute(
            &mut tx,
            "insert into raising_late values ($1)",
            &[text(code)],
        )
        .await;
        let refused = tx.commit().await.unwrap_err();
        // The host reads its key again, and charges the message if the key was unchanged.
        let is_charged = matches!(refused, StoreError::Refused(_)) || refused.broke_in_statement();
        assert!(is_charged, "{code}: {refused:?}");
        assert!(matches!(
            world.claim_and_roll_back(code, 1).await,
            oncely::store::Claimed::Fresh { .. }
        ));
    }
}
