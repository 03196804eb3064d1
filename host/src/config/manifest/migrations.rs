//! A worker's own migrations: a folder of `*.sql` files, or one subfolder for each database.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::manifest::WorkerEntry;
use crate::model::hint::WithHint;
use crate::model::sql::Dialect;

/// A migration of a worker's own tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerMigration {
    /// The file name; migrations run in the order of their names.
    pub name: String,
    /// The content of the file: one or more statements.
    pub sql: String,
}

impl WorkerEntry {
    /// Checks that the migrations are readable for each database that the folder supports.
    pub fn check_migrations(&self) -> anyhow::Result<()> {
        let Some(folder) = &self.migrations else {
            return Ok(());
        };
        let has_own = |dialect: &Dialect| own_folder(folder, *dialect).is_dir();
        let dialects = [Dialect::Sqlite, Dialect::Postgres];
        let is_for_both = !dialects.iter().any(has_own);
        for dialect in dialects
            .into_iter()
            .filter(|dialect| is_for_both || has_own(dialect))
        {
            self.migrations_for(dialect)?;
        }
        Ok(())
    }

    /// Reads the migrations for a database, in order. They are the `*.sql` files of its subfolder
    /// (`sqlite`, `postgres`), or of the folder itself if they are for both.
    pub fn migrations_for(&self, dialect: Dialect) -> anyhow::Result<Vec<WorkerMigration>> {
        let Some(folder) = &self.migrations else {
            return Ok(Vec::new());
        };
        let worker = &self.worker.name;
        if !folder.is_dir() {
            return Err(anyhow!(
                "the migrations folder of worker `{worker}`, {}, does not exist",
                folder.display()
            )
            .hint(format!("create it: mkdir -p {}", folder.display())));
        }
        let mut files = sql_files(&folder_for(folder, dialect)?)?;
        files.sort();
        files.iter().map(|file| read(file)).collect()
    }
}

fn folder_for(folder: &Path, dialect: Dialect) -> anyhow::Result<PathBuf> {
    let by_database = [Dialect::Sqlite, Dialect::Postgres]
        .iter()
        .any(|dialect| own_folder(folder, *dialect).is_dir());
    if !by_database {
        return Ok(folder.to_owned());
    }
    if !sql_files(folder)?.is_empty() {
        return Err(anyhow!(
            "{} contains both *.sql files and a subfolder for one database",
            folder.display()
        )
        .hint("move them into `sqlite/` and `postgres/`"));
    }
    let own = own_folder(folder, dialect);
    if !own.is_dir() {
        return Err(anyhow!(
            "there are no migrations for this database at {}",
            own.display()
        )
        .hint(format!(
            "write them, or create an empty folder if none are needed: mkdir {}",
            own.display()
        )));
    }
    Ok(own)
}

/// The subfolder of migrations for one database.
fn own_folder(folder: &Path, dialect: Dialect) -> PathBuf {
    folder.join(match dialect {
        Dialect::Sqlite => "sqlite",
        Dialect::Postgres => "postgres",
    })
}

fn sql_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("list the migrations in {}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.is_file() && path.extension().is_some_and(|extension| extension == "sql") {
            files.push(path);
        }
    }
    Ok(files)
}

fn read(file: &Path) -> anyhow::Result<WorkerMigration> {
    let sql = std::fs::read_to_string(file)
        .with_context(|| format!("read the migration {}", file.display()))?;
    let name = file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // Some editors write a byte order mark, which is not SQL.
    let sql = sql.strip_prefix('\u{feff}').unwrap_or(&sql).to_owned();
    Ok(WorkerMigration { name, sql })
}
