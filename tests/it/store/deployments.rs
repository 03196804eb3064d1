//! Deployments are immutable, and workers' migrations run once.

use oncely::store::{PostgresStore, SqliteStore, Store, StoreError, WorkerMigration};

use super::{WORKER, World, text};

on_every_database!(
    components_are_stored_once,
    each_deployment_is_the_next_version_and_active,
    an_earlier_deployment_can_be_activated_again,
    concurrent_deployments_get_distinct_versions,
    migrations_run_once_in_the_order_of_their_names,
    a_changed_migration_is_refused,
    a_migration_that_fails_is_named_and_leaves_nothing,
    a_migration_that_ends_its_transaction_is_refused,
    an_unknown_component_cannot_be_deployed,
);

fn digest(character: char) -> String {
    character.to_string().repeat(64)
}

fn migration(name: &str, sql: &str) -> WorkerMigration {
    WorkerMigration {
        name: name.to_owned(),
        sql: sql.to_owned(),
    }
}

/// Deploys with these migrations and returns the error chain of the refusal.
async fn refusal(world: &World, migrations: &[WorkerMigration]) -> String {
    match world
        .store
        .deploy(WORKER, &digest('a'), "{}", migrations)
        .await
    {
        Err(StoreError::Refused(cause)) => format!("{cause:#}"),
        other => panic!("not refused: {other:?}"),
    }
}

async fn components_are_stored_once(world: World) {
    assert_eq!(world.store.component(&digest('a')).await.unwrap(), None);
    world
        .store
        .put_component(&digest('a'), b"\x00asm")
        .await
        .unwrap();
    world
        .store
        .put_component(&digest('a'), b"\x00asm")
        .await
        .unwrap();
    assert_eq!(
        world
            .store
            .component(&digest('a'))
            .await
            .unwrap()
            .as_deref(),
        Some(&b"\x00asm"[..])
    );
}

async fn each_deployment_is_the_next_version_and_active(world: World) {
    world.store.put_component(&digest('a'), b"a").await.unwrap();
    world.store.put_component(&digest('b'), b"b").await.unwrap();
    let first = world
        .store
        .deploy(WORKER, &digest('a'), "{\"a\":1}", &[])
        .await
        .unwrap();
    let second = world
        .store
        .deploy(WORKER, &digest('b'), "{}", &[])
        .await
        .unwrap();
    let other = world
        .store
        .deploy("another", &digest('b'), "{}", &[])
        .await
        .unwrap();
    assert_eq!((first.version, second.version, other.version), (1, 2, 1));
    assert_eq!(
        (first.digest.as_str(), first.manifest.as_str()),
        (digest('a').as_str(), "{\"a\":1}")
    );
    assert_eq!(
        world.store.active_deployments().await.unwrap(),
        [other, second.clone()]
    );
    assert_eq!(
        world.store.deployments(WORKER).await.unwrap(),
        [second, first]
    );
}

async fn an_earlier_deployment_can_be_activated_again(world: World) {
    world.store.put_component(&digest('a'), b"a").await.unwrap();
    let first = world
        .store
        .deploy(WORKER, &digest('a'), "{}", &[])
        .await
        .unwrap();
    world
        .store
        .deploy(WORKER, &digest('a'), "{}", &[])
        .await
        .unwrap();
    assert_eq!(
        world.store.activate(WORKER, 1).await.unwrap(),
        Some(first.clone())
    );
    assert_eq!(world.store.active_deployments().await.unwrap(), [first]);
    assert_eq!(world.store.activate(WORKER, 3).await.unwrap(), None);
    assert_eq!(
        world
            .store
            .deploy(WORKER, &digest('a'), "{}", &[])
            .await
            .unwrap()
            .version,
        3
    );
}

async fn concurrent_deployments_get_distinct_versions(world: World) {
    world.store.put_component(&digest('a'), b"a").await.unwrap();
    let deploying: Vec<_> = (0..6)
        .map(|_| {
            let store = std::sync::Arc::clone(&world.store);
            let migrations = [migration("1.sql", "create table t (a text)")];
            tokio::spawn(async move {
                store
                    .deploy(WORKER, &digest('a'), "{}", &migrations)
                    .await
                    .unwrap()
                    .version
            })
        })
        .collect();
    let mut versions = Vec::new();
    for version in deploying {
        versions.push(version.await.unwrap());
    }
    versions.sort_unstable();
    assert_eq!(versions, [1, 2, 3, 4, 5, 6]);
}

async fn migrations_run_once_in_the_order_of_their_names(world: World) {
    world.store.put_component(&digest('a'), b"a").await.unwrap();
    let mut migrations = vec![
        migration("2.sql", "insert into t values ('two')"),
        migration("1.sql", "create table t (a text);"),
    ];
    world
        .store
        .deploy(WORKER, &digest('a'), "{}", &migrations)
        .await
        .unwrap();
    migrations.push(migration(
        "3.sql",
        "-- a comment; only\ninsert into t values ('three');\ninsert into t values (';')",
    ));
    world
        .store
        .deploy(WORKER, &digest('a'), "{}", &migrations)
        .await
        .unwrap();
    world
        .store
        .deploy(WORKER, &digest('a'), "{}", &migrations)
        .await
        .unwrap();
    let rows = world.rows("select a from t order by a desc").await;
    assert_eq!(rows, [[text("two")], [text("three")], [text(";")]]);
}

async fn a_changed_migration_is_refused(world: World) {
    world.migrate("1.sql", "create table t (a text)").await;
    let why = refusal(&world, &[migration("1.sql", "create table t (b text)")]).await;
    assert!(
        why.contains("1.sql") && why.contains("changed since it ran"),
        "{why}"
    );
    assert_eq!(world.store.deployments(WORKER).await.unwrap().len(), 1);
}

async fn a_migration_that_fails_is_named_and_leaves_nothing(world: World) {
    world.store.put_component(&digest('a'), b"a").await.unwrap();
    let why = refusal(
        &world,
        &[
            migration("1.sql", "create table t (a text)"),
            migration("2.sql", "create tabel u"),
        ],
    )
    .await;
    assert!(why.contains("2.sql") && why.contains("tabel"), "{why}");
    assert!(world.store.deployments(WORKER).await.unwrap().is_empty());
    world.migrate("1.sql", "create table t (a text)").await;
}

async fn a_migration_that_ends_its_transaction_is_refused(world: World) {
    world.store.put_component(&digest('a'), b"a").await.unwrap();
    for end in ["commit", "rollback", "commit; begin"] {
        let why = refusal(
            &world,
            &[migration(
                "1.sql",
                &format!("create table t (a text); {end}"),
            )],
        )
        .await;
        assert!(why.contains("1.sql"), "{why}");
        assert!(world.store.deployments(WORKER).await.unwrap().is_empty());
        if world.is_postgres() {
            world
                .run_directly("drop table if exists app_default.t")
                .await;
        }
    }
    world.migrate("1.sql", "create table t (a text)").await;
}

async fn an_unknown_component_cannot_be_deployed(world: World) {
    let why = refusal(&world, &[]).await;
    assert!(why.contains("there is no component"), "{why}");
}

#[tokio::test]
async fn hosts_that_start_concurrently_migrate_the_schema_once() {
    let database = support::postgres::shared().create_database().await.unwrap();
    for url in [
        support::postgres::shared().url(&database),
        support::pgbouncer::shared().url(&database),
    ] {
        let starting: Vec<_> = (0..5)
            .map(|_| {
                let url = url.clone();
                tokio::spawn(async move { PostgresStore::connect(&url, 2).await.map(Store::from) })
            })
            .collect();
        for store in starting {
            store.await.unwrap().unwrap().ping().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_database_from_before_the_baseline_is_refused() {
    let world = World::postgres().await;
    world
        .run_directly("update oncely.migration set checksum = '\\x00'")
        .await;
    let error = PostgresStore::connect(world.url.as_deref().unwrap(), 2)
        .await
        .err()
        .unwrap();
    assert!(
        format!("{error:#}").contains("created before the baseline schema"),
        "{error:#}"
    );
}

#[tokio::test]
async fn a_sqlite_file_is_reopened_with_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("oncely.db");
    let store = SqliteStore::open(&path).await.map(Store::from).unwrap();
    store.put_component(&digest('a'), b"a").await.unwrap();
    store.close().await;
    let store = SqliteStore::open(&path).await.map(Store::from).unwrap();
    assert_eq!(
        store.component(&digest('a')).await.unwrap().as_deref(),
        Some(&b"a"[..])
    );
}
