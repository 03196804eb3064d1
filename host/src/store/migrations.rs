//! Migrations of the platform's own schema: the files of `migrations/`, compiled in.

use std::collections::HashMap;

use anyhow::Context as _;
use sha2::{Digest, Sha256};

use super::Result;
use super::db::{Db, Param, Sql, read_row, read_rows};
use super::rows::Columns as _;
use crate::fault;
use crate::model::hint::WithHint;
use crate::model::output_ids::OutputIds;

/// One migration. Migrations run in the order of their list, each once.
#[derive(Debug)]
pub(super) struct Migration {
    /// The file name without `.sql`: version, underscore, name.
    file: &'static str,
    pub sql: &'static str,
}

/// The files of a folder under `migrations/`, in order.
macro_rules! migrations {
    ($folder:literal: $($file:literal),+ $(,)?) => {
        &[$(Migration::new(
            $file,
            include_str!(concat!("../../../migrations/", $folder, "/", $file, ".sql")),
        )),+]
    };
}
impl Migration {
    pub const fn new(file: &'static str, sql: &'static str) -> Self {
        Self { file, sql }
    }

    pub fn version(&self) -> i64 {
        self.file
            .split_once('_')
            .and_then(|(version, _)| version.parse().ok())
            .unwrap_or_default()
    }

    pub fn name(&self) -> &'static str {
        self.file
            .split_once('_')
            .map_or(self.file, |(_, name)| name)
    }

    /// The SHA-256 of the SQL text.
    pub fn checksum(&self) -> Vec<u8> {
        Sha256::digest(self.sql.as_bytes()).to_vec()
    }
}

/// The files of `migrations/postgres`, in order.
pub(super) const POSTGRES: &[Migration] = migrations![
    "postgres":
    "0001_baseline",
];

/// The files of `migrations/sqlite`, in order.
pub(super) const SQLITE: &[Migration] = migrations![
    "sqlite":
    "0001_baseline",
];

/// Runs the migrations that have not run, in one transaction. Hosts that start together wait for
/// each other on a lock of the transaction: a session lock would outlive it behind a pooler.
pub(super) async fn run(mut db: Db) -> anyhow::Result<()> {
    let (migrations, table) = match db {
        Db::Postgres(_) => (POSTGRES, POSTGRES_TABLE),
        Db::Sqlite(_) | Db::SqliteReaders(_) => (SQLITE, SQLITE_TABLE),
    };
    db.run_script(table, "create the table of migrations")
        .await?;
    let applied = applied(&mut db).await?;
    for migration in due(migrations, &applied)? {
        apply(&mut db, migration)
            .await
            .with_context(|| format!("run the migration {}", migration.version()))?;
    }
    fault::point(fault::MIGRATING);
    db.commit().await.context("commit the migrations")
}

/// Checks that this program can use the schema, without changing it.
///
/// # Errors
/// There is no schema yet, a migration is due, or the schema belongs to another version.
pub(super) async fn check(mut db: Db) -> anyhow::Result<()> {
    let migrations = match db {
        Db::Postgres(_) => POSTGRES,
        Db::Sqlite(_) | Db::SqliteReaders(_) => SQLITE,
    };
    let sql = Sql {
        postgres: "select 1::bigint as found from pg_class
         where relname = 'migration' and relnamespace = to_regnamespace('oncely')",
        sqlite: "select 1 as found from sqlite_schema where name = 'oncely_migration'",
        doing: "find the table of migrations",
    };
    if db.fetch_optional(sql, &[]).await?.is_none() {
        return Err(NoSchema.into());
    }
    let applied = applied(&mut db).await?;
    let due = due(migrations, &applied)?;
    db.commit().await?;
    if due.is_empty() {
        return Ok(());
    }
    Err(NoSchema.into())
}

/// The database has no schema of the platform yet, or a migration of it is due. A host runs the
/// migrations when it starts.
#[derive(Debug)]
pub struct NoSchema;

impl std::fmt::Display for NoSchema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the schema is not up to date: no host of this version has started yet")
    }
}

impl std::error::Error for NoSchema {}

const POSTGRES_TABLE: &str = "select pg_advisory_xact_lock(hashtextextended('oncely migrates', 0));
     create schema if not exists oncely;
     create table if not exists oncely.migration (
         version    bigint      constraint migration_pk primary key,
         name       text        not null,
         checksum   bytea       not null,
         applied_at timestamptz not null default now()
     )";

const SQLITE_TABLE: &str = "create table if not exists oncely_migration (
         version    integer constraint migration_pk primary key,
         name       text    not null,
         checksum   blob    not null,
         applied_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
     ) strict";

/// The checksums of the migrations that ran, by version.
async fn applied(db: &mut Db) -> Result<HashMap<i64, Vec<u8>>> {
    let sql = Sql {
        postgres: "select version, checksum from oncely.migration",
        sqlite: "select version, checksum from oncely_migration",
        doing: "read the applied migrations",
    };
    let rows = db.fetch_all(sql, &[]).await?;
    let applied = read_rows(&rows, sql.doing, |row| {
        Ok((row.get("version")?, row.bytes("checksum")?))
    })?;
    Ok(applied.into_iter().collect())
}

async fn apply(db: &mut Db, migration: &Migration) -> Result<()> {
    db.run_script(migration.sql, "run its statements").await?;
    let sql = Sql {
        postgres: "insert into oncely.migration (version, name, checksum) values ($1, $2, $3)",
        sqlite: "insert into oncely_migration (version, name, checksum) values ($1, $2, $3)",
        doing: "record it",
    };
    let checksum = migration.checksum();
    let params = [
        Param::Int(migration.version()),
        Param::Text(migration.name()),
        Param::Bytes(&checksum),
    ];
    db.execute(sql, &params).await.map(drop)
}

/// The generator of this installation's output ids.
pub(super) async fn output_ids(mut db: Db) -> Result<OutputIds> {
    let sql = Sql {
        postgres: "select key from oncely.output_key",
        sqlite: "select key from oncely_output_key",
        doing: "read the key of the output ids",
    };
    let row = db.fetch_one(sql, &[]).await?;
    db.commit().await?;
    read_row(&row, sql.doing, |row| row.bytes("key")).map(|key| OutputIds::new(&key))
}

/// The id of this installation.
pub(super) async fn installation(mut db: Db) -> Result<String> {
    let sql = Sql {
        postgres: "select id from oncely.installation",
        sqlite: "select id from oncely_installation",
        doing: "read the installation's id",
    };
    let row = db.fetch_one(sql, &[]).await?;
    db.commit().await?;
    read_row(&row, sql.doing, |row| row.text("id"))
}

/// The migrations that have not run. `applied` contains the checksums by version.
///
/// # Errors
/// The database was created before the baseline, a migration changed after it ran, or the database
/// has a migration that this program lacks.
pub(super) fn due(
    migrations: &'static [Migration],
    applied: &HashMap<i64, Vec<u8>>,
) -> anyhow::Result<Vec<&'static Migration>> {
    let baseline = migrations.iter().map(Migration::checksum).next();
    if applied
        .get(&1)
        .is_some_and(|applied| Some(applied) != baseline.as_ref())
    {
        return Err(anyhow::anyhow!(
            "the database was created before the baseline schema of this version, and cannot be \
             migrated to it"
        ))
        .hint("name an empty database with --database; the old one stays as it is");
    }
    let newest = migrations
        .iter()
        .map(Migration::version)
        .max()
        .unwrap_or_default();
    if let Some(unknown) = applied.keys().filter(|version| **version > newest).max() {
        return Err(anyhow::anyhow!(
            "the database was made by a newer oncely: its schema is at {unknown}, \
             this program supports it up to {newest}"
        ))
        .hint("run the newer version, or restore a backup from before the upgrade");
    }
    let mut due = Vec::new();
    for migration in migrations {
        match applied.get(&migration.version()) {
            None => due.push(migration),
            Some(checksum) if *checksum == migration.checksum() => {}
            Some(_) => {
                return Err(anyhow::anyhow!(
                    "the migration {} differs from the one that created this database",
                    migration.file
                ))
                .hint("run the oncely that created the database, or a release after it");
            }
        }
    }
    Ok(due)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_migrations_is_listed_in_order() {
        for (folder, listed) in [("postgres", POSTGRES), ("sqlite", SQLITE)] {
            let path = format!("{}/../migrations/{folder}", env!("CARGO_MANIFEST_DIR"));
            let mut files: Vec<String> = std::fs::read_dir(path)
                .unwrap()
                .map(|file| file.unwrap().file_name().into_string().unwrap())
                .collect();
            files.sort();
            let listed: Vec<String> = listed
                .iter()
                .map(|migration| format!("{}.sql", migration.file))
                .collect();
            assert_eq!(listed, files, "migrations/{folder}");
        }
    }

    #[test]
    fn versions_are_numbers_that_grow() {
        for listed in [POSTGRES, SQLITE] {
            let versions: Vec<i64> = listed.iter().map(Migration::version).collect();
            assert!(
                versions.is_sorted_by(|a, b| a < b) && versions.iter().all(|version| *version > 0),
                "{versions:?}"
            );
        }
    }

    static TWO: &[Migration] = &[
        Migration::new("0001_baseline", "select 1"),
        Migration::new("0002_second", "select 2"),
    ];

    #[test]
    fn due_migrations_are_those_that_have_not_run() {
        let versions = |applied| -> Vec<i64> {
            let due = due(TWO, &applied).unwrap();
            due.into_iter().map(Migration::version).collect()
        };
        assert_eq!(versions(HashMap::new()), [1, 2]);
        assert_eq!(versions(HashMap::from([(1, TWO[0].checksum())])), [2]);
    }

    #[test]
    fn a_migration_that_changed_since_it_ran_is_refused() {
        let applied = HashMap::from([(1, TWO[0].checksum()), (2, vec![1])]);
        let error = due(TWO, &applied).unwrap_err().to_string();
        assert!(error.contains("0002_second"), "{error}");
    }

    #[test]
    fn a_database_from_before_the_baseline_is_refused() {
        let applied = HashMap::from([(1, vec![1]), (19, vec![2])]);
        let error = due(TWO, &applied).unwrap_err().to_string();
        assert!(error.contains("before the baseline"), "{error}");
    }
}
