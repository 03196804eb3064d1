//! What a guest may call: outbox, state, sql, invocation, log and config.
//!
//! An error of the house ends the call at once, as a trap the guest cannot catch. An error that dooms the delivery is
//! returned to the guest *and* remembered: swallowing it changes nothing.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::bindings::oncely::worker::{invocation, outbox, sql, state, types};
use super::bindings::wasi::config::store as config;
use super::bindings::wasi::logging::logging;
use super::call::{CallFailure, CallState, FailureKind};
use super::record::{Asked, Saw, Sending};
use crate::fault;
use crate::message::{self, EVENT_ID_MAX, Headers, Message, Output, output_id};
use crate::sql::{DatabaseError, Dialect, Rows, SqlError, SqlLimits, Value};
use crate::state::StateEntry;
use crate::subject;

/// The transaction a guest's `sql` and `state` reach. The outer error is the house's. A call that was begun runs to its
/// end even when its future is dropped: guests are stopped, transactions are not left half-way.
#[async_trait]
pub trait Database: Send + Sync {
    fn dialect(&self) -> Dialect;
    async fn query(&self, statement: String, params: Vec<Value>, limits: SqlLimits) -> Result2<Rows>;
    async fn execute(&self, statement: String, params: Vec<Value>) -> Result2<u64>;
    async fn load_state(&self, key: String) -> anyhow::Result<Option<StateEntry>>;
}

/// The house's error outside, the guest's inside.
pub type Result2<T> = anyhow::Result<Result<T, SqlError>>;

impl CallState {
    /// Remembers what dooms the delivery; the first one counts.
    fn doom(&mut self, kind: FailureKind, code: &str, why: &str) {
        self.doomed.get_or_insert_with(|| CallFailure::new(kind, code, why));
    }

    /// Ends the call for an error of the house.
    fn house<T>(&mut self, error: anyhow::Error) -> wasmtime::Result<T> {
        self.house.get_or_insert(error);
        Err(wasmtime::Error::msg("the host ended the call"))
    }
}

impl types::Host for CallState {}

// ---- outbox ----

impl outbox::Host for CallState {
    async fn send(&mut self, outgoing: outbox::Outgoing) -> wasmtime::Result<Result<String, outbox::Error>> {
        let outbox::Outgoing { subject, headers, body, id, ordering_key, delay: delay_ms, caused_by } = outgoing;
        let body = Bytes::from(body);
        let sending = Sending { subject, headers, body, id, ordering_key, delay_ms, caused_by };
        self.call.tape.note(sending.size(), || Asked::Send(Box::new(sending.clone())))?;
        match self.accept(sending) {
            Ok(output) => {
                let id = output.id.clone();
                self.output_bytes += output_size(&output);
                self.outputs.push(output);
                Ok(Ok(id))
            }
            Err(error) => {
                self.doom(FailureKind::OutputRefused, "output-refused", sentence(&error));
                Ok(Err(error))
            }
        }
    }
}

impl CallState {
    /// Checks one outgoing message against the grants and limits of the manifest.
    fn accept(&self, outgoing: Sending) -> Result<Output, outbox::Error> {
        let worker = &self.call.worker;
        subject::check_subject(&outgoing.subject).map_err(|why| outbox::Error::InvalidSubject(why.to_string()))?;
        if !worker.grants(&outgoing.subject) {
            return Err(outbox::Error::NotGranted(format!(
                "worker {} may not publish to `{}`; to let it, put in its manifest: {}",
                worker.name,
                outgoing.subject,
                worker.line_that_grants(&outgoing.subject)
            )));
        }
        check_headers(&outgoing.headers)?;
        check_ordering_key(outgoing.ordering_key.as_deref())?;
        let cause = self.cause(outgoing.caused_by.as_deref())?;
        // Counted by event: the same message yields the same ids in whichever company it is handled.
        let ordinal = self.outputs.iter().filter(|output| output.event_id == cause.event_id).count();
        let output = Output {
            id: self.id_for(outgoing.id, cause, ordinal)?,
            event_id: cause.event_id.clone(),
            ordinal: u32::try_from(ordinal).unwrap_or(u32::MAX),
            subject: outgoing.subject,
            headers: with_trace(outgoing.headers, cause),
            body: outgoing.body,
            ordering_key: outgoing.ordering_key,
            delay: Duration::from_millis(outgoing.delay_ms.unwrap_or_default()),
        };
        self.check_size(&output)?;
        Ok(output)
    }

    /// The message that caused an output.
    fn cause(&self, event_id: Option<&str>) -> Result<&Message, outbox::Error> {
        let caused = |event_id: &str| self.call.messages.iter().find(|message| message.event_id == event_id);
        let cause = match event_id {
            Some(event_id) => caused(event_id).ok_or_else(|| format!("this call has no message `{event_id}`")),
            None if self.in_batch => Err("a batch handler says for each output which message caused it \
                (`caused-by`: the message's id)"
                .to_owned()),
            None => self.call.messages.first().ok_or_else(|| "this call has no message".to_owned()),
        };
        cause.map(AsRef::as_ref).map_err(outbox::Error::Other)
    }

    fn id_for(&self, asked: Option<String>, cause: &Message, ordinal: usize) -> Result<String, outbox::Error> {
        let Some(id) = asked else {
            return Ok(output_id(&self.call.worker.name, &cause.event_id, ordinal));
        };
        if id.is_empty() || id.len() > EVENT_ID_MAX || id.chars().any(char::is_control) {
            return Err(outbox::Error::InvalidId(format!(
                "the id of an output must have 1 to {EVENT_ID_MAX} bytes and no control characters"
            )));
        }
        if self.outputs.iter().any(|output| output.id == id) {
            return Err(outbox::Error::InvalidId(format!("the id `{id}` was used before in this delivery")));
        }
        Ok(id)
    }

    fn check_size(&self, output: &Output) -> Result<(), outbox::Error> {
        let limits = &self.call.worker.limits;
        if self.outputs.len() >= limits.outputs as usize {
            return Err(outbox::Error::TooMany(format!(
                "a delivery may send {} messages (`outputs` under [worker.limits])",
                limits.outputs
            )));
        }
        let size = output_size(output);
        let most = usize::try_from(limits.output_size).unwrap_or(usize::MAX).min(self.call.payload_max);
        if size > most {
            return Err(outbox::Error::TooLarge(format!(
                "the message to `{}` has {size} bytes with its headers; at most {most} are allowed (`output_size` under \
                 [worker.limits], and max_payload of the NATS server)",
                output.subject
            )));
        }
        if (self.output_bytes + size) as u64 > limits.outputs_size {
            return Err(outbox::Error::TooLarge(format!(
                "the messages of this delivery have more than {} bytes together (`outputs_size` under [worker.limits])",
                limits.outputs_size
            )));
        }
        Ok(())
    }
}

/// Carries the trace of the message on, unless the author set one.
fn with_trace(mut headers: Headers, cause: &Message) -> Headers {
    for name in ["traceparent", "tracestate"] {
        if message::header(&headers, name).is_none()
            && let Some(value) = cause.header(name)
        {
            headers.push((name.to_owned(), value.to_owned()));
        }
    }
    headers
}

fn check_ordering_key(key: Option<&str>) -> Result<(), outbox::Error> {
    match key {
        Some(key) if key.len() > EVENT_ID_MAX || key.contains('\0') => {
            Err(outbox::Error::Other(format!("an ordering key has at most {EVENT_ID_MAX} bytes and no NUL")))
        }
        _ => Ok(()),
    }
}

/// Room for the headers the platform adds itself.
const PLATFORM_HEADERS: usize = 1024;

fn output_size(output: &Output) -> usize {
    let headers: usize = output.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    headers + PLATFORM_HEADERS + output.body.len()
}

fn check_headers(headers: &Headers) -> Result<(), outbox::Error> {
    for (name, value) in headers {
        let token = |c: char| c.is_ascii_graphic() && c != ':';
        if name.is_empty() || name.len() > 128 || !name.chars().all(token) {
            return Err(outbox::Error::InvalidHeader(format!(
                "`{}` cannot be a header's name: 1 to 128 printable ASCII characters without space and colon",
                name.escape_debug()
            )));
        }
        let lower = name.to_ascii_lowercase();
        if fault::mutant(fault::ALLOW_RESERVED_HEADERS) {
            continue;
        }
        if lower.starts_with("nats-") || lower.starts_with("oncely-") {
            return Err(outbox::Error::InvalidHeader(format!(
                "the header `{name}` is reserved: names that begin with `Nats-` or `Oncely-` are the platform's"
            )));
        }
        if value.len() > 8192 || value.chars().any(|c| c.is_control() && c != '\t') {
            return Err(outbox::Error::InvalidHeader(format!(
                "the value of header `{name}` has control characters or more than 8192 bytes"
            )));
        }
    }
    Ok(())
}

fn sentence(error: &outbox::Error) -> &str {
    match error {
        outbox::Error::InvalidSubject(why)
        | outbox::Error::InvalidHeader(why)
        | outbox::Error::InvalidId(why)
        | outbox::Error::NotGranted(why)
        | outbox::Error::TooLarge(why)
        | outbox::Error::TooMany(why)
        | outbox::Error::Other(why) => why,
    }
}

// ---- state ----

impl CallState {
    /// The version of `key` before it is changed, or what is wrong with the change.
    async fn before(
        &mut self,
        key: &str,
        value: &[u8],
        asked: impl FnOnce() -> Asked,
    ) -> wasmtime::Result<Result<Option<u64>, state::Error>> {
        if let Err(error) = check_key(key).and_then(|()| self.check_value(value)) {
            return Ok(Err(error));
        }
        match self.call.tape.ask(key.len() + value.len(), asked)? {
            Some(Saw::Version(version)) => {
                // Of the value before it the record needs to know nothing.
                let entry = version.map(|version| StateEntry { value: Bytes::new(), version });
                if self.call.state.get(key).is_none() {
                    self.call.state.remember(key.to_owned(), entry);
                }
                Ok(Ok(version))
            }
            Some(_) => self.call.tape.foreign(),
            None => {
                self.load(key).await?;
                let version = self.call.state.get(key).flatten().map(|entry| entry.version);
                self.call.tape.saw(0, || Saw::Version(version));
                Ok(Ok(version))
            }
        }
    }

    /// Reads `key` into the batch's state unless it is there already.
    async fn load(&mut self, key: &str) -> wasmtime::Result<()> {
        if self.call.state.get(key).is_some() {
            return Ok(());
        }
        match self.call.database.load_state(key.to_owned()).await {
            Ok(entry) => {
                self.call.state.remember(key.to_owned(), entry);
                Ok(())
            }
            Err(error) => self.house(error),
        }
    }

    fn check_value(&self, value: &[u8]) -> Result<(), state::Error> {
        let most = self.call.worker.limits.state_size;
        if value.len() as u64 > most {
            return Err(state::Error::TooLarge(format!(
                "the value has {} bytes; at most {most} are allowed (`state_size` under [worker.limits])",
                value.len()
            )));
        }
        Ok(())
    }
}

fn check_key(key: &str) -> Result<(), state::Error> {
    if key.is_empty() || key.len() > EVENT_ID_MAX || key.contains('\0') {
        return Err(state::Error::InvalidKey(format!("a key has 1 to {EVENT_ID_MAX} bytes and no NUL")));
    }
    Ok(())
}

/// The version before a change, or returns what is wrong with it.
macro_rules! version_before {
    ($self:ident, $key:expr, $value:expr, $asked:expr) => {
        match $self.before($key, $value, $asked).await? {
            Ok(version) => version,
            Err(error) => return Ok(Err(error)),
        }
    };
}

impl state::Host for CallState {
    async fn get(&mut self, key: String) -> wasmtime::Result<Result<Option<state::Entry>, state::Error>> {
        if let Err(error) = check_key(&key) {
            return Ok(Err(error));
        }
        let entry = match self.call.tape.ask(key.len(), || Asked::Get { key: key.clone() })? {
            Some(Saw::Entry(entry)) => entry,
            Some(_) => return self.call.tape.foreign(),
            None => {
                self.load(&key).await?;
                let entry = self.call.state.get(&key).flatten().cloned();
                let size = entry.as_ref().map_or(0, |entry| entry.value.len());
                self.call.tape.saw(size, || Saw::Entry(entry.clone()));
                entry
            }
        };
        Ok(Ok(entry.map(|entry| state::Entry { value: entry.value.into(), version: entry.version })))
    }

    async fn set(&mut self, key: String, value: Vec<u8>) -> wasmtime::Result<Result<u64, state::Error>> {
        let value = Bytes::from(value);
        version_before!(self, &key, &value, || Asked::Set { key: key.clone(), value: value.clone() });
        Ok(Ok(self.call.state.set(key, value)))
    }

    async fn delete(&mut self, key: String) -> wasmtime::Result<Result<bool, state::Error>> {
        version_before!(self, &key, &[], || Asked::Delete { key: key.clone() });
        Ok(Ok(self.call.state.delete(key)))
    }

    async fn compare_and_set(
        &mut self,
        key: String,
        expected: Option<u64>,
        value: Vec<u8>,
    ) -> wasmtime::Result<Result<u64, state::Error>> {
        let value = Bytes::from(value);
        let asked = || Asked::CompareAndSet { key: key.clone(), expected, value: value.clone() };
        let version = version_before!(self, &key, &value, asked);
        if version != expected {
            return Ok(Err(state::Error::VersionMismatch(version)));
        }
        Ok(Ok(self.call.state.set(key, value)))
    }
}

// ---- sql ----

impl CallState {
    /// Counts a statement against the limits.
    fn count_statement(&mut self, statement: &str, params: &[Value]) -> Result<(), SqlError> {
        let limits = &self.call.worker.limits;
        if self.statements >= limits.sql_statements {
            return Err(SqlError::TooLarge(format!(
                "a delivery may run {} statements (`sql_statements` under [worker.limits])",
                limits.sql_statements
            )));
        }
        self.statements += 1;
        let size = statement_size(statement, params);
        if size as u64 > limits.sql_size || params.len() > 10_000 {
            return Err(SqlError::TooLarge(format!(
                "the statement has {size} bytes and {} parameters; at most {} bytes (`sql_size` under [worker.limits]) and \
                 10000 parameters are allowed",
                params.len(),
                limits.sql_size
            )));
        }
        Ok(())
    }

    async fn run_query(&mut self, statement: String, params: Vec<Value>) -> wasmtime::Result<Result<Rows, SqlError>> {
        if let Err(error) = self.count_statement(&statement, &params) {
            return Ok(Err(error));
        }
        let limits = self.call.worker.limits.sql();
        match self.call.database.query(statement, params, limits).await {
            Ok(answer) => Ok(answer),
            Err(error) => self.house(error),
        }
    }

    async fn run_execute(&mut self, statement: String, params: Vec<Value>) -> wasmtime::Result<Result<u64, SqlError>> {
        if let Err(error) = self.count_statement(&statement, &params) {
            return Ok(Err(error));
        }
        match self.call.database.execute(statement, params).await {
            Ok(answer) => Ok(answer),
            Err(error) => self.house(error),
        }
    }

    /// Dooms the delivery for an error that the transaction does not survive, and gives it to the guest.
    fn failed(&mut self, error: SqlError) -> sql::Error {
        let kind = match &error {
            SqlError::Conflict(_) => FailureKind::Conflict,
            _ => FailureKind::Retry,
        };
        let code = match &error {
            SqlError::ConstraintViolation(_) => "constraint-violation",
            SqlError::Timeout => "timeout",
            SqlError::Conflict(_) => "conflict",
            _ => "sql",
        };
        let dooms =
            !matches!(error, SqlError::NotAllowed(_) | SqlError::InvalidParameter(_) | SqlError::TransactionFailed(_));
        if dooms && !fault::mutant(fault::IGNORE_COMMIT_TAG) {
            self.doom(kind, code, &format!("a statement failed: {error}"));
        }
        wit_error(error)
    }
}

impl sql::Host for CallState {
    async fn get_dialect(&mut self) -> wasmtime::Result<sql::Dialect> {
        Ok(match self.call.database.dialect() {
            Dialect::Postgres => sql::Dialect::Postgres,
            Dialect::Sqlite => sql::Dialect::Sqlite,
        })
    }

    async fn query(
        &mut self,
        statement: String,
        params: Vec<sql::Value>,
    ) -> wasmtime::Result<Result<sql::RowSet, sql::Error>> {
        let params: Vec<Value> = params.into_iter().map(value_from_wit).collect();
        let asked = || Asked::Query { statement: statement.clone(), params: params.clone() };
        let answer = match self.call.tape.ask(statement_size(&statement, &params), asked)? {
            Some(Saw::Rows(rows)) => Ok(rows),
            Some(Saw::Refused(error)) => Err(error),
            Some(_) => return self.call.tape.foreign(),
            None => {
                let answer = self.run_query(statement, params).await?;
                let size = answer.as_ref().map_or(0, Rows::size);
                self.call.tape.saw(size, || answer.clone().map_or_else(Saw::Refused, Saw::Rows));
                answer
            }
        };
        Ok(answer.map(wit_rows).map_err(|error| self.failed(error)))
    }

    async fn execute(
        &mut self,
        statement: String,
        params: Vec<sql::Value>,
    ) -> wasmtime::Result<Result<u64, sql::Error>> {
        let params: Vec<Value> = params.into_iter().map(value_from_wit).collect();
        let asked = || Asked::Execute { statement: statement.clone(), params: params.clone() };
        let answer = match self.call.tape.ask(statement_size(&statement, &params), asked)? {
            Some(Saw::Changed(rows)) => Ok(rows),
            Some(Saw::Refused(error)) => Err(error),
            Some(_) => return self.call.tape.foreign(),
            None => {
                let answer = self.run_execute(statement, params).await?;
                self.call.tape.saw(0, || answer.clone().map_or_else(Saw::Refused, Saw::Changed));
                answer
            }
        };
        Ok(answer.map_err(|error| self.failed(error)))
    }
}

fn statement_size(statement: &str, params: &[Value]) -> usize {
    statement.len() + params.iter().map(Value::size).sum::<usize>()
}

fn value_from_wit(value: sql::Value) -> Value {
    match value {
        sql::Value::Null => Value::Null,
        sql::Value::Boolean(it) => Value::Boolean(it),
        sql::Value::Int64(it) => Value::Int64(it),
        sql::Value::Float64(it) => Value::Float64(it),
        sql::Value::Decimal(it) => Value::Decimal(it),
        sql::Value::Text(it) => Value::Text(it),
        sql::Value::Bytes(it) => Value::Bytes(it),
        sql::Value::Uuid(it) => Value::Uuid(it),
        sql::Value::Json(it) => Value::Json(it),
        sql::Value::Timestamp(it) => Value::Timestamp(it),
        sql::Value::Date(it) => Value::Date(it),
        sql::Value::Time(it) => Value::Time(it),
    }
}

fn wit_value(value: Value) -> sql::Value {
    match value {
        Value::Null => sql::Value::Null,
        Value::Boolean(it) => sql::Value::Boolean(it),
        Value::Int64(it) => sql::Value::Int64(it),
        Value::Float64(it) => sql::Value::Float64(it),
        Value::Decimal(it) => sql::Value::Decimal(it),
        Value::Text(it) => sql::Value::Text(it),
        Value::Bytes(it) => sql::Value::Bytes(it),
        Value::Uuid(it) => sql::Value::Uuid(it),
        Value::Json(it) => sql::Value::Json(it),
        Value::Timestamp(it) => sql::Value::Timestamp(it),
        Value::Date(it) => sql::Value::Date(it),
        Value::Time(it) => sql::Value::Time(it),
    }
}

fn wit_rows(rows: Rows) -> sql::RowSet {
    let row = |row: Vec<Value>| row.into_iter().map(wit_value).collect();
    sql::RowSet { columns: rows.columns, rows: rows.rows.into_iter().map(row).collect() }
}

fn wit_error(error: SqlError) -> sql::Error {
    let database = |error: DatabaseError| sql::DatabaseError {
        code: error.code,
        message: error.message,
        constraint: error.constraint,
    };
    match error {
        SqlError::ConstraintViolation(error) => sql::Error::ConstraintViolation(database(error)),
        SqlError::Conflict(error) => sql::Error::Conflict(database(error)),
        SqlError::QueryFailed(error) => sql::Error::QueryFailed(database(error)),
        SqlError::NotAllowed(why) => sql::Error::NotAllowed(why),
        SqlError::InvalidParameter(why) => sql::Error::InvalidParameter(why),
        SqlError::UnsupportedType(why) => sql::Error::UnsupportedType(why),
        SqlError::TooLarge(why) => sql::Error::TooLarge(why),
        SqlError::Timeout => sql::Error::Timeout,
        SqlError::TransactionFailed(why) => sql::Error::TransactionFailed(why),
    }
}

// ---- invocation, log, config ----

impl invocation::Host for CallState {
    async fn id(&mut self) -> wasmtime::Result<String> {
        let event_id = self.message().map(|message| message.event_id.as_str());
        Ok(format!("{}:{}", self.call.worker.name, event_id.unwrap_or_default()))
    }

    async fn worker(&mut self) -> wasmtime::Result<String> {
        Ok(self.call.worker.name.clone())
    }

    async fn version(&mut self) -> wasmtime::Result<u32> {
        Ok(self.call.version)
    }

    async fn attempt(&mut self) -> wasmtime::Result<u32> {
        self.call.tape.looks.at_attempt = true;
        Ok(self.call.attempt)
    }

    async fn max_attempts(&mut self) -> wasmtime::Result<u32> {
        let before = self.message().map_or(0, Message::attempts_before);
        Ok(before.saturating_add(self.call.worker.retry.attempts))
    }

    async fn now(&mut self) -> wasmtime::Result<u64> {
        self.call.tape.looks.at_now = true;
        Ok(u64::try_from(self.call.now.as_microsecond()).unwrap_or_default())
    }

    async fn remaining(&mut self) -> wasmtime::Result<u64> {
        match self.call.tape.ask(0, || Asked::Remaining)? {
            Some(Saw::Number(left)) => Ok(left),
            Some(_) => self.call.tape.foreign(),
            None => {
                let left = self.deadline.saturating_duration_since(std::time::Instant::now());
                let left = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
                self.call.tape.saw(0, || Saw::Number(left));
                Ok(left)
            }
        }
    }

    async fn traceparent(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self.message().and_then(|message| message.header("traceparent")).map(str::to_owned))
    }
}

impl logging::Host for CallState {
    async fn log(&mut self, level: logging::Level, context: String, message: String) -> wasmtime::Result<()> {
        let level = match level {
            logging::Level::Trace => "trace",
            logging::Level::Debug => "debug",
            logging::Level::Info => "info",
            logging::Level::Warn => "warn",
            logging::Level::Error => "error",
            logging::Level::Critical => "critical",
        };
        self.logs.line(level, &context, &message);
        Ok(())
    }
}

impl config::Host for CallState {
    async fn get(&mut self, key: String) -> wasmtime::Result<Result<Option<String>, config::Error>> {
        Ok(Ok(self.call.worker.config.get(&key).cloned()))
    }

    async fn get_all(&mut self) -> wasmtime::Result<Result<Vec<(String, String)>, config::Error>> {
        Ok(Ok(self.call.worker.config.iter().map(|(key, value)| (key.clone(), value.clone())).collect()))
    }
}
