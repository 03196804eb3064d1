//! The oracle: a server that reports each use of a privilege that guests must not have.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use oncely::model::sql::Functions;
use oncely::store::{PostgresStore, Store, WorkerMigration};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row, raw_sql};
use support::postgres::Cluster;

use crate::generate::{Routine, Vocabulary};
use crate::session::Session;
use crate::verdict;

pub struct PreparedServer {
    pub functions: Arc<Functions>,
    pub vocabulary: Vocabulary,
    /// The role of guests' statements.
    pub role: String,
    pub database: String,
}

/// A worker's tables, sequence and functions.
/// Any value can be assigned to `texts`, so a forbidden call is not hidden by an error of types.
const TABLES: &str = "create table t (a integer primary key, b text, c jsonb);
    insert into t values (1, 'x', '{\"y\": 1}');
    create table \"insert\" (into_ integer, \"merge\" text);
    create table texts (a text, b text);
    create sequence number;
    create function own(n integer) returns integer language sql volatile as 'select n + 1';
    create function of_row(r t) returns integer language sql volatile as 'select r.a'";

/// Volatile functions that guests may call, listed independently of the filter.
const ALLOWED: &str = "('random', 'random_normal', 'gen_random_uuid', 'uuidv4', 'uuidv7', 'clock_timestamp', 'timeofday', \
    'nextval', 'currval', 'lastval', 'array_sample', 'array_shuffle', 'bernoulli', 'system', 'gen_random_bytes', 'gen_salt', \
    'pgp_pub_encrypt', 'pgp_pub_encrypt_bytea', 'pgp_sym_encrypt', 'pgp_sym_encrypt_bytea')";

/// Extensions with their schemas; those that the server lacks are skipped.
const EXTENSIONS: [(&str, &str); 7] = [
    ("dblink", "app_default"),
    ("tablefunc", "app_default"),
    ("xml2", "public"),
    ("pg_trgm", "app_default"),
    ("pgcrypto", "public"),
    ("adminpack", "pg_catalog"),
    ("postgres_fdw", "public"),
];

pub async fn prepare(cluster: &Cluster) -> Result<PreparedServer> {
    let database = cluster.create_database().await?;
    let direct = cluster.url(&database);
    let mut around = PgConnection::connect(&direct).await?;
    let platform = format!(
        "create role {database}_platform login createrole password 'secret';
         alter database {database} owner to {database}_platform"
    );
    around.execute(raw_sql(AssertSqlSafe(platform))).await?;
    let store = PostgresStore::connect(
        &direct.replace("postgres@", &format!("{database}_platform:secret@")),
        4,
    )
    .await
    .map(Store::from)?;
    let digest = "a".repeat(64);
    store.put_component(&digest, b"component").await?;
    let migration = WorkerMigration {
        name: "1.sql".to_owned(),
        sql: TABLES.to_owned(),
    };
    store.deploy("fuzz", &digest, "{}", &[migration]).await?;
    for (extension, schema) in EXTENSIONS {
        let create = format!("create extension if not exists {extension} schema {schema}");
        if around.execute(AssertSqlSafe(create)).await.is_err() {
            println!("extension {extension} is not available");
        }
    }
    let Store::Postgres(postgres) = &store else {
        bail!("the store is not on PostgreSQL");
    };
    let functions = postgres.functions().await?;
    let role: String = around
        .fetch_one("select role from oncely.app_login")
        .await?
        .try_get(0)?;
    let vocabulary = vocabulary(&mut around, &database)
        .await
        .context("read the server's functions")?;
    revoke_rights(&mut around, &role, &database)
        .await
        .context("revoke privileges")?;
    store.close().await;
    Ok(PreparedServer {
        functions,
        vocabulary,
        role,
        database,
    })
}

async fn vocabulary(around: &mut PgConnection, database: &str) -> Result<Vocabulary> {
    let query = sqlx::query(
        "select nspname::text, proname::text, array(select format_type(given, null)
                 from unnest(proargtypes) with ordinality as given (given, place) order by place), prokind::text
         from pg_proc join pg_namespace on pg_namespace.oid = pronamespace
         where not proargtypes::oid[] && array['internal'::regtype, 'cstring'::regtype]::oid[] and nspname <> 'oncely'
         order by 1, 2, 3",
    );
    let routine = |row: &sqlx::postgres::PgRow| {
        Ok(Routine {
            schema: row.try_get(0)?,
            name: row.try_get(1)?,
            arguments: row.try_get(2)?,
            kind: row.try_get(3)?,
        })
    };
    let routines = query
        .fetch_all(around)
        .await?
        .iter()
        .map(routine)
        .collect::<sqlx::Result<Vec<_>>>()?;
    let harmful = |routine: &Routine| {
        let name = routine.name.as_str();
        [
            "set_config",
            "ts_stat",
            "ts_rewrite",
            "setval",
            "setseed",
            "dblink",
            "crosstab",
            "xpath_table",
            "set_limit",
        ]
        .contains(&name)
            || [
                "query_to_xml",
                "pg_advisory",
                "pg_sleep",
                "lo_",
                "pg_terminate",
                "pg_notify",
            ]
            .iter()
            .any(|beginning| name.starts_with(beginning))
    };
    let harmful = routines
        .iter()
        .filter(|routine| harmful(routine))
        .cloned()
        .collect();
    Ok(Vocabulary {
        routines,
        harmful,
        database: database.to_owned(),
    })
}

async fn revoke_rights(around: &mut PgConnection, role: &str, database: &str) -> Result<()> {
    // Functions called by syntax keep their privileges: `collation for`.
    let functions = format!(
        "select 'revoke execute on function ' || pg_proc.oid::regprocedure || ' from public, {role}'
         from pg_proc join pg_namespace on pg_namespace.oid = pronamespace
             left join pg_depend on classid = 'pg_proc'::regclass and objid = pg_proc.oid and deptype = 'e'
             left join pg_extension on refobjid = pg_extension.oid
         where prokind in ('f', 'w') and not (nspname = 'app_default' and extname is null) and (
             (provolatile = 'v' and proname not in {ALLOWED})
             or proname ~ '^(ts_rewrite|fmgr_|lo_|(query|cursor|table|schema|database)_to_xml)'
             or (proname ~ '^pg_' and proname not in ('pg_typeof', 'pg_collation_for'))
             or extname in ('dblink', 'tablefunc', 'xml2', 'adminpack', 'postgres_fdw') or nspname = 'oncely_definer')"
    );

    // Catalog names are refused. The server reads its own catalog without privileges.
    let tables = format!(
        "select 'revoke all on ' || pg_class.oid::regclass || ' from public, {role}'
         from pg_class join pg_namespace on pg_namespace.oid = relnamespace
         where nspname = 'pg_catalog' and relkind in ('r', 'v')"
    );
    for query in [functions, tables] {
        for row in around.fetch_all(AssertSqlSafe(query)).await? {
            let revoke: String = row.try_get(0)?;
            around.execute(AssertSqlSafe(revoke)).await?;
        }
    }
    let rest = format!(
        "revoke temporary, create on database {database} from public; revoke create on schema public from public;
         alter role {role} in database {database} set statement_timeout = '2s';
         alter role {role} in database {database} set lock_timeout = '1s';
         alter role {role} in database {database} set search_path = app_default, pg_temp"
    );
    around.execute(raw_sql(AssertSqlSafe(rest))).await?;
    Ok(())
}

/// Checks the oracle itself, with statements that it must report and statements that it must
/// accept.
pub fn check_oracle(socket: &Path, role: &str, database: &str) -> Result<()> {
    let mut session = Session::open(socket, role, database)?;
    let forbidden = [
        "commit",
        "rollback",
        "commit and chain",
        "set role none",
        "",
        "select 1 as a into hidden",
        "select 1 merge into hidden",
        "select set_config('role', 'none', false)",
        "select * from ts_stat('select to_tsvector(''a'')')",
        "select treat(0 as pg_sleep)",
        "select pg_advisory_lock(1)",
        "select * from pg_stat_activity",
        "select * from oncely.inbox",
        "select oncely_definer.guard()",
        "set client_encoding = 'LATIN1'",
        "explain select 1",
        "create table hidden ()",
        "do 'begin end'",
        "declare c cursor for select 1",
    ];
    let permitted = [
        "select 1",
        "select own(a), random(), nextval('number') from t",
        "insert into t values (2)",
        "update t set b = 'y' where a = 1",
        "delete from t",
        "delete from number",
        "merge into t using (select 1 as x) s on a = x when matched then delete",
        "with a as (insert into t values (3) returning a) select * from a",
        "select * from nowhere",
        "select t.of_row from t",
    ];
    for statement in forbidden.iter().chain(&permitted) {
        session.send(statement, 0);
    }
    let answers = session.answers(forbidden.len() + permitted.len())?;
    for (statement, ended) in forbidden.iter().chain(&permitted).zip(&answers) {
        let is_violation = verdict(ended).is_err();
        ensure!(
            is_violation == forbidden.contains(statement),
            "wrong verdict on `{statement}`: {ended:?}"
        );
    }
    Ok(())
}
