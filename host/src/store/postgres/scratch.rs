//! A database for tests that is created and dropped with them.

use std::str::FromStr as _;

use anyhow::Context as _;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _, raw_sql};

use super::privileges;
use crate::model::hint::WithHint as _;

/// A new database on a server, with the roles that belong to it.
pub struct ScratchDatabase {
    server: PgConnectOptions,
    name: String,
}

impl ScratchDatabase {
    /// Creates a database on the server of `url`. The database of the URL is not changed.
    ///
    /// # Errors
    /// The server is unreachable, or refuses to create databases.
    pub async fn create(url: &str) -> anyhow::Result<ScratchDatabase> {
        let server = PgConnectOptions::from_str(url).context("parse the URL of the database")?;
        let scratch = ScratchDatabase {
            server,
            name: format!("oncely_test_{:016x}", rand::random::<u64>()),
        };
        let create = format!("create database {}", scratch.name);
        scratch
            .run(&create)
            .await
            .context("create a database for the tests")
            .hint(
                "use a database user with the right to create databases: alter role … createdb",
            )?;
        Ok(scratch)
    }

    /// The URL of the database.
    pub fn url(&self) -> String {
        let options = self.server.clone().database(&self.name);
        options.to_url_lossy().to_string()
    }

    /// Drops the database and its roles.
    ///
    /// # Errors
    /// The server is unreachable.
    pub async fn drop(self) -> anyhow::Result<()> {
        let name = &self.name;
        self.run(&format!("drop database if exists {name} with (force)"))
            .await
            .context("drop the database of the tests")?;
        for role in privileges::roles_of(name) {
            self.run(&format!("drop role if exists \"{role}\""))
                .await
                .context("drop the roles of the tests")?;
        }
        Ok(())
    }

    async fn run(&self, statement: &str) -> anyhow::Result<()> {
        let mut connection = self.server.connect().await.context("connect")?;
        connection
            .execute(raw_sql(AssertSqlSafe(statement.to_owned())))
            .await?;
        connection.close().await?;
        Ok(())
    }
}
