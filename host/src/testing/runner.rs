//! Runs the messages or requests of a case in one transaction, and rolls it back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, anyhow, bail};
use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Map, Value as Json, json};

use super::case::{Delivered, Given, Input};
use super::content;
use super::effects::Effects;
use super::requests::refused_commit;
use crate::config::manifest::{Isolation, ResolvedConfig, Worker};
use crate::delivery::{SharedTx, schema_mismatch};
use crate::guest::{
    CacheReader, CachedValue, Call, CallFailure, CallOutcome, Database, Deferral, FailureKind,
    Guest, Recorder, RequestCall, WarmInstance,
};
use crate::ingress::TestRequests;
use crate::model::failure_code::FailureCode;
use crate::model::keyed_state::{BatchState, StateSlot};
use crate::model::message::{Headers, Message, Output, OutputKind};
use crate::model::sql::{DatabaseError, Dialect, Rows, SqlError, SqlLimits, Value};
use crate::model::units;
use crate::store::{RowChange, Store, TableRows, Tx, changed_rows};

/// The most rows of a table that are compared.
const ROWS_MAX: usize = 10_000;

/// The largest payload of a NATS server with default settings, in bytes.
const PAYLOAD_MAX: usize = 1 << 20;

/// A worker with a database for its cases.
pub struct Runner {
    pub store: Arc<Store>,
    pub guest: Guest,
    pub worker: Arc<Worker>,
    pub config: Arc<ResolvedConfig>,
    pub requests: TestRequests,
}

/// A fault during a run, after which the message is delivered again, or the request sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The host crashes at a host call of an input. Both are counted, the call from 1.
    Crash {
        input: usize,
        call: u64,
    },
    /// Another transaction conflicts with a statement of an input, counted from 1.
    Conflict {
        input: usize,
        statement: u64,
    },
}

/// The outcome of a run.
#[derive(Debug, Default)]
pub struct Run {
    pub effects: Effects,
    /// The log of the handler.
    pub logs: String,
    /// The number of host calls of each input.
    pub host_calls: Vec<u64>,
    /// The number of statements of each input.
    pub statements: Vec<u64>,
}

/// The effects of the inputs so far.
pub(super) struct Progress {
    pub state: BatchState,
    pub outputs: Vec<Output>,
    /// The results of messages, or the responses to requests.
    pub results: Vec<Json>,
    warm: Option<WarmInstance>,
    pub run: Run,
}

/// A call for one message or request.
pub(super) struct TestCall {
    pub message: Arc<Message>,
    pub attempt: u32,
    pub request: Option<RequestCall>,
    pub now: Timestamp,
    pub fault: Option<Fault>,
}

impl Runner {
    /// Handles messages or requests in order, on top of the given rows and state, and rolls all
    /// effects back.
    ///
    /// # Errors
    /// The given rows cannot be inserted, or the database fails.
    pub async fn run(
        &self,
        given: &[&Given],
        now: Option<Timestamp>,
        inputs: &[Input],
        fault: Fault,
    ) -> Result<Run> {
        let time = self.worker.limits.time;
        let mut tx = self.store.begin(&self.worker.name, time).await?;
        let prepared = prepare(&mut tx, self.store.dialect(), given).await;
        let (before, state) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                tx.rollback().await;
                return Err(error);
            }
        };
        let shared_tx = SharedTx::new(self.store.dialect(), tx);
        let mut progress = Progress {
            state,
            outputs: Vec::new(),
            results: Vec::new(),
            warm: None,
            run: Run::default(),
        };
        let now = now.unwrap_or_else(Timestamp::now);
        let mut handled = Ok(());
        for (at, input) in inputs.iter().enumerate() {
            let (progress, fault) = (&mut progress, fault.at(at));
            handled = match input {
                Input::Message(delivery) => {
                    self.deliver(&shared_tx, progress, delivery, now, fault)
                        .await
                }
                Input::Request(request) => {
                    self.answer(&shared_tx, progress, request, now, fault).await
                }
            };
            if handled.is_err() {
                break;
            }
        }

        let mut tx = shared_tx.take_tx().await?;
        let effects = match handled {
            Ok(()) => {
                self.read_effects(&mut tx, given, before, &mut progress)
                    .await
            }
            Err(error) => Err(error),
        };
        tx.rollback().await;
        let mut run = progress.run;
        run.effects = effects?;
        if inputs.len() == 1 {
            let only = |list: &mut Option<Vec<Json>>| list.take().and_then(|mut all| all.pop());
            run.effects.result = only(&mut run.effects.results);
            run.effects.response = only(&mut run.effects.responses);
        }
        Ok(run)
    }

    /// Delivers one message: again after a fault, and until it has a result.
    async fn deliver(
        &self,
        shared_tx: &SharedTx,
        progress: &mut Progress,
        delivery: &Delivered,
        now: Timestamp,
        fault: Option<Fault>,
    ) -> Result<()> {
        if let Some(failure) = schema_mismatch(&self.worker, &delivery.message) {
            progress.run.host_calls.push(0);
            progress.run.statements.push(0);
            progress.results.push(failure_text(&failure));
            return Ok(());
        }
        let mut fault = fault;
        loop {
            shared_tx.begin_item().await;
            let call = TestCall {
                message: Arc::clone(&delivery.message),
                attempt: delivery.attempt,
                request: None,
                now,
                fault,
            };
            let (outcome, statements) = self.call(shared_tx, progress, call).await?;
            let is_disturbed = fault.take().is_some();
            progress.run.logs.push_str(&outcome.logs);
            progress.state = outcome.state;
            let result = outcome
                .result
                .and_then(|results| results.into_iter().collect());
            if result.is_err() || is_disturbed {
                progress.state.discard();
                progress.warm = None;
                if !shared_tx.undo_item().await? {
                    bail!("the transaction did not survive a failed statement");
                }
            }
            if is_disturbed {
                continue;
            }
            progress.run.host_calls.push(outcome.host_calls);
            progress.run.statements.push(statements);
            progress.results.push(match &result {
                Ok(()) => json!("done"),
                Err(failure) => failure_text(failure),
            });
            if result.is_ok() {
                progress.state.keep();
                progress.outputs.extend(outcome.outputs);
                let is_shared = self.worker.isolation == Isolation::Batch;
                progress.warm = outcome.warm.filter(|_| is_shared);
            }
            return Ok(());
        }
    }

    /// Calls the handler. Returns the outcome and the number of statements.
    pub(super) async fn call(
        &self,
        shared_tx: &SharedTx,
        progress: &mut Progress,
        call: TestCall,
    ) -> Result<(CallOutcome, u64)> {
        let database = Arc::new(FaultyDatabase {
            inner: shared_tx.clone(),
            statements: AtomicU64::new(0),
            conflict_at: match call.fault {
                Some(Fault::Conflict { statement, .. }) => Some(statement),
                _ => None,
            },
        });
        let call = Call {
            messages: vec![call.message],
            traces: Vec::new(),
            worker: Arc::clone(&self.worker),
            config: Arc::clone(&self.config),
            version: 1,
            attempt: call.attempt,
            now: call.now,
            payload_max: PAYLOAD_MAX,
            database: Arc::clone(&database) as Arc<dyn Database>,
            cache: Arc::new(EmptyCache),
            state: std::mem::take(&mut progress.state),
            request: call.request,
            recorder: match call.fault {
                Some(Fault::Crash { call, .. }) => Recorder::crashing_at(call),
                _ => Recorder::default(),
            },
        };
        let outcome = self.guest.call(call, progress.warm.take()).await?;
        Ok((outcome, database.statements.load(Ordering::Relaxed)))
    }

    async fn read_effects(
        &self,
        tx: &mut Tx,
        given: &[&Given],
        before: Vec<TableRows>,
        progress: &mut Progress,
    ) -> Result<Effects> {
        let after = tx.table_rows(ROWS_MAX).await?;
        let mut results = std::mem::take(&mut progress.results);
        let effects = match tx.commit_refusal().await {
            None => Effects {
                outputs: Some(progress.outputs.iter().map(output_text).collect()),
                state: Some(changed_state(given, &progress.state)?),
                rows: Some(rows_text(changed_rows(before, after))),
                ..Effects::default()
            },
            Some(refusal) => {
                let failure =
                    CallFailure::new(FailureKind::Retry, FailureCode::CommitRefused, refusal);
                for result in &mut results {
                    *result = match self.answers_requests() {
                        true => refused_commit(&failure).await?,
                        false => failure_text(&failure),
                    };
                }
                Effects {
                    outputs: Some(Vec::new()),
                    state: Some(BTreeMap::new()),
                    rows: Some(BTreeMap::new()),
                    ..Effects::default()
                }
            }
        };
        Ok(match self.answers_requests() {
            true => Effects {
                responses: Some(results),
                ..effects
            },
            false => Effects {
                results: Some(results),
                ..effects
            },
        })
    }

    fn answers_requests(&self) -> bool {
        !self.worker.routes.is_empty()
    }
}

impl Fault {
    /// The fault, if it belongs to this input.
    fn at(self, at: usize) -> Option<Fault> {
        match self {
            Fault::Crash { input, .. } | Fault::Conflict { input, .. } => {
                (input == at).then_some(self)
            }
            Fault::None => None,
        }
    }
}

/// Inserts the given rows. Returns the rows of all tables and the state.
async fn prepare(
    tx: &mut Tx,
    dialect: Dialect,
    given: &[&Given],
) -> Result<(Vec<TableRows>, BatchState)> {
    let mut state = BatchState::default();
    for given in given {
        for (table, rows) in &given.rows {
            for row in rows {
                insert(tx, dialect, table, row)
                    .await
                    .with_context(|| format!("insert a given row into {table}"))?;
            }
        }
        for statement in &given.sql {
            tx.execute(statement, &[])
                .await?
                .map_err(|error| anyhow!("{error}"))
                .with_context(|| format!("run the given statement `{statement}`"))?;
        }
        for (key, value) in &given.state {
            let value = content::to_bytes(value)
                .with_context(|| format!("read the given state of `{key}`"))?;
            state.record_read(key.clone(), StateSlot::default());
            state.set(key.clone(), value);
        }
    }
    state.keep();
    Ok((tx.table_rows(ROWS_MAX).await?, state))
}

async fn insert(tx: &mut Tx, dialect: Dialect, table: &str, row: &Map<String, Json>) -> Result<()> {
    let quote = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let columns: Vec<String> = row.keys().map(|name| quote(name)).collect();
    let (table, columns) = (quote(table), columns.join(", "));
    let (statement, params) = match dialect {
        // The columns give the values their types.
        Dialect::Postgres => (
            format!(
                "insert into {table} ({columns}) \
                 select {columns} from jsonb_populate_record(null::{table}, $1)"
            ),
            vec![Value::Json(Json::Object(row.clone()).to_string())],
        ),
        Dialect::Sqlite => {
            let numbers: Vec<String> = (1..=row.len()).map(|at| format!("${at}")).collect();
            let numbers = numbers.join(", ");
            (
                format!("insert into {table} ({columns}) values ({numbers})"),
                row.values().map(sqlite_value).collect(),
            )
        }
    };
    let inserted = tx.execute(&statement, &params).await?;
    inserted.map_err(|error| anyhow!("{error}"))?;
    Ok(())
}

/// A value of JSON for SQLite. A text like `\x00ff` is bytes, as in the rows of effects.
fn sqlite_value(value: &Json) -> Value {
    match value {
        Json::Null => Value::Null,
        Json::Bool(yes) => Value::Boolean(*yes),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => Value::Int64(number),
            (None, Some(number)) => Value::Float64(number),
            (None, None) => Value::Text(number.to_string()),
        },
        Json::String(text) => match text.strip_prefix("\\x").map(hex::decode) {
            Some(Ok(bytes)) => Value::Bytes(bytes),
            _ => Value::Text(text.clone()),
        },
        json => Value::Text(json.to_string()),
    }
}

/// The keys whose values differ from the given ones.
fn changed_state(given: &[&Given], state: &BatchState) -> Result<BTreeMap<String, Json>> {
    let mut values: BTreeMap<String, Option<Bytes>> = BTreeMap::new();
    for (key, value) in given.iter().flat_map(|given| &given.state) {
        values.insert(key.clone(), Some(content::to_bytes(value)?));
    }
    let mut keys: Vec<String> = values.keys().cloned().collect();
    keys.extend(state.changes().into_iter().map(|(key, _, _)| key));
    let mut changed = BTreeMap::new();
    for key in keys {
        let before = values.get(&key).cloned().flatten();
        let after = state.get(&key).flatten().map(|entry| entry.value.clone());
        if before != after {
            let after = after.map_or(Json::Null, |value| content::from_bytes(&value));
            changed.insert(key, after);
        }
    }
    Ok(changed)
}

fn rows_text(changes: Vec<RowChange>) -> BTreeMap<String, Vec<Json>> {
    let mut tables: BTreeMap<String, Vec<Json>> = BTreeMap::new();
    for change in changes {
        let row = match (change.before, change.after) {
            (None, Some(row)) => json!({ "insert": row }),
            (Some(_), Some(row)) => json!({ "update": row }),
            (row, None) => json!({ "delete": row }),
        };
        tables.entry(change.table).or_default().push(row);
    }
    for rows in tables.values_mut() {
        rows.sort_by_key(Json::to_string);
    }
    tables
}

fn output_text(output: &Output) -> Json {
    let mut text = Map::new();
    let mut set = |name: &str, value: Json| text.insert(name.to_owned(), value);
    set("subject", json!(output.subject));
    set("body", content::from_bytes(&output.body));
    if output.kind == OutputKind::Chosen {
        set("id", json!(output.id));
    }
    if let Some(key) = &output.ordering_key {
        set("key", json!(key));
    }
    if !output.delay.is_zero() {
        set("delay", json!(units::format_duration(output.delay)));
    }
    if !output.headers.is_empty() {
        set("headers", headers_text(&output.headers));
    }
    Json::Object(text)
}

/// Headers by name, with a list for a repeated one.
pub(super) fn headers_text(headers: &Headers) -> Json {
    let mut by_name: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, value) in headers {
        by_name.entry(name).or_default().push(value);
    }
    let texts = by_name
        .into_iter()
        .map(|(name, values)| match values.as_slice() {
            [one] => (name.to_owned(), json!(one)),
            several => (name.to_owned(), json!(several)),
        });
    Json::Object(texts.collect())
}

/// A failure as `{kind: {code, message}}`.
fn failure_text(failure: &CallFailure) -> Json {
    let mut text = Map::new();
    let kind = match failure.kind {
        FailureKind::Retry => "retry",
        FailureKind::RetryAfter(after) => {
            text.insert("after".to_owned(), json!(units::format_duration(after)));
            "retry"
        }
        FailureKind::Trap => "trap",
        FailureKind::Reject => "reject",
        FailureKind::OutputRefused => "output-refused",
        FailureKind::Conflict => "conflict",
    };
    if let Some(code) = &failure.code {
        text.insert("code".to_owned(), json!(code));
    }
    text.insert("message".to_owned(), json!(failure.message));
    json!({ kind: text })
}

/// The transaction of a case. A statement may be refused as if another transaction conflicted.
struct FaultyDatabase {
    inner: SharedTx,
    statements: AtomicU64,
    conflict_at: Option<u64>,
}

impl FaultyDatabase {
    fn next_statement(&self) -> Result<(), SqlError> {
        let statement = self.statements.fetch_add(1, Ordering::Relaxed) + 1;
        if self.conflict_at == Some(statement) {
            return Err(SqlError::Conflict(DatabaseError {
                code: "40001".to_owned(),
                message: "a conflict that the test has caused".to_owned(),
                constraint: None,
            }));
        }
        Ok(())
    }
}

#[async_trait]
impl Database for FaultyDatabase {
    fn dialect(&self) -> Dialect {
        self.inner.dialect()
    }

    async fn query(
        &self,
        statement: String,
        params: Vec<Value>,
        limits: SqlLimits,
    ) -> Result<Result<Rows, SqlError>> {
        match self.next_statement() {
            Ok(()) => self.inner.query(statement, params, limits).await,
            Err(conflict) => Ok(Err(conflict)),
        }
    }

    async fn execute(
        &self,
        statement: String,
        params: Vec<Value>,
    ) -> Result<Result<u64, SqlError>> {
        match self.next_statement() {
            Ok(()) => self.inner.execute(statement, params).await,
            Err(conflict) => Ok(Err(conflict)),
        }
    }

    async fn defer(
        &self,
        statement: String,
        params: Vec<Value>,
    ) -> Result<Result<Deferral, SqlError>> {
        self.inner.defer(statement, params).await
    }

    async fn run_deferred(&self) -> Result<Result<(), SqlError>> {
        match self.next_statement() {
            Ok(()) => self.inner.run_deferred().await,
            Err(conflict) => Ok(Err(conflict)),
        }
    }

    async fn end_call(&self) -> Result<Result<(), SqlError>> {
        self.run_deferred().await
    }

    async fn load_state(&self, key: String) -> Result<StateSlot> {
        self.inner.load_state(key).await
    }

    async fn list_state(&self, prefix: String, after: String, most: u32) -> Result<Vec<String>> {
        self.inner.list_state(prefix, after, most).await
    }
}

/// A cache without values.
struct EmptyCache;

#[async_trait]
impl CacheReader for EmptyCache {
    async fn get(&self, _: &str) -> Option<CachedValue> {
        None
    }
}
