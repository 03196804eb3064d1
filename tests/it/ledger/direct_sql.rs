//! The ledger's database refuses invalid changes from any client.

use sqlx::Connection;

use super::*;

/// A journal with transactions t1 to t3, and for alice an open hold h1 and a captured one.
async fn start_used(kind: Kind) -> Result<World> {
    let world = start_with(kind, &["alice", "bob"]).await?;
    open(&world, json!({ "id": "usd", "currency": "USD" })).await?;
    let hold = post(&world, "hold", "/holds", &order("alice", "bob", 100), None)
        .await?
        .is(201)?;
    post(
        &world,
        "open-hold",
        "/holds",
        &order("alice", "bob", 50),
        None,
    )
    .await?
    .is(201)?;
    let path = format!(
        "/holds/{}/capture",
        hold["id"].as_str().context("read the id")?
    );
    post(&world, "capture", &path, &json!({}), None)
        .await?
        .is(201)?;
    Ok(world)
}

/// Statements that change, delete or unbalance.
const REFUSED: &[&str] = &[
    "update app.journal set amount = amount + 1",
    "update app.journal set note = 'nothing to see'",
    "delete from app.journal",
    "update app.entry set amount = 0",
    "update app.entry set balance = balance + 1",
    "delete from app.entry",
    "delete from app.account",
    "delete from app.hold",
    // One-sided, doubled and invented entries.
    "insert into app.entry select account, version + 100, transaction_id, amount, balance + amount from app.entry",
    "insert into app.entry select 'usd', 1, transaction_id, amount, amount from app.entry where amount > 0",
    "insert into app.entry values ('alice', 99, 'none', 5, 5)",
    // Balances and holds without a matching entry.
    "update app.account set balance = balance + 1 where id = 'alice'",
    "update app.account set balance = 900, version = 2 where id = 'alice'",
    "update app.account set held = 0 where id = 'alice'",
    "update app.account set currency = 'USD' where id = 'alice'",
    "update app.account set version = version - 1 where id = 'alice'",
    "insert into app.account (id, currency, balance) values ('rich', 'EUR', 5)",
    "update app.hold set amount = 1 where state = 'open'",
    "update app.hold set state = 'captured' where state = 'open'",
    "update app.hold set state = 'open' where state = 'captured'",
    "insert into app.hold (id, debit, credit, currency, amount) values ('h', 'alice', 'bob', 'EUR', 5000)",
    "insert into app.hold (id, debit, credit, currency, amount) values ('h', 'alice', 'usd', 'EUR', 1)",
    // Invalid transactions.
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'usd', 'bob', 'EUR', 1)",
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'usd', 'bob', 'USD', 1)",
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'absent', 'bob', 'EUR', 1)",
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'bob', 'EUR', 1)",
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'alice', 'EUR', -1)",
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'alice', 'EUR', 0)",
    "insert into app.journal (id, kind, debit, credit, currency, amount, reverses)
     select 'x', 'reversal', credit, debit, currency, amount - 1, id from app.journal where kind = 'capture'",
    "insert into app.journal (id, kind, debit, credit, currency, amount, hold)
     select 'x', 'capture', debit, credit, currency, amount, hold from app.journal where kind = 'capture'",
    // Without taking a version, and beyond the payer's balance.
    "insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'alice', 'EUR', 1)",
    "update app.account set version = version + 1;
     insert into app.journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'alice', 'EUR', 5000)",
];

/// Statements that only SQLite would accept without an explicit check.
const REFUSED_BY_SQLITE: &[&str] = &[
    "insert or replace into journal select * from journal",
    "insert or replace into entry select * from entry",
    "insert or replace into entry select account, version, transaction_id, 0, 0 from entry",
    "insert or replace into account (id, currency) values ('alice', 'EUR')",
    "insert or replace into hold select * from hold where state = 'open'",
    "update or replace account set id = 'bob' where id = 'alice'",
    "insert or ignore into hold (id, debit, credit, currency, amount) values ('h', 'alice', 'bob', 'EUR', 5000)",
    "insert or fail into hold (id, debit, credit, currency, amount) values ('h', 'alice', 'bob', 'EUR', 5000)",
    "insert or ignore into journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'alice', 'EUR', 5000)",
    "insert or fail into journal (id, kind, debit, credit, currency, amount) values ('x', 'transfer', 'bob', 'alice', 'EUR', 5000)",
];

/// Runs a statement like a user's shell, without foreign key checks, and returns its error code.
/// Every rule of the ledger is a constraint.
async fn refusal(database: &Database, statement: &str) -> Result<Option<String>> {
    let result = match database {
        Database::Postgres { .. } => database.execute(statement).await,
        Database::Sqlite(path) => {
            let options = sqlx::sqlite::SqliteConnectOptions::new()
                .filename(path)
                .foreign_keys(false);
            let mut shell = sqlx::SqliteConnection::connect_with(&options).await?;
            // The shell continues after an error and commits.
            let script = format!("begin immediate; {}", statement.replace("app.", ""));
            let result = sqlx::raw_sql(sqlx::AssertSqlSafe(script))
                .execute(&mut shell)
                .await;
            sqlx::raw_sql("commit").execute(&mut shell).await?;
            result.map(|_| ()).map_err(anyhow::Error::new)
        }
    };
    let Err(error) = result else { return Ok(None) };
    let code = error
        .downcast_ref::<sqlx::Error>()
        .and_then(|error| error.as_database_error()?.code());
    Ok(Some(
        code.with_context(|| format!("{statement}: {error:#}"))?
            .into_owned(),
    ))
}

async fn check_refused(database: &Database, statement: &str) -> Result<()> {
    let code = refusal(database, statement)
        .await?
        .with_context(|| format!("not refused: {statement}"))?;
    let is_a_rule = match database {
        Database::Postgres { .. } => code.starts_with("23"),
        Database::Sqlite(_) => code.parse::<i32>()? & 0xff == 19,
    };
    ensure!(is_a_rule, "{statement} is refused with {code}");
    Ok(())
}

/// All rows of the ledger.
async fn everything(database: &Database) -> Result<Vec<Vec<Vec<String>>>> {
    let mut all = Vec::new();
    for query in [
        "select id, balance, held, currency from app.account order by id",
        "select id, kind, debit, credit, amount, note, hold, reverses from app.journal order by id",
        "select account, version, transaction_id, amount, balance from app.entry order by account, version",
        "select id, state, amount from app.hold order by id",
    ] {
        all.push(database.rows(query).await?);
    }
    Ok(all)
}

both!(
    direct_sql_cannot_change_delete_or_unbalance_anything,
    |kind: Kind| async move {
        let world = start_used(kind).await?;
        let before = everything(&world.database).await?;
        let of_sqlite = if kind == Kind::Sqlite {
            REFUSED_BY_SQLITE
        } else {
            &[]
        };
        for statement in REFUSED.iter().chain(of_sqlite) {
            check_refused(&world.database, statement).await?;
            ensure!(
                everything(&world.database).await? == before,
                "{statement} left a change"
            );
        }

        // The refusal must not come from the missing version alone.
        for statement in of_sqlite {
            world
                .database
                .execute("update app.account set version = version + 1")
                .await?;
            check_refused(&world.database, statement).await?;
            ensure!(
                everything(&world.database).await? == before,
                "{statement} left a change"
            );
        }
        check_books(&world.database).await
    }
);

both!(
    direct_sql_that_keeps_the_rules_keeps_the_books,
    |kind: Kind| async move {
        let world = start_used(kind).await?;
        world
            .database
            .execute(
                "update app.account set version = version + 1 where id in ('alice', 'bob');
             insert into app.journal (id, kind, debit, credit, currency, amount)
             values ('by-hand', 'transfer', 'bob', 'alice', 'EUR', 1)",
            )
            .await?;
        assert_eq!(balance(&world, "bob").await?, 1099);
        check_books(&world.database).await
    }
);

/// The role of guests' SQL, and the owner of the tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn app_roles_cannot_bypass_the_journal_on_postgres() -> Result<()> {
    let world = start_used(Kind::Postgres).await?;
    let before = everything(&world.database).await?;
    let login = world
        .database
        .rows("select role from oncely.app_login")
        .await?
        .concat()
        .concat();
    let owner = login.replace("oncely_app_", "oncely_owner_");
    let truncates = [
        "truncate app.journal cascade",
        "truncate app.entry",
        "truncate app.account cascade",
    ];
    for statement in truncates.iter().chain(REFUSED) {
        check_refused(
            &world.database,
            &format!("set role \"{owner}\"; {statement}"),
        )
        .await?;
    }
    for statement in REFUSED {
        check_refused(
            &world.database,
            &format!("set role \"{login}\"; {statement}"),
        )
        .await?;
    }
    for statement in truncates.iter().chain(&[
        "alter table app.journal disable trigger all",
        "drop table app.entry",
    ]) {
        let code = refusal(
            &world.database,
            &format!("set role \"{login}\"; {statement}"),
        )
        .await?;
        assert_eq!(code.as_deref(), Some("42501"), "{statement}");
    }
    ensure!(
        everything(&world.database).await? == before,
        "a change was left"
    );
    Ok(())
}

/// Another transaction changes the payer between the guest's read and its change; the guest reads
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_with_a_stale_version_retries_on_postgres() -> Result<()> {
    let world = start_with(Kind::Postgres, &["alice", "bob"]).await?;
    let Database::Postgres { direct, .. } = &world.database else {
        anyhow::bail!("not PostgreSQL")
    };
    let mut rival = sqlx::PgConnection::connect(direct).await?;
    let spend =
        "begin; update app_default.account set version = version + 1 where id in ('alice', 'bob');
        insert into app_default.journal (id, kind, debit, credit, currency, amount)
        values ('rival', 'transfer', 'alice', 'bob', 'EUR', 950)";
    sqlx::raw_sql(spend).execute(&mut rival).await?;
    let requests = async {
        let enough = transfer(&world, "enough", "alice", "bob", 50);
        let too_much = transfer(&world, "too-much", "alice", "bob", 51);
        tokio::try_join!(enough, too_much)
    };
    let commits = async {
        world
            .until(
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()",
                2,
            )
            .await?;
        sqlx::raw_sql("commit").execute(&mut rival).await?;
        anyhow::Ok(())
    };
    let ((enough, too_much), ()) = tokio::try_join!(requests, commits)?;
    enough.is(201)?;
    assert_eq!(too_much.problem(), (422, "insufficient-funds"));
    assert_eq!(balance(&world, "alice").await?, 0);
    ensure!(
        world.host_log().contains("changed concurrently, retrying"),
        "the guest did not see the conflict:\n{}",
        world.host_log()
    );
    check_books(&world.database).await
}
