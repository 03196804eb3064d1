//! Callable functions, the session that guests share with the host, and the definer key.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use oncely::model::keyed_state::StateWrite;
use oncely::model::request::{HttpResponse, RequestKey};
use oncely::model::sql::{SqlError, Value};
use oncely::store::{Claimed, KeptResponse, PostgresStore, StoreError};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};

use super::privileges::{database_with_role, world_on};
use super::{LEASE, LIMITS, WORKER, World, claim, execute, new_output, query, text};

on_every_database!(
    an_oversized_statement_is_refused_unparsed,
    a_value_refused_by_platform_tables_is_a_guest_failure,
    a_write_in_a_read_only_transaction_is_a_guest_failure,
);

/// Volatile functions of PostgreSQL that guests may call; all others are refused.
const VOLATILE: [&str; 8] = [
    "bernoulli",
    "clock_timestamp",
    "currval",
    "gen_random_uuid",
    "lastval",
    "nextval",
    "random",
    "system",
];

/// Functions that are not volatile, but run text as a statement or read any table by its name.
const RUN_TEXT: &str =
    "^(ts_rewrite|(query|cursor|table|schema|database)_to_xml.*|fmgr_.*_validator)$";

/// A host without superuser rights, as on a managed database: functions of `PUBLIC` stay callable.
async fn managed() -> World {
    let (url, direct) = database_with_role("createrole").await;
    world_on(PostgresStore::connect(&url, 2).await.unwrap(), url, direct)
}

/// Functions that the server's catalog lists as volatile or text-running are refused in every
/// spelling.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_disallowed_catalog_function_is_refused() {
    let world = managed().await;
    let mut around = world.connect().await;

    // Functions with an argument `internal` cannot be called at all.
    let functions = sqlx::query(
        "select distinct proname::text from pg_proc
         where pronamespace = 'pg_catalog'::regnamespace and proname ~ '^[a-z0-9_]+$' and (provolatile = 'v' or proname ~ $1)",
    );
    let rows = functions
        .bind(RUN_TEXT)
        .fetch_all(&mut around)
        .await
        .unwrap();
    let names: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert!(
        names.len() > 150 && names.contains("set_config") && names.contains("ts_stat"),
        "{names:?}"
    );
    let mut tx = world.begin().await;
    for name in names
        .iter()
        .filter(|name| !VOLATILE.contains(&name.as_str()) && *name != "timeofday")
    {
        // A function with one argument can be written as an attribute.
        let columns = sqlx::query(
            "select bool_or(pronargs > 0 and pronargs - pronargdefaults <= 1) from pg_proc where proname = $1",
        );
        if columns
            .bind(name)
            .fetch_one(&mut around)
            .await
            .unwrap()
            .get(0)
        {
            let statement = format!("select (x).\"{name}\" from (select 1 as x) as x");
            let result = tx.query(&statement, &[], LIMITS).await.unwrap();
            assert!(
                matches!(result, Err(SqlError::NotAllowed(_))),
                "{statement}: {result:?}"
            );
        }
        for statement in [
            format!("select {name}($1)"),
            format!("select pg_catalog.\"{name}\"()"),
            format!("select * from {} /* */ (1, $1)", name.to_uppercase()),
        ] {
            let result = tx.query(&statement, &[], LIMITS).await.unwrap();
            assert!(
                matches!(result, Err(SqlError::NotAllowed(_))),
                "{statement}: {result:?}"
            );
        }
    }

    // Allowed volatile functions still work.
    assert_eq!(
        query(
            &mut tx,
            "select random() < 1, gen_random_uuid() is not null",
            &[]
        )
        .await
        .rows
        .len(),
        1
    );
    tx.rollback().await;
}

/// The volatile and query-running functions of every available extension are refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn functions_of_unknown_extensions_are_refused() {
    let world = managed().await;
    for extension in [
        "dblink",
        "tablefunc",
        "xml2",
        "pg_trgm",
        "pgcrypto",
        "hstore",
        "postgres_fdw",
    ] {
        world
            .run_directly(&format!(
                "create extension if not exists \"{extension}\" schema app_default"
            ))
            .await;
    }
    let mut tx = world.begin().await;
    for statement in [
        "select * from dblink($1, $2) as t (a integer)",
        "select dblink_exec('', $1)",
        "select * from app_default.crosstab($1) as t (a integer, b integer)",
        "select * from connectby($1, 'a', 'b', 'c', 0) as t (a integer, b integer, c integer)",
        "select * from xpath_table('a', 'b', $1, 'c', 'd') as t (a integer)",
        "select set_limit(0.1)",
        "select postgres_fdw_disconnect_all()",
    ] {
        let result = tx.query(statement, &[], LIMITS).await.unwrap();
        assert!(
            matches!(result, Err(SqlError::NotAllowed(_))),
            "{statement}: {result:?}"
        );
    }
    let known = "select similarity('a', 'a') = 1, encode(digest('a', 'sha256'), 'hex') <> '', gen_salt('bf') <> ''";
    assert_eq!(
        query(&mut tx, known, &[]).await.rows,
        [[const { Value::Boolean(true) }; 3]]
    );
    tx.rollback().await;
}

/// The statements that once made an event take effect twice: a SELECT passed as a parameter changed
/// the session's encoding.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_passed_as_a_parameter_is_not_run() {
    let world = managed().await;
    let inner = "select to_tsvector(set_config('client_encoding', 'LATIN1', false))";
    for statement in [
        "select * from ts_stat($1)",
        "select pg_catalog.ts_stat($1)",
        "select ts_rewrite('a'::tsquery, $1)",
        "select query_to_xml($1, true, true, '')",
    ] {
        let mut tx = world.begin().await;
        claim(&mut tx, "é", 1).await;
        let result = tx.query(statement, &[text(inner)], LIMITS).await.unwrap();
        assert!(
            matches!(result, Err(SqlError::NotAllowed(_))),
            "{statement}: {result:?}"
        );
        tx.rollback().await;
        assert_eq!(
            world
                .rows("select current_setting('client_encoding')")
                .await,
            [[text("UTF8")]]
        );
    }
}

/// A worker's own function may change its session: the next transaction starts with a clean one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_state_is_reset_between_transactions() {
    let world = managed().await;
    world
        .migrate(
            "1.sql",
            "create sequence number;
             create function spoil() returns void language plpgsql as $$
             begin
                 set client_encoding = 'LATIN1';
                 set timezone = 'Asia/Tokyo';
                 set search_path = pg_catalog;
                 set bytea_output = 'escape';
                 set extra_float_digits = -10;
                 set default_text_search_config = 'german';
                 perform pg_advisory_lock(42), nextval('app_default.number');
                 listen oncely;
             end $$",
        )
        .await;
    let seen =
        "select current_setting('client_encoding'), current_setting('timezone'), current_setting('bytea_output'),
        current_setting('extra_float_digits'), current_setting('default_text_search_config')";
    let before = world.rows(seen).await;
    let mut tx = world.begin().await;
    assert!(matches!(
        claim(&mut tx, "é", 1).await,
        Claimed::Fresh { .. }
    ));
    tx.commit().await.unwrap();

    // Without a commit
    let mut tx = world.begin().await;
    claim(&mut tx, "spoils", 1).await;
    tx.execute("select spoil()", &[]).await.unwrap().unwrap();

    // From here on, the host's own statements are refused.
    let appended = tx
        .append_outputs(&[new_output("spoils", 0, Duration::ZERO)], LEASE)
        .await;
    assert!(
        matches!(appended, Err(StoreError::Refused(_))),
        "{appended:?}"
    );
    tx.rollback().await;

    // With a commit
    let mut tx = world.begin().await;
    claim(&mut tx, "spoils", 1).await;
    tx.execute("select spoil()", &[]).await.unwrap().unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.rows(seen).await, before);
    assert!(matches!(
        world.claim_and_roll_back("é", 1).await,
        Claimed::Settled(_)
    ));
    let locks: i64 = world
        .connect()
        .await
        .fetch_one("select count(*) from pg_locks where locktype = 'advisory' and objid = 42")
        .await
        .unwrap()
        .get(0);
    assert_eq!(locks, 0);
    let mut tx = world.begin().await;
    let result = tx.query("select lastval()", &[], LIMITS).await.unwrap();
    assert!(
        matches!(result, Err(SqlError::QueryFailed(_))),
        "{result:?}"
    );
    tx.rollback().await;
}

async fn definer_key(world: &World) -> (Vec<u8>, String) {
    let mut around = world.connect().await;
    let row = around
        .fetch_one(
            "select key, (select min(password) from oncely.app_login) from oncely.definer_key",
        )
        .await;
    let row = row.unwrap();
    (row.get(0), row.try_get(1).unwrap_or_default())
}

/// Trusted guest SQL can read the key. The first host in restricted mode replaces it, and running
/// hosts adopt the new key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entering_restricted_mode_renews_the_definer_key() {
    // A restart keeps the key.
    let (url, direct) = database_with_role("createrole").await;
    let restricted = world_on(
        PostgresStore::connect(&url, 4).await.unwrap(),
        url.clone(),
        direct.clone(),
    );
    let (first, password) = definer_key(&restricted).await;
    restricted.store.close().await;
    let restricted = world_on(
        PostgresStore::connect(&url, 4).await.unwrap(),
        url.clone(),
        direct.clone(),
    );
    assert_eq!(
        definer_key(&restricted).await,
        (first.clone(), password.clone()),
        "a restart alone renewed the key"
    );
    restricted.store.close().await;

    // A change to trusted mode and back renews it.
    let trusted = world_on(
        PostgresStore::connect_trusted(&url, 4).await.unwrap(),
        url.clone(),
        direct.clone(),
    );
    let mut tx = trusted.begin().await;
    claim(&mut tx, "e1", 1).await;
    let restricted = world_on(
        PostgresStore::connect(&url, 4).await.unwrap(),
        url.clone(),
        direct.clone(),
    );
    let (renewed, other_password) = definer_key(&restricted).await;
    assert!(renewed != first && other_password != password);

    // Neither host mistakes the change for an act of the guest.
    assert!(matches!(tx.commit().await, Err(StoreError::Unavailable(_))));
    for world in [&trusted, &restricted] {
        let mut tx = world.begin().await;
        assert!(matches!(
            claim(&mut tx, "e2", 1).await,
            Claimed::Fresh { .. }
        ));
        tx.rollback().await;
    }

    // A token of the old key is invalid.
    let mut around = PgConnection::connect(&direct).await.unwrap();
    let mut forged = around.begin().await.unwrap();
    let sql = format!(
        "select oncely_definer.release_claims(sha256('\\x{0}'::bytea || sha256('\\x{0}'::bytea ||
             convert_to('definer:' || pg_current_xact_id()::text, 'UTF8'))), 'payments', array['e1'])",
        hex::encode(&first)
    );
    let refused = forged
        .execute(AssertSqlSafe(sql))
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("the definer key was renewed"), "{refused}");
}

async fn an_oversized_statement_is_refused_unparsed(world: World) {
    let mut tx = world.begin().await;
    for statement in [
        format!("select 1{}", ";".repeat(8 << 20)),
        format!("select '{}'", "x".repeat(1 << 20)),
    ] {
        let began = Instant::now();
        let result = tx.query(&statement, &[], LIMITS).await.unwrap();
        assert!(matches!(result, Err(SqlError::TooLarge(_))), "{result:?}");
        assert!(
            began.elapsed() < Duration::from_millis(100),
            "{:?}",
            began.elapsed()
        );
    }
    tx.rollback().await;
}

async fn a_value_refused_by_platform_tables_is_a_guest_failure(world: World) {
    let (route, key) = ("/transfers".to_owned(), "k1".to_owned());
    let request = RequestKey {
        route,
        caller: String::new(),
        key,
        fingerprint: [1; 32],
    };
    for status in [199, 600, 999] {
        let mut tx = world.begin().await;
        tx.claim_requests(&[&request]).await.unwrap();
        let response = HttpResponse {
            status,
            headers: Vec::new(),
            body: bytes::Bytes::new(),
        };
        let kept = KeptResponse {
            request: &request,
            response: &response,
            keep: Duration::from_secs(60),
        };
        let kept = tx.store_responses(&[kept]).await;
        assert!(
            matches!(kept, Err(StoreError::Refused(_))),
            "{status}: {kept:?}"
        );
        tx.rollback().await;
    }
    let mut tx = world.begin().await;
    let write = StateWrite {
        key: "k".repeat(300),
        expected: None,
        version: 1,
        value: Some(bytes::Bytes::new()),
    };
    let saved = tx.save_state(&[write]).await;
    assert!(matches!(saved, Err(StoreError::Refused(_))), "{saved:?}");
    tx.rollback().await;
}

async fn a_write_in_a_read_only_transaction_is_a_guest_failure(world: World) {
    world
        .migrate("1.sql", "create table t (a integer primary key)")
        .await;
    let mut statements = vec![
        "insert into t values (1)",
        "with a as (select 1) insert into t select * from a",
    ];
    if !world.is_postgres() {
        statements.push("with a as (select 1) replace into t select * from a");
        statements.push("with a (a) as (select 1) insert or replace into t select a from a");
    }
    for statement in statements {
        let mut tx = world
            .store
            .begin_read_only(WORKER, Duration::from_secs(5))
            .await
            .unwrap();
        let result = tx.execute(statement, &[]).await.unwrap();
        assert!(result.is_err(), "{statement}: {result:?}");
        tx.rollback().await;
    }
    let mut tx = world.begin().await;
    assert_eq!(execute(&mut tx, "insert into t values (1)", &[]).await, 1);
    tx.rollback().await;
}
