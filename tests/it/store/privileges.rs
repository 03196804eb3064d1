//! Hostile guest statements: each fails only its own message, also by database privileges alone.

use std::sync::Arc;
use std::time::Duration;

use oncely::model::sql::{SqlError, SqlLimits, Value};
use oncely::store::{Claimed, PostgresStore, StoreError};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};

use super::{LIMITS, WORKER, World, claim, execute, new_claim, query, text};

on_every_database!(
    each_hostile_statement_fails_only_its_own_message,
    without_the_filter_database_privileges_still_hold,
);

/// The time limit of a guest's statement.
const TIME: Duration = Duration::from_millis(800);

/// The result of a refused statement without the filter, under the privileges alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alone {
    /// It fails, on both databases.
    Fails,
    /// It may succeed, but changes at most its own transaction and its connection, which is then
    /// closed. Each commit is complete.
    Harmless,
}
use Alone::{Fails, Harmless};

const HOSTILE: &[(&str, Alone)] = &[
    // Spellings of the end of a transaction.
    ("commit", Fails),
    ("COMMIT WORK", Fails),
    ("end", Fails),
    ("end transaction", Fails),
    ("/* /* */ */ commit", Fails),
    ("-- a comment\ncommit", Fails),
    ("/**/ CoMmIt /**/ ;", Fails),
    ("\t\u{0b}\u{0c}commit", Fails),
    ("commit and chain", Fails),
    ("rollback", Harmless),
    ("abort", Harmless),
    ("rollback and chain", Harmless),
    ("rollback transaction", Harmless),
    ("begin", Harmless),
    ("start transaction", Harmless),
    ("savepoint a", Harmless),
    ("release savepoint a", Fails),
    ("rollback to savepoint a", Fails),
    ("prepare transaction 'x'", Fails),
    ("commit prepared 'x'", Fails),
    ("do $$ begin commit; end $$", Fails),
    ("call p()", Fails),
    ("select 1; commit", Fails),
    (
        "insert into effect values ('stray', 1); commit; insert into effect values ('stray', 2)",
        Fails,
    ),
    (
        "insert or rollback into effect select event_id, part from effect",
        Fails,
    ),
    ("update or rollback effect set event_id = null", Fails),
    // Other roles.
    ("set role postgres", Fails),
    ("set role none", Harmless),
    ("reset role", Harmless),
    ("set session authorization postgres", Fails),
    ("set local session authorization default", Harmless),
    ("select set_config('role', 'postgres', true)", Fails),
    ("select set_config('role', 'none', false)", Fails),
    (
        "select set_config('session_authorization', 'postgres', false)",
        Fails,
    ),
    ("alter role current_user superuser", Fails),
    ("create role friend superuser", Fails),
    ("grant pg_read_all_data to current_user", Fails),
    ("grant all on schema oncely to public", Fails),
    (
        "alter default privileges grant all on tables to public",
        Harmless,
    ),
    // Settings.
    ("set synchronous_commit = off", Harmless),
    ("set statement_timeout = 0", Harmless),
    ("set local search_path = oncely, pg_catalog", Harmless),
    ("set session_replication_role = replica", Fails),
    ("set constraints all deferred", Harmless),
    ("set transaction isolation level serializable", Fails),
    ("reset all", Harmless),
    ("discard all", Fails),
    ("alter system set fsync = off", Fails),
    ("select set_config('statement_timeout', '0', false)", Fails),
    (
        "select pg_catalog.set_config('synchronous_commit', 'off', false)",
        Fails,
    ),
    (
        "select \"set_config\"('search_path', 'oncely', false)",
        Fails,
    ),
    (
        "update pg_settings set setting = '0' where name = 'statement_timeout'",
        Fails,
    ),
    ("select pg_reload_conf()", Fails),
    ("pragma writable_schema = on", Fails),
    ("pragma journal_mode = delete", Fails),
    ("pragma foreign_keys = off", Fails),
    // Sleeps, locks and other sessions.
    ("select pg_sleep(100)", Fails),
    ("select pg_catalog . pg_sleep_for('100 seconds')", Fails),
    ("select pg_advisory_lock(42)", Fails),
    ("select pg_try_advisory_xact_lock(42)", Fails),
    ("lock table oncely.inbox", Fails),
    ("lock table effect in access exclusive mode", Harmless),
    (
        "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()",
        Fails,
    ),
    (
        "select pg_cancel_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()",
        Fails,
    ),
    ("select pg_notify('oncely', 'x')", Fails),
    ("notify oncely, 'x'", Harmless),
    ("listen oncely", Harmless),
    ("select pg_export_snapshot()", Fails),
    ("select pg_logical_emit_message(true, 'oncely', 'x')", Fails),
    // Statements as text, and keywords as names.
    (
        "select * from ts_stat('select to_tsvector(set_config(''role'', ''none'', false))')",
        Fails,
    ),
    (
        "select ts_rewrite('a'::tsquery, 'select ''a''::tsquery, set_config(''role'', ''none'', false)::tsquery')",
        Fails,
    ),
    ("select table_to_xml('oncely.inbox', true, true, '')", Fails),
    ("select database_to_xml(true, true, '')", Harmless),
    ("select treat('x' as pg_sleep)", Fails),
    (
        "select x.insert into hidden from (select 1 as insert) x",
        Fails,
    ),
    ("select 1 merge into hidden", Fails),
    ("select setval('number', 1)", Fails),
    ("select setseed(0.5)", Harmless),
    ("select oncely_definer.guard()", Harmless),
    // Floods.
    (
        "select count(*) from generate_series(1, 1000000000000)",
        Fails,
    ),
    ("select i from generate_series(1, 1000000) as n (i)", Fails),
    (
        "with recursive n (i) as (select 1 union all select i + 1 from n where i < 1000000000000) select max(i) from n",
        Fails,
    ),
    (
        "with recursive n (i) as (select 1 union all select i + 1 from n where i < 100000) \
         select count(*) from n a, n b, n c where a.i + b.i + c.i = 7",
        Fails,
    ),
    (
        "with recursive n (i) as (select 1 union all select i + 1 from n where i < 1000000000) \
         insert into effect select 'flood', i from n",
        Fails,
    ),
    ("select zeroblob(1000000000)", Fails),
    ("select length(randomblob(500000000))", Fails),
    (
        "select replace(hex(zeroblob(15000000)), '0', '000000')",
        Fails,
    ),
    ("select repeat('x', 100000000)", Fails),
    ("select repeat('x', 2000000000)", Fails),
    (
        "select array_agg(repeat('x', 10000000)) from generate_series(1, 1000000)",
        Fails,
    ),
    (
        "select sum(length(regexp_replace(repeat('a', 100000 + i % 2), '(a*)*b', ''))) from generate_series(1, 100000) i",
        Fails,
    ),
    // The platform's tables, and the definer functions.
    ("select * from oncely.inbox", Fails),
    ("select * from \"oncely\".\"outbox\"", Fails),
    ("select * from U&\"\\006fncely\".inbox", Fails),
    ("delete from oncely . outbox", Fails),
    ("insert into oncely.worker values ('x', 1)", Fails),
    ("update oncely.state set value = ''", Fails),
    ("truncate oncely.inbox", Fails),
    ("drop schema oncely cascade", Fails),
    ("select key from oncely.definer_key", Fails),
    ("select password from oncely.app_login", Fails),
    (
        "select * from oncely_definer.claim('\\x00', 'payments', array['x'], array[''::bytea], array[''], array[1])",
        Fails,
    ),
    (
        "select oncely_definer.release_claims('\\x00', 'payments', array['e'])",
        Fails,
    ),
    (
        "select * from oncely_definer.load_state(null, 'payments', array['x'])",
        Fails,
    ),
    (
        "select query_to_xml('select * from ' || 'onc' || 'ely.inbox', true, true, '')",
        Fails,
    ),
    (
        "create or replace function oncely_definer.check_token(bytea) returns void language sql as ''",
        Fails,
    ),
    ("select * from oncely_inbox", Fails),
    ("select * from \"ONCELY_inbox\"", Fails),
    ("select * from main.[oncely_state]", Fails),
    ("delete from `oncely_outbox`", Fails),
    ("insert into 'oncely_worker' values ('x', 1, 1)", Fails),
    ("update oncely_inbox set state = 'dead'", Fails),
    (
        "insert into effect select body, 1 from oncely_outbox union select 'x', 1",
        Fails,
    ),
    (
        "replace into oncely_deployment values ('x', 1, 'x', '{}', 1)",
        Fails,
    ),
    // The schema, other schemas and the catalog's secrets.
    ("select * from sqlite_master", Fails),
    ("select * from sqlite_schema", Fails),
    ("select * from sqlite_temp_master", Fails),
    ("select * from pragma_table_info('effect')", Fails),
    ("select * from pragma_database_list", Fails),
    ("select * from dbstat", Fails),
    ("delete from sqlite_sequence", Fails),
    ("select load_extension('/tmp/x.so')", Fails),
    ("attach database ':memory:' as other", Fails),
    ("vacuum into '/tmp/oncely-stolen.db'", Fails),
    ("detach database main", Fails),
    ("analyze effect", Harmless),
    ("reindex effect", Fails),
    ("select * from app_other.secret", Fails),
    ("insert into app_other.secret values ('x')", Fails),
    ("select rolpassword from pg_authid", Fails),
    ("select passwd from pg_shadow", Fails),
    ("select * from pg_hba_file_rules", Fails),
    ("select * from pg_user_mapping", Fails),
    ("select pg_read_file('/etc/passwd')", Fails),
    ("select pg_ls_dir('/')", Fails),
    ("select lo_import('/etc/passwd')", Fails),
    ("select lo_create(0)", Fails),
    (
        "select * from dblink('dbname=postgres', 'select 1') as t (a integer)",
        Fails,
    ),
    ("copy effect to '/tmp/oncely-stolen'", Fails),
    ("copy effect to program 'sh'", Fails),
    ("copy oncely.inbox to stdout", Fails),
    // Creation of objects.
    ("create table hidden (a integer)", Fails),
    ("create temporary table hidden (a integer)", Fails),
    ("select 1 as a into hidden", Fails),
    ("create view hidden as select 1", Fails),
    (
        "create function hidden() returns integer language sql as 'select 1'",
        Fails,
    ),
    (
        "create function pg_temp.hidden() returns integer language sql as 'select 1'",
        Fails,
    ),
    (
        "create trigger hidden after insert on effect begin select 1; end",
        Fails,
    ),
    (
        "create rule hidden as on insert to effect do instead nothing",
        Fails,
    ),
    ("create extension dblink", Fails),
    ("create schema hidden", Fails),
    ("create database hidden", Fails),
    ("alter table effect add hidden integer", Fails),
    ("alter table effect disable trigger all", Fails),
    ("drop table effect", Fails),
    ("truncate effect", Fails),
    ("vacuum", Fails),
    ("comment on table effect is 'x'", Fails),
    ("security label on table effect is 'x'", Fails),
    ("explain analyze delete from oncely.inbox", Fails),
    (
        "declare c cursor with hold for select * from oncely.inbox",
        Fails,
    ),
    ("prepare p as select * from oncely.inbox", Fails),
    ("execute p", Fails),
    ("deallocate all", Harmless),
];

const TABLES: &str =
    "create table effect (event_id text not null, part integer not null, unique (event_id, part))";

/// Checks the session settings that no statement may change.
async fn check_session_settings(world: &World) {
    if !world.is_postgres() {
        return;
    }
    let settings = "select current_setting('synchronous_commit'), current_setting('search_path'),
        current_setting('session_replication_role'), current_setting('transaction_read_only'), session_user = current_user,
        current_setting('is_superuser')";
    // The filter permits the names of these settings, only changing them is refused.
    let rows = world.rows(settings).await;
    let expected = [
        text("on"),
        text("app_default, pg_temp"),
        text("origin"),
        text("off"),
    ];
    assert_eq!(rows[0][..4], expected);
    assert_eq!(rows[0][4..], [Value::Boolean(true), text("off")]);
}

/// A schema of another owner.
async fn create_other_schema(world: &World) {
    if world.is_postgres() {
        world
            .run_directly("create schema app_other; create table app_other.secret (a text)")
            .await;
    }
}

async fn each_hostile_statement_fails_only_its_own_message(world: World) {
    assert!(HOSTILE.len() >= 60);
    world.migrate("1.sql", TABLES).await;
    create_other_schema(&world).await;
    for (n, (statement, _)) in HOSTILE.iter().enumerate() {
        let event_id = format!("e{n}");
        let mut neighbour = if world.is_postgres() {
            Some(world.begin().await)
        } else {
            None
        };
        if let Some(neighbour) = &mut neighbour {
            claim(neighbour, &format!("n{n}"), 1).await;
        }
        let mut tx = world.store.begin(WORKER, TIME).await.unwrap();
        claim(&mut tx, &event_id, 1).await;
        execute(
            &mut tx,
            "insert into effect values ($1, 1)",
            &[text(&event_id)],
        )
        .await;
        let result = tx.query(statement, &[], LIMITS).await.unwrap();
        assert!(result.is_err(), "{statement}: {result:?}");
        let result = tx.execute(statement, &[]).await.unwrap();
        assert!(result.is_err(), "{statement}: {result:?}");
        tx.rollback().await;
        let mut neighbour = match neighbour {
            Some(neighbour) => neighbour,
            None => {
                let mut neighbour = world.begin().await;
                claim(&mut neighbour, &format!("n{n}"), 1).await;
                neighbour
            }
        };
        execute(
            &mut neighbour,
            "insert into effect values ($1, 1)",
            &[text(&format!("n{n}"))],
        )
        .await;
        neighbour.commit().await.unwrap();
    }
    let count = Value::Int64(HOSTILE.len().try_into().unwrap());
    let neighbours = "select count(*), count(distinct event_id) from effect where event_id like 'n%' and part = 1";
    assert_eq!(
        world.rows(neighbours).await,
        [[count.clone(), count.clone()]]
    );
    assert_eq!(world.rows("select count(*) from effect").await, [[count]]);
    check_session_settings(&world).await;
}

/// Claims like a lane: again, if the connection turns out to be unusable.
async fn claim_again(world: &World, event_id: &str) -> Claimed {
    let mut tx = world.begin().await;
    let claimed = tx.claim(&[new_claim(event_id, 1)]).await;
    tx.rollback().await;
    match claimed {
        Ok(mut claimed) => claimed.remove(0),
        Err(_) => world.claim_and_roll_back(event_id, 1).await,
    }
}

async fn without_the_filter_database_privileges_still_hold(world: World) {
    let world = world.without_filter().await;
    world.migrate("1.sql", TABLES).await;
    create_other_schema(&world).await;
    let mut surprises = Vec::new();
    for (n, (statement, alone)) in HOSTILE.iter().enumerate() {
        let event_id = format!("e{n:04}");
        let mut tx = world.store.begin(WORKER, TIME).await.unwrap();
        claim(&mut tx, &event_id, 1).await;
        execute(
            &mut tx,
            "insert into effect values ($1, 1)",
            &[text(&event_id)],
        )
        .await;
        let result = tx.query(statement, &[], LIMITS).await;
        if !matches!(result, Ok(Err(_))) && (*alone == Fails || result.is_err()) {
            surprises.push(format!("{statement}: {result:?}"));
        }
        // Later statements take effect together with earlier ones, or not at all.
        let after = tx
            .execute("insert into effect values ($1, 2)", &[text(&event_id)])
            .await;
        let committed = tx.commit().await.is_ok();
        let parts = world
            .rows(&format!("select part from effect where event_id in ('{event_id}', 'stray', 'flood') order by part"))
            .await;
        let is_settled = !matches!(claim_again(&world, &event_id).await, Claimed::Fresh { .. });
        let whole = [vec![Value::Int64(1)], vec![Value::Int64(2)]];
        let right = match committed {
            true => is_settled && parts == whole && matches!(after, Ok(Ok(1))),
            false => !is_settled && parts.is_empty(),
        };
        if !right {
            surprises.push(format!(
                "{statement}: committed {committed}, settled {is_settled}, {parts:?}, {after:?}"
            ));
        }
    }
    assert!(surprises.is_empty(), "{}", surprises.join("\n"));
    check_session_settings(&world).await;
}

/// The connection's next user finds its prepared statements gone, which costs one connection.
#[tokio::test]
async fn a_guest_that_deallocates_statements_costs_one_connection() {
    let mut world = World::postgres().await;
    world.store.close().await;
    let url = world.store_url.clone().unwrap();

    // A single connection for guests, so that it is reused.
    let store = PostgresStore::connect(&url, 2).await.unwrap();
    world.store = Arc::new(store.without_filter().into());
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    execute(&mut tx, "deallocate all", &[]).await;
    tx.commit().await.unwrap();
    let mut tx = world.begin().await;
    let lost = tx.claim(&[new_claim("e2", 1)]).await;
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "{lost:?}");
    tx.rollback().await;
    assert!(matches!(
        world.claim_and_roll_back("e2", 1).await,
        Claimed::Fresh { .. }
    ));
    assert!(matches!(
        world.claim_and_roll_back("e1", 1).await,
        Claimed::Settled(_)
    ));
}

/// A connection's value limits apply to guests only: the platform stores large components and
/// payloads.
#[tokio::test]
async fn the_platform_stores_values_that_guests_may_not_create() {
    let world = World::sqlite().await;
    world.migrate("1.sql", "create table big (a blob)").await;
    let limits = SqlLimits {
        rows: 10,
        bytes: 1 << 30,
    };
    let mut tx = world.begin().await;
    let result = tx
        .query("select zeroblob(40000000)", &[], limits)
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::TooLarge(_))), "{result:?}");
    tx.rollback().await;
    let wasm = vec![0; 40_000_000];
    world
        .store
        .put_component(&"b".repeat(64), &wasm)
        .await
        .unwrap();
    assert_eq!(
        world
            .store
            .component(&"b".repeat(64))
            .await
            .unwrap()
            .map(|wasm| wasm.len()),
        Some(40_000_000)
    );
}

/// A prepared statement of the platform, which bypasses the filter, is not reused for a guest with
/// the same text.
#[tokio::test]
async fn a_platform_statement_sent_by_a_guest_is_refused() {
    let world = World::sqlite().await.without_filter().await;
    world.migrate("1.sql", TABLES).await;
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    let unclaim = "delete from oncely_inbox where worker = $1 and event_id in (select value from json_each($2))";
    tx.release_claims(&["e2".to_owned()]).await.unwrap();
    let result = tx
        .execute(unclaim, &[text(WORKER), text("[\"e1\"]")])
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::NotAllowed(_))), "{result:?}");
    tx.rollback().await;
    let mut tx = world.begin().await;
    let rows = query(
        &mut tx,
        "select value from json_each($1)",
        &[text("[1, 2]")],
    )
    .await
    .rows;
    assert_eq!(rows, [[Value::Int64(1)], [Value::Int64(2)]]);
    assert_eq!(query(&mut tx, "select 1 + 1", &[]).await.columns, ["1 + 1"]);
    tx.rollback().await;
}

/// Full-text tables keep shadow tables and maintain them with SQL.
#[tokio::test]
async fn a_worker_may_have_a_full_text_table() {
    let world = World::sqlite().await;
    world
        .migrate("1.sql", "create virtual table note using fts5 (body)")
        .await;
    for body in ["the quick brown fox", "the lazy dog"] {
        let mut tx = world.begin().await;
        claim(&mut tx, body, 1).await;
        execute(&mut tx, "insert into note values ($1)", &[text(body)]).await;
        tx.commit().await.unwrap();
    }
    assert_eq!(
        world
            .rows("select body from note where note match 'lazy'")
            .await,
        [[text("the lazy dog")]]
    );
}

/// A fresh database owned by a role without superuser rights: the role's URL and the test's.
pub async fn database_with_role(attributes: &str) -> (String, String) {
    let database = support::postgres::shared().create_database().await.unwrap();
    let direct = support::postgres::shared().url(&database);
    let sql = format!(
        "create role {database}_platform login {attributes} password 'secret';
         alter database {database} owner to {database}_platform"
    );
    let mut around = PgConnection::connect(&direct).await.unwrap();
    around.execute(AssertSqlSafe(sql)).await.unwrap();
    (
        direct.replace("postgres@", &format!("{database}_platform:secret@")),
        direct,
    )
}

pub fn world_on(store: PostgresStore, url: String, direct: String) -> World {
    let folder = tempfile::tempdir().unwrap();
    World {
        store: Arc::new(store.into()),
        store_url: Some(url),
        url: Some(direct),
        folder,
    }
}

#[tokio::test]
async fn guests_log_in_as_the_app_role_which_owns_nothing() {
    let world = World::postgres().await;
    world
        .migrate(
            "1.sql",
            "create table t (a integer); create view v as select a from t",
        )
        .await;
    let roles = "select session_user::text, current_user::text, current_database()::text";
    let rows = world.rows(roles).await;
    let [
        Value::Text(session),
        Value::Text(current),
        Value::Text(database),
    ] = &rows[0][..]
    else {
        panic!("{rows:?}")
    };
    assert_eq!(
        (session, current),
        (&format!("oncely_app_default_{database}"), session)
    );
    let of_role =
        "select rolsuper, rolinherit, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,
        exists (select from pg_catalog.pg_auth_members where member = pg_roles.oid),
        exists (select from pg_catalog.pg_shdepend where refobjid = pg_roles.oid and deptype = 'o')
        from pg_catalog.pg_roles where rolname = session_user";
    let world = world.without_filter().await;
    assert_eq!(
        world.rows(of_role).await,
        [[const { Value::Boolean(false) }; 8]]
    );
    let owners = "select distinct relowner::regrole::text from pg_catalog.pg_class
        where relnamespace = 'app_default'::regnamespace";
    assert_eq!(
        world.rows(owners).await,
        [[text(&format!("oncely_owner_default_{database}"))]]
    );
}

/// The app role's password gives read access to the app's tables.
#[tokio::test]
async fn the_app_role_password_opens_only_the_apps_tables() {
    let world = World::postgres().await;
    world.migrate("1.sql", TABLES).await;
    let mut around = world.connect().await;
    let row = around
        .fetch_one("select role, password from oncely.app_login")
        .await
        .unwrap();
    let (role, password): (String, String) = (row.get(0), row.get(1));
    let url = |password: &str| {
        world
            .url
            .as_deref()
            .unwrap()
            .replace("postgres@", &format!("{role}:{password}@"))
    };
    assert!(PgConnection::connect(&url("guessed")).await.is_err());
    let mut guest = PgConnection::connect(&url(&password)).await.unwrap();
    guest.execute("select * from effect").await.unwrap();
    for (statement, says) in [
        ("insert into effect values ('x', 1)", "read-only"),
        ("select * from oncely.definer_key", "permission denied"),
        ("select oncely.tx_token('definer')", "permission denied"),
        (
            "select oncely_definer.release_claims('', 'payments', array['e1'])",
            "only the host",
        ),
        (
            "begin read write; select oncely_definer.guard(); insert into effect values ('x', 1); commit",
            "only the host ends",
        ),
    ] {
        let error = guest
            .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{statement}: {error}");
        guest.execute(sqlx::raw_sql("rollback")).await.unwrap();
    }
    assert!(world.rows("select * from effect").await.is_empty());
}

/// A token for the definer functions is worthless in the next transaction.
#[tokio::test]
async fn a_token_is_valid_for_its_transaction_only() {
    let world = World::postgres().await;
    let mut around = world.connect().await;
    let token: Vec<u8> = around
        .fetch_one("select oncely.tx_token('definer')")
        .await
        .unwrap()
        .get(0);
    let call = || {
        sqlx::query("select oncely_definer.release_claims($1, 'payments', array['e1'])")
            .bind(token.clone())
    };
    let error = call().execute(&mut around).await.unwrap_err().to_string();
    assert!(error.contains("only the host may use"), "{error}");
}

#[tokio::test]
async fn the_host_cancels_a_statement_that_lifted_its_timeout() {
    let world = World::postgres().await.without_filter().await;
    let mut tx = world
        .store
        .begin(WORKER, Duration::from_millis(300))
        .await
        .unwrap();
    claim(&mut tx, "e1", 1).await;
    execute(&mut tx, "set local statement_timeout = 0", &[]).await;
    let began = std::time::Instant::now();
    let result = tx
        .query(
            "select count(*) from generate_series(1, 1000000000000)",
            &[],
            LIMITS,
        )
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::Timeout)), "{result:?}");
    assert!(began.elapsed() < Duration::from_secs(5));
    tx.rollback().await;
    assert_eq!(world.rows("select 1").await, [[Value::Int64(1)]]);
}

#[tokio::test]
async fn a_user_without_createrole_gets_a_hint_to_guest_sql_trusted() {
    let (url, direct) = database_with_role("").await;
    let error = PostgresStore::connect(&url, 4).await.err().unwrap();
    let hints = oncely::model::hint::hints(&error).join(" ");
    assert!(
        hints.contains("guest_sql = \"trusted\"") && hints.contains("only the statement filter"),
        "{error:?}"
    );
    let store = PostgresStore::connect_trusted(&url, 4).await.unwrap();
    let world = world_on(store, url, direct);
    world.migrate("1.sql", TABLES).await;
    let mut tx = world.begin().await;
    claim(&mut tx, "e1", 1).await;
    execute(&mut tx, "insert into effect values ('e1', 1)", &[]).await;
    tx.commit().await.unwrap();
    assert_eq!(
        world.rows("select part from effect").await,
        [[Value::Int64(1)]]
    );
    let mut tx = world.begin().await;
    let result = tx
        .query("select * from oncely.inbox", &[], LIMITS)
        .await
        .unwrap();
    assert!(matches!(result, Err(SqlError::NotAllowed(_))), "{result:?}");
    tx.rollback().await;
}

/// As on a managed database: without a superuser, the functions of PUBLIC stay callable.
#[tokio::test]
async fn restricted_mode_works_without_a_superuser() {
    let (url, direct) = database_with_role("createrole").await;
    let world = world_on(
        PostgresStore::connect_trusted(&url, 4).await.unwrap(),
        url.clone(),
        direct,
    );
    world
        .migrate(
            "0.sql",
            "create table early (a integer generated by default as identity primary key)",
        )
        .await;
    let store = PostgresStore::connect(&url, 4).await.unwrap();
    let world = World {
        store: Arc::new(store.into()),
        ..world
    };
    world
        .migrate("0b.sql", "alter table early add b text")
        .await;
    let mut tx = world.begin().await;
    claim(&mut tx, "early", 1).await;
    execute(&mut tx, "insert into early (b) values ('x')", &[]).await;
    tx.commit().await.unwrap();
    each_hostile_statement_fails_only_its_own_message(world).await;
}
