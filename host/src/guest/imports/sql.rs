//! SQL statements: checked against the limits and run in the transaction. A failed statement dooms
//! the delivery.

use std::sync::Arc;

use super::READ_ONLY_REQUEST;
use crate::guest::backends::{DatabaseResult, Deferral};
use crate::guest::bindings::oncely::worker::sql;
use crate::guest::failure::{FailureKind, HandlerResult};
use crate::guest::record::{HostCall, HostResult};
use crate::guest::state::CallState;
use crate::model::failure_code::FailureCode;
use crate::model::sql::{
    self as sql_text, DatabaseError, Dialect, Rows, SqlError, StatementFacts, Value,
};

/// Maximum number of parameters of a statement.
const PARAMETERS_MAX: usize = 10_000;

impl CallState {
    /// Checks a statement against the limits and counts it. The length is checked before the
    /// statement is parsed.
    fn count_statement(&mut self, statement: &str, params: &[Value]) -> Result<(), SqlError> {
        let limits = &self.call.worker.limits;
        sql_text::check_length(statement)?;
        let size = statement_size(statement, params);
        if size as u64 > limits.sql_size || params.len() > PARAMETERS_MAX {
            return Err(SqlError::TooLarge(format!(
                "the statement has {size} bytes and {} parameters; at most {} bytes \
                 (`sql_size` under [worker.limits]) and {PARAMETERS_MAX} parameters are allowed",
                params.len(),
                limits.sql_size
            )));
        }
        if self.statements >= limits.sql_statements {
            return Err(SqlError::TooLarge(format!(
                "a delivery may run {} statements (`sql_statements` under [worker.limits])",
                limits.sql_statements
            )));
        }
        if !self.may_write()
            && StatementFacts::of(statement, self.call.database.dialect()).changes_rows
        {
            return Err(SqlError::NotAllowed(READ_ONLY_REQUEST.to_owned()));
        }
        self.statements += 1;
        Ok(())
    }

    async fn run_query(
        &mut self,
        statement: String,
        params: Vec<Value>,
    ) -> wasmtime::Result<Result<Rows, SqlError>> {
        if let Err(error) = self.count_statement(&statement, &params) {
            return Ok(Err(error));
        }
        let limits = self.call.worker.limits.sql();
        self.ran_sql = true;
        match self.call.database.query(statement, params, limits).await {
            Ok(result) => Ok(result),
            Err(error) => self.host_error(error),
        }
    }

    async fn run_execute(
        &mut self,
        statement: String,
        params: Vec<Value>,
    ) -> wasmtime::Result<Result<u64, SqlError>> {
        if let Err(error) = self.count_statement(&statement, &params) {
            return Ok(Err(error));
        }
        self.ran_sql = true;
        match self.call.database.execute(statement, params).await {
            Ok(result) => Ok(result),
            Err(error) => self.host_error(error),
        }
    }

    async fn queue(
        &mut self,
        statement: String,
        params: Vec<Value>,
    ) -> wasmtime::Result<Result<(), SqlError>> {
        if let Err(error) = self.count_statement(&statement, &params) {
            return Ok(Err(error));
        }
        // A guest that is stopped meanwhile may have filled the queue, so that its statements run.
        let ran_sql = std::mem::replace(&mut self.ran_sql, true);
        match self.call.database.defer(statement, params).await {
            Ok(Ok(deferral)) => {
                self.has_deferred = true;
                self.ran_sql = ran_sql || deferral == Deferral::Ran;
                Ok(Ok(()))
            }
            Ok(Err(error)) => Ok(Err(error)),
            Err(error) => self.host_error(error),
        }
    }

    /// Runs the deferred statements before another one.
    async fn run_deferred(&mut self) -> wasmtime::Result<Result<(), SqlError>> {
        if !self.has_deferred {
            return Ok(Ok(()));
        }
        self.ran_sql = true;
        let database = Arc::clone(&self.call.database);
        self.settle_deferred(database.run_deferred()).await
    }

    /// Ends a call with these results. An error of its deferred statements dooms it.
    pub(in crate::guest) async fn end_call(
        &mut self,
        results: &[HandlerResult],
    ) -> wasmtime::Result<()> {
        let has_failed = self.doomed.is_some()
            || results.iter().any(Result::is_err)
            || matches!(&self.response, Some(response) if !response.is_success());
        if !self.has_deferred || has_failed {
            return Ok(());
        }
        self.ran_sql = true;
        let database = Arc::clone(&self.call.database);
        if let Err(error) = self.settle_deferred(database.end_call()).await? {
            let why = format!("a deferred statement failed: {error}");
            self.statement_failed(error);
            self.doom(FailureKind::Retry, FailureCode::Sql, &why);
        }
        Ok(())
    }

    /// Records a run of the deferred statements, or plays it back.
    async fn settle_deferred(
        &mut self,
        running: impl Future<Output = DatabaseResult<()>>,
    ) -> wasmtime::Result<Result<(), SqlError>> {
        self.has_deferred = false;
        match self.call.recorder.begin_call(0, || HostCall::RunDeferred)? {
            Some(HostResult::Nothing) => return Ok(Ok(())),
            Some(HostResult::Refused(error)) => return Ok(Err(error)),
            Some(_) => return self.call.recorder.mismatch(),
            None => {}
        }
        let result = match running.await {
            Ok(result) => result,
            Err(error) => return self.host_error(error),
        };
        self.call.recorder.finish_call(0, || {
            result
                .clone()
                .map_or_else(HostResult::Refused, |()| HostResult::Nothing)
        });
        Ok(result)
    }

    /// Converts an error for the guest. Dooms the delivery if the transaction does not survive the
    /// error.
    fn statement_failed(&mut self, error: SqlError) -> sql::Error {
        let kind = match &error {
            SqlError::Conflict(_) => FailureKind::Conflict,
            _ => FailureKind::Retry,
        };
        let code = match &error {
            SqlError::ConstraintViolation(_) => FailureCode::ConstraintViolation,
            SqlError::Timeout => FailureCode::Timeout,
            SqlError::Conflict(_) => FailureCode::Conflict,
            _ => FailureCode::Sql,
        };
        let dooms = !matches!(
            error,
            SqlError::NotAllowed(_)
                | SqlError::InvalidParameter(_)
                | SqlError::TransactionFailed(_)
        );
        if dooms {
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
        self.check_deadline()?;
        if let Err(error) = self.run_deferred().await? {
            return Ok(Err(self.statement_failed(error)));
        }
        let params: Vec<Value> = params.into_iter().map(value_from_wit).collect();
        let call = || HostCall::Query {
            statement: statement.clone(),
            params: params.clone(),
        };
        let result = match self
            .call
            .recorder
            .begin_call(statement_size(&statement, &params), call)?
        {
            Some(HostResult::Rows(rows)) => Ok(rows),
            Some(HostResult::Refused(error)) => Err(error),
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                let result = self.run_query(statement, params).await?;
                let size = result.as_ref().map_or(0, Rows::size);
                self.call.recorder.finish_call(size, || {
                    result
                        .clone()
                        .map_or_else(HostResult::Refused, HostResult::Rows)
                });
                result
            }
        };
        Ok(result
            .map(wit_rows)
            .map_err(|error| self.statement_failed(error)))
    }

    async fn execute(
        &mut self,
        statement: String,
        params: Vec<sql::Value>,
    ) -> wasmtime::Result<Result<u64, sql::Error>> {
        self.check_deadline()?;
        if let Err(error) = self.run_deferred().await? {
            return Ok(Err(self.statement_failed(error)));
        }
        let params: Vec<Value> = params.into_iter().map(value_from_wit).collect();
        let call = || HostCall::Execute {
            statement: statement.clone(),
            params: params.clone(),
        };
        let result = match self
            .call
            .recorder
            .begin_call(statement_size(&statement, &params), call)?
        {
            Some(HostResult::Changed(rows)) => Ok(rows),
            Some(HostResult::Refused(error)) => Err(error),
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                let result = self.run_execute(statement, params).await?;
                self.call.recorder.finish_call(0, || {
                    result
                        .clone()
                        .map_or_else(HostResult::Refused, HostResult::Changed)
                });
                result
            }
        };
        Ok(result.map_err(|error| self.statement_failed(error)))
    }

    async fn defer(
        &mut self,
        statement: String,
        params: Vec<sql::Value>,
    ) -> wasmtime::Result<Result<(), sql::Error>> {
        self.check_deadline()?;
        let params: Vec<Value> = params.into_iter().map(value_from_wit).collect();
        let call = || HostCall::Defer {
            statement: statement.clone(),
            params: params.clone(),
        };
        let result = match self
            .call
            .recorder
            .begin_call(statement_size(&statement, &params), call)?
        {
            Some(HostResult::Nothing) => {
                self.has_deferred = true;
                Ok(())
            }
            Some(HostResult::Refused(error)) => Err(error),
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                let result = self.queue(statement, params).await?;
                self.call.recorder.finish_call(0, || {
                    result
                        .clone()
                        .map_or_else(HostResult::Refused, |()| HostResult::Nothing)
                });
                result
            }
        };
        Ok(result.map_err(|error| self.statement_failed(error)))
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
    sql::RowSet {
        columns: rows.columns,
        rows: rows.rows.into_iter().map(row).collect(),
    }
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
