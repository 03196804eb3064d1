//! Searches in the inbox. Transactions claim event ids by `postgres/inbox.rs` and
//! `sqlite/inbox.rs`.

use super::Result;
use super::db::{Db, Param, Sql, read_rows};
use super::rows::Columns as _;

/// The events among these that are done.
pub(super) async fn done(db: &mut Db, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
    let sql = Sql {
        postgres: "select event_id from oncely.inbox where worker = $1 and event_id = any($2) and state = 'done'",
        sqlite: "select inbox.event_id from json_each($2) as given
             cross join oncely_inbox as inbox on inbox.worker = $1 and inbox.event_id = given.value
         where inbox.state = 'done'",
        doing: "find done events",
    };
    let params = [Param::Text(worker), Param::Texts(event_ids)];
    let rows = db.fetch_all(sql, &params).await?;
    read_rows(&rows, sql.doing, |row| row.text("event_id"))
}

/// The events among these that are in the worker's inbox.
pub(super) async fn known(db: &mut Db, worker: &str, event_ids: &[&str]) -> Result<Vec<String>> {
    let sql = Sql {
        postgres: "select event_id from oncely.inbox where worker = $1 and event_id = any($2)",
        sqlite: "select event_id from oncely_inbox
         where worker = $1 and event_id in (select value from json_each($2))",
        doing: "find events in the inbox",
    };
    let params = [Param::Text(worker), Param::Texts(event_ids)];
    let rows = db.fetch_all(sql, &params).await?;
    read_rows(&rows, sql.doing, |row| row.text("event_id"))
}
