//! The server's functions, for the statement filter. They are loaded for the first transaction of a
//! guest and reloaded regularly, because an extension may be installed while the host runs.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;
use tokio::sync::{Mutex, RwLock};
use tokio::time::Instant;

use super::session::{Purpose, Session, Sessions};
use crate::model::sql::{Function, Functions};
use crate::store::Result;
use crate::store::error::Doing as _;

/// How long loaded functions count as fresh.
const REFRESH_AFTER: Duration = Duration::from_secs(30);

/// How long loaded functions stay in use while reloading fails.
const USABLE_FOR: Duration = Duration::from_secs(300);

/// The functions, and when they were loaded.
type CachedFunctions = Option<(Arc<Functions>, Instant)>;

#[derive(Clone)]
pub(super) struct Catalog {
    platform: Sessions,
    cached: Arc<RwLock<CachedFunctions>>,
    /// Held during a reload.
    refreshing: Arc<Mutex<()>>,
}

impl Catalog {
    pub(super) fn new(platform: Sessions) -> Self {
        Catalog {
            platform,
            cached: Arc::default(),
            refreshing: Arc::default(),
        }
    }

    /// The functions as of at most half a minute ago, or slightly longer while they are being
    /// reloaded.
    pub(super) async fn current(&self) -> Result<Arc<Functions>> {
        let cached = self.cached.read().await.clone();
        let Some((functions, read_at)) = cached else {
            return self.load_first().await;
        };
        if read_at.elapsed() < REFRESH_AFTER {
            return Ok(functions);
        }
        let Ok(_refreshing) = self.refreshing.try_lock() else {
            return Ok(functions);
        };
        match self.read().await {
            Err(error) if read_at.elapsed() < USABLE_FOR => {
                tracing::debug!(
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "failed to reload the server's functions, using the previous ones"
                );
                Ok(functions)
            }
            read => read,
        }
    }

    async fn load_first(&self) -> Result<Arc<Functions>> {
        let _refreshing = self.refreshing.lock().await;
        let cached = self.cached.read().await.clone();
        match cached {
            Some((functions, _)) => Ok(functions),
            None => self.read().await,
        }
    }

    async fn read(&self) -> Result<Arc<Functions>> {
        let mut session = self.platform.begin(Purpose::Read).await?;
        let functions = read(&mut session).await;
        let functions = functions.doing("read the server's functions");
        let functions = Arc::new(functions?);
        session.commit().await?;
        *self.cached.write().await = Some((Arc::clone(&functions), Instant::now()));
        Ok(functions)
    }
}

async fn read(session: &mut Session) -> sqlx::Result<Functions> {
    // `takes_one`: PostgreSQL parses `(x).function` as a call, for any type of `x`.
    let query = session.query(
        "select distinct nspname::text as schema, proname::text as name, provolatile = 'v' as is_volatile,
             extname::text as extension, lanname in ('c', 'internal') as is_native,
             pronargs > 0 and pronargs - pronargdefaults <= 1 as takes_one
         from pg_proc join pg_namespace on pg_namespace.oid = pronamespace join pg_language on pg_language.oid = prolang
             left join pg_depend on classid = 'pg_proc'::regclass and objid = pg_proc.oid and deptype = 'e'
                 and refclassid = 'pg_extension'::regclass
             left join pg_extension on pg_extension.oid = refobjid",
    );
    let functions: Vec<Function> = query
        .fetch_all(session.connection())
        .await?
        .iter()
        .map(function)
        .collect::<sqlx::Result<_>>()?;
    let query = session.query(
        "select distinct oprname::text from pg_operator join pg_proc on pg_proc.oid = oprcode
             join pg_language on pg_language.oid = prolang join pg_namespace on pg_namespace.oid = oprnamespace
         where provolatile = 'v' and nspname in ('pg_catalog', 'app_default') and lanname in ('c', 'internal')",
    );
    let operators = query.fetch_all(session.connection()).await?;
    let operators = operators
        .iter()
        .map(|row| row.try_get(0))
        .collect::<sqlx::Result<_>>()?;
    Ok(Functions::new(&functions, operators))
}

fn function(row: &PgRow) -> sqlx::Result<Function> {
    Ok(Function {
        schema: row.try_get("schema")?,
        name: row.try_get("name")?,
        is_volatile: row.try_get("is_volatile")?,
        extension: row.try_get("extension")?,
        is_native: row.try_get("is_native")?,
        takes_one_argument: row.try_get("takes_one")?,
    })
}
