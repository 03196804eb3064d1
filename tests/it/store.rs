//! The contract of a store, on SQLite, PostgreSQL, and PostgreSQL behind a transaction pooler.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oncely::model::message::{Message, Origin, OutputKind};
use oncely::model::sql::{Dialect, Rows, SqlLimits, Value};
use oncely::model::verdict::{DeadLetter, Reason, Settled};
use oncely::store::{
    Claim, Claimed, OutboxRow, Output, PostgresStore, SqliteStore, Store, Tx, WorkerMigration,
};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use support::database::Database;
use support::{pgbouncer, postgres};

/// Runs each test on every database. The test functions take a [`World`].
macro_rules! on_every_database {
    ($($fact:ident),* $(,)?) => {
        on_every_database!(@on sqlite, $($fact),*);
        on_every_database!(@on postgres, $($fact),*);
        on_every_database!(@on pgbouncer, $($fact),*);
    };
    (@on $database:ident, $($fact:ident),*) => {
        mod $database {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $fact() {
                    super::$fact(crate::store::World::$database().await).await;
                }
            )*
        }
    };
}

mod alarms;
mod changes;
mod dead_letters;
mod deferred;
mod deployments;
mod groups;
mod guest_sql;
mod hostile_sql;
mod inbox;
mod key_queues;
mod languages;
mod operators;
mod outages;
mod outbox;
mod privileges;
mod recordings;
mod requests;
mod retention;
mod savepoints;
mod sessions;
mod state;
mod takeover;
mod totals;
mod watermarks;

const WORKER: &str = "payments";
const TIME: Duration = Duration::from_secs(20);
const LEASE: Duration = Duration::from_secs(30);
const LIMITS: SqlLimits = SqlLimits {
    rows: 100,
    bytes: 100_000,
};

/// Appends outputs one by one, so that each has a lease of its own.
async fn append_singly(tx: &mut Tx, outputs: &[Output], lease: Duration) -> Vec<OutboxRow> {
    let mut rows = Vec::new();
    for output in outputs {
        let appended = tx.append_outputs(std::slice::from_ref(output), lease);
        rows.extend(appended.await.unwrap());
    }
    rows
}

/// A store on a fresh database.
struct World {
    store: Arc<Store>,
    /// The store's URL of PostgreSQL; none for SQLite.
    store_url: Option<String>,
    /// The direct URL of the database; none for SQLite.
    url: Option<String>,
    folder: tempfile::TempDir,
}

impl World {
    async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("oncely.db"))
            .await
            .unwrap();
        World {
            store: Arc::new(store.into()),
            store_url: None,
            url: None,
            folder,
        }
    }

    async fn postgres() -> Self {
        let database = postgres::shared().create_database().await.unwrap();
        let url = postgres::shared().url(&database);
        World::on_postgres(&url, &url).await
    }

    async fn pgbouncer() -> Self {
        let database = postgres::shared().create_database().await.unwrap();
        World::on_postgres(
            &pgbouncer::shared().url(&database),
            &postgres::shared().url(&database),
        )
        .await
    }

    async fn on_postgres(url: &str, direct: &str) -> Self {
        let store = PostgresStore::connect(url, 8).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        World {
            store: Arc::new(store.into()),
            store_url: Some(url.to_owned()),
            url: Some(direct.to_owned()),
            folder,
        }
    }

    /// The same database without the statement filter, to test the database privileges alone.
    async fn without_filter(self) -> Self {
        self.store.close().await;
        let store: Store = match &self.store_url {
            Some(url) => {
                let store = PostgresStore::connect(url, 8).await.unwrap();
                store.without_filter().into()
            }
            None => {
                let file = self.folder.path().join("oncely.db");
                let store = SqliteStore::open(&file).await.unwrap();
                store.without_filter().into()
            }
        };
        World {
            store: Arc::new(store),
            ..self
        }
    }

    /// Dead-letters messages without raising alarms. Returns the proofs and the notices.
    async fn dead_letter(
        &self,
        dead_letters: &[(DeadLetter, Output)],
    ) -> oncely::store::Result<(Vec<Settled>, Vec<OutboxRow>)> {
        self.store
            .dead_letter(dead_letters, 0)
            .await
            .map(|dead_lettered| (dead_lettered.proofs, dead_lettered.notices))
    }

    fn is_postgres(&self) -> bool {
        self.store.dialect() == Dialect::Postgres
    }

    async fn begin(&self) -> Tx {
        self.store.begin(WORKER, TIME).await.unwrap()
    }

    /// A direct connection to PostgreSQL.
    async fn connect(&self) -> PgConnection {
        PgConnection::connect(self.url.as_deref().unwrap())
            .await
            .unwrap()
    }

    async fn run_directly(&self, statement: &str) {
        self.connect()
            .await
            .execute(AssertSqlSafe(statement))
            .await
            .unwrap();
    }

    /// Executes a statement past the store.
    async fn execute_directly(&self, statement: &str) {
        let database = match &self.url {
            Some(url) => Database::postgres(url.clone(), url.clone()),
            None => Database::Sqlite(self.folder.path().join("oncely.db")),
        };
        database.execute(statement).await.unwrap();
    }

    /// The number of rows of a table, read past the store.
    async fn count_directly(&self, table: &str) -> i64 {
        let database = match &self.url {
            Some(url) => Database::postgres(url.clone(), url.clone()),
            None => Database::Sqlite(self.folder.path().join("oncely.db")),
        };
        database
            .number(&format!("select count(*) from {table}"))
            .await
            .unwrap()
    }

    /// Deploys a version of the worker with a migration that creates tables.
    async fn migrate(&self, name: &str, sql: &str) {
        let digest = "a".repeat(64);
        self.store
            .put_component(&digest, b"component")
            .await
            .unwrap();
        let migration = WorkerMigration {
            name: name.to_owned(),
            sql: sql.to_owned(),
        };
        self.store
            .deploy(WORKER, &digest, "{}", &[migration])
            .await
            .unwrap();
    }

    /// All rows of a statement, in its own transaction.
    async fn rows(&self, statement: &str) -> Vec<Vec<Value>> {
        let mut tx = self.begin().await;
        let rows = query(&mut tx, statement, &[]).await.rows;
        tx.rollback().await;
        rows
    }

    /// Claims an event in its own transaction, which is rolled back.
    async fn claim_and_roll_back(&self, event_id: &str, payload: u8) -> Claimed {
        let mut tx = self.begin().await;
        let claimed = claim(&mut tx, event_id, payload).await;
        tx.rollback().await;
        claimed
    }
}

fn new_claim(event_id: &str, payload: u8) -> Claim {
    let origin = Some(("ORDERS".to_owned(), 7));
    Claim {
        event_id: event_id.to_owned(),
        payload_sha256: [payload; 32],
        origin,
        redriven: false,
    }
}

async fn claim(tx: &mut Tx, event_id: &str, payload: u8) -> Claimed {
    tx.claim(&[new_claim(event_id, payload)])
        .await
        .unwrap()
        .remove(0)
}

async fn query(tx: &mut Tx, statement: &str, params: &[Value]) -> Rows {
    tx.query(statement, params, LIMITS).await.unwrap().unwrap()
}

async fn execute(tx: &mut Tx, statement: &str, params: &[Value]) -> u64 {
    tx.execute(statement, params).await.unwrap().unwrap()
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn new_output(event_id: &str, ordinal: u32, delay: Duration) -> Output {
    Output {
        kind: OutputKind::Derived,
        id: format!("{WORKER}:{event_id}:{ordinal}"),
        event_id: event_id.to_owned(),
        ordinal,
        subject: "payments.settled".to_owned(),
        headers: vec![
            ("Ce-Type".to_owned(), "settled \"é\"\n".to_owned()),
            ("Ce-Type".to_owned(), "twice".to_owned()),
        ],
        body: Bytes::from_static(b"\x00\xffbody"),
        ordering_key: None,
        delay,
    }
}

fn new_dead_letter(event_id: &str, body: &'static [u8], reason: Reason) -> (DeadLetter, Output) {
    let message = Message {
        event_id: event_id.to_owned(),
        subject: "orders.new".to_owned(),
        headers: vec![("Nats-Msg-Id".to_owned(), event_id.to_owned())],
        body: Bytes::from_static(body),
        origin: Some(Origin {
            stream: "ORDERS".to_owned(),
            sequence: 9,
            stored_at: jiff::Timestamp::UNIX_EPOCH,
        }),
        redriven: None,
    };
    let dead_letter = DeadLetter {
        worker: WORKER.to_owned(),
        version: 3,
        reason,
        code: Some("card-declined".to_owned()),
        detail: "the card was declined\0".to_owned(),
        frames: Vec::new(),
        attempts: 2,
        message,
    };
    (dead_letter, new_output(event_id, 0, Duration::ZERO))
}
