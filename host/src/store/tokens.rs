//! Named tokens of the control API, stored as their SHA-256.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::db::{Db, Param, Row, Sql};
use super::rows::Columns as _;
use super::{Result, Store, StoreError, shared};
use crate::model::role::Role;
use crate::model::schema::Time;

/// A named token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenRecord {
    /// Unique, also among tokens of the same name.
    pub id: i64,
    /// Stands for one token at a time.
    pub name: String,
    /// Its rights.
    pub role: Role,
    /// The name of the token that created it.
    pub created_by: String,
    /// When it was created.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// It is refused from then on; `None` for never.
    #[schemars(with = "Option<Time>")]
    pub expires_at: Option<Timestamp>,
    /// The name of the token that revoked it.
    pub revoked_by: Option<String>,
    /// When it was revoked.
    #[schemars(with = "Option<Time>")]
    pub revoked_at: Option<Timestamp>,
}

/// A token that is neither revoked nor expired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveToken {
    /// SHA-256 of the secret.
    pub sha256: Vec<u8>,
    /// Everything else.
    pub token: TokenRecord,
}

impl Store {
    /// Stores a token. It expires after `lifetime`, by the clock of the database.
    ///
    /// # Errors
    /// `Refused` if an unrevoked token has this name.
    pub async fn create_token(
        &self,
        name: &str,
        role: Role,
        sha256: [u8; 32],
        lifetime: Option<Duration>,
        created_by: &str,
    ) -> Result<TokenRecord> {
        let mut db = self.write().await?;
        let token = create(&mut db, name, role, sha256, lifetime, created_by).await?;
        db.commit().await?;
        Ok(token)
    }

    /// All tokens, newest first.
    pub async fn tokens(&self) -> Result<Vec<TokenRecord>> {
        let mut db = self.read().await?;
        let rows = db.fetch_all(LIST, &[]).await?;
        db.commit().await?;
        rows.iter().map(read).collect()
    }

    /// The tokens that are neither revoked nor expired.
    pub async fn active_tokens(&self) -> Result<Vec<ActiveToken>> {
        let mut db = self.read().await?;
        let rows = db.fetch_all(ACTIVE, &[]).await?;
        db.commit().await?;
        let active = |row: &Row| {
            let sha256 = row.bytes("sha256").context("read a token");
            Ok(ActiveToken {
                sha256: sha256.map_err(StoreError::Unavailable)?,
                token: read(row)?,
            })
        };
        rows.iter().map(active).collect()
    }

    /// Revokes the token of this name. `None` if there is none.
    pub async fn revoke_token(&self, name: &str, revoked_by: &str) -> Result<Option<TokenRecord>> {
        let mut db = self.write().await?;
        let params = [Param::Text(name), Param::Text(revoked_by)];
        let row = db.fetch_optional(REVOKE, &params).await?;
        db.commit().await?;
        row.as_ref().map(read).transpose()
    }
}

async fn create(
    db: &mut Db,
    name: &str,
    role: Role,
    sha256: [u8; 32],
    lifetime: Option<Duration>,
    created_by: &str,
) -> Result<TokenRecord> {
    let params = [
        Param::Text(name),
        Param::Bytes(&sha256),
        Param::Text(role.as_str()),
        Param::Text(created_by),
        Param::OptionalInt(lifetime.map(shared::micros)),
    ];
    let row = db.fetch_optional(CREATE, &params).await?;
    let row =
        row.ok_or_else(|| StoreError::Refused(anyhow!("there is a token named `{name}` already")))?;
    read(&row)
}

const CREATE: Sql = Sql {
    postgres: "insert into oncely.access_token (name, sha256, role, created_by, expires_at)
         values ($1, $2, $3, $4, pg_catalog.now() + $5 * interval '1 microsecond')
         on conflict (name) where revoked_at is null do nothing
         returning id, name, role, created_by, revoked_by,
             (extract(epoch from created_at) * 1000000)::bigint as created_at,
             (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
             (extract(epoch from revoked_at) * 1000000)::bigint as revoked_at",
    sqlite: "insert into oncely_access_token (name, sha256, role, created_by, expires_at)
         values ($1, $2, $3, $4, cast(unixepoch('subsec') * 1000000 as integer) + $5)
         on conflict (name) where revoked_at is null do nothing
         returning id, name, role, created_by, revoked_by, created_at, expires_at, revoked_at",
    doing: "create a token",
};

const LIST: Sql = Sql {
    postgres: "select id, name, role, created_by, revoked_by,
             (extract(epoch from created_at) * 1000000)::bigint as created_at,
             (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
             (extract(epoch from revoked_at) * 1000000)::bigint as revoked_at
         from oncely.access_token order by id desc",
    sqlite: "select id, name, role, created_by, revoked_by, created_at, expires_at, revoked_at
         from oncely_access_token order by id desc",
    doing: "read the tokens",
};

const ACTIVE: Sql = Sql {
    postgres: "select id, name, role, created_by, revoked_by, sha256,
             (extract(epoch from created_at) * 1000000)::bigint as created_at,
             (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
             (extract(epoch from revoked_at) * 1000000)::bigint as revoked_at
         from oncely.access_token
         where revoked_at is null and (expires_at is null or expires_at > pg_catalog.now())",
    sqlite: "select id, name, role, created_by, revoked_by, sha256, created_at, expires_at, revoked_at
         from oncely_access_token where revoked_at is null
             and (expires_at is null or expires_at > cast(unixepoch('subsec') * 1000000 as integer))",
    doing: "read the active tokens",
};

const REVOKE: Sql = Sql {
    postgres: "update oncely.access_token set revoked_at = pg_catalog.now(), revoked_by = $2
         where name = $1 and revoked_at is null
         returning id, name, role, created_by, revoked_by,
             (extract(epoch from created_at) * 1000000)::bigint as created_at,
             (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
             (extract(epoch from revoked_at) * 1000000)::bigint as revoked_at",
    sqlite: "update oncely_access_token
         set revoked_at = cast(unixepoch('subsec') * 1000000 as integer), revoked_by = $2
         where name = $1 and revoked_at is null
         returning id, name, role, created_by, revoked_by, created_at, expires_at, revoked_at",
    doing: "revoke a token",
};

fn read(row: &Row) -> Result<TokenRecord> {
    let read = || -> anyhow::Result<TokenRecord> {
        let role = row.text("role")?;
        Ok(TokenRecord {
            id: row.get("id")?,
            name: row.text("name")?,
            role: Role::parse(&role).with_context(|| format!("`{role}` is not a role"))?,
            created_by: row.text("created_by")?,
            created_at: row.time("created_at")?,
            expires_at: row.optional_time("expires_at")?,
            revoked_by: row.get("revoked_by")?,
            revoked_at: row.optional_time("revoked_at")?,
        })
    };
    read()
        .context("read a token")
        .map_err(StoreError::Unavailable)
}
