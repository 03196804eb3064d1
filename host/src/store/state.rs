//! Keyed state of workers, for display. Transactions read and write it by `postgres/state.rs` and
//! `sqlite/state.rs`.

use super::db::{Db, Param, Sql};
use super::{Result, STATE_PREVIEW, StateRecord, rows};

/// The complete value under a key.
pub(super) async fn entry(db: &mut Db, worker: &str, key: &str) -> Result<Option<StateRecord>> {
    let sql = Sql {
        postgres: "select key, version, octet_length(value)::bigint as size, value,
             (extract(epoch from updated_at) * 1000000)::bigint as updated_at
         from oncely.state where worker = $1 and key = $2 and value is not null",
        sqlite: "select key, version, length(value) as size, updated_at, value from oncely_state
         where worker = $1 and key = $2 and value is not null",
        doing: "read state",
    };
    let params = [Param::Text(worker), Param::Text(key)];
    let row = db.fetch_optional(sql, &params).await?;
    row.as_ref().map(rows::state).transpose()
}

/// Values of keys that begin with `prefix`, sorted by key and truncated to [`STATE_PREVIEW`] bytes.
pub(super) async fn entries(
    db: &mut Db,
    worker: &str,
    prefix: &str,
    limit: u32,
) -> Result<Vec<StateRecord>> {
    let sql = Sql {
        postgres: "select key, version, octet_length(value)::bigint as size,
             substring(value from 1 for $4::integer) as value,
             (extract(epoch from updated_at) * 1000000)::bigint as updated_at
         from oncely.state where worker = $1 and pg_catalog.starts_with(key, $2) and value is not null
         order by key collate pg_catalog.\"C\" limit $3",
        sqlite: "select key, version, length(value) as size, updated_at, substr(value, 1, $4) as value from oncely_state
         where worker = $1 and substr(key, 1, length($2)) = $2 and value is not null order by key limit $3",
        doing: "list state",
    };
    let params = [
        Param::Text(worker),
        Param::Text(prefix),
        Param::Int(limit.into()),
        Param::Int(STATE_PREVIEW.into()),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    Ok(rows::list(&rows, rows::state))
}
