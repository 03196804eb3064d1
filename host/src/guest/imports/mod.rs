//! Imports of a guest: invocation and log here, each other one in its own file. The interfaces of
//! other hosts, `keyvalue` and `messaging`, are layers over state and outbox.
//!
//! An error of the host ends the call with a trap that the guest cannot catch. An error that dooms
//! the delivery is returned to the guest and also recorded. A guest that ignores the error cannot
//! prevent the failure.

use std::time::Instant;

use wasmtime::Trap;
use wasmtime::component::HasData;

use super::bindings::oncely::worker::{invocation, types};
use super::bindings::wasi::logging::logging;
use super::failure::{CallFailure, FailureKind};
use super::record::{HostCall, HostResult};
use super::state::CallState;
use crate::model::failure_code::FailureCode;
use crate::model::message::{self, Message};
use crate::model::units;

mod cache;
mod config;
mod keyvalue;
pub(super) mod messaging;
mod nats;
mod outbox;
mod sql;
mod state;

/// Error for a read-only request that tries to change something.
const READ_ONLY_REQUEST: &str = "a GET, HEAD or OPTIONS request is read-only";

/// Access of async functions to the state of their call.
pub(super) struct AsyncHost;

impl HasData for AsyncHost {
    type Data<'a> = &'a mut CallState;
}

impl CallState {
    /// Dooms the delivery. The first failure wins.
    fn doom(&mut self, kind: FailureKind, code: FailureCode, why: &str) {
        self.doomed
            .get_or_insert_with(|| CallFailure::new(kind, code, why));
    }

    /// Ends the call after its deadline. The time of host calls counts as time of the guest.
    ///
    /// # Errors
    /// The deadline has passed.
    fn check_deadline(&self) -> wasmtime::Result<()> {
        if Instant::now() < self.deadline {
            Ok(())
        } else {
            Err(Trap::Interrupt.into())
        }
    }

    /// Ends the call because of an error of the host. The first error wins.
    fn host_error<T>(&mut self, error: anyhow::Error) -> wasmtime::Result<T> {
        self.host_error.get_or_insert(error);
        Err(wasmtime::Error::msg("the host ended the call"))
    }
}

impl types::Host for CallState {}

impl invocation::Host for CallState {
    async fn id(&mut self) -> wasmtime::Result<String> {
        if let Some(id) = self
            .call
            .request
            .as_ref()
            .and_then(|request| request.id.clone())
        {
            return Ok(id);
        }
        let event_id = self.message().map(|message| message.event_id.as_str());
        Ok(format!(
            "{}:{}",
            self.call.worker.name,
            event_id.unwrap_or_default()
        ))
    }

    async fn worker(&mut self) -> wasmtime::Result<String> {
        Ok(self.call.worker.name.clone())
    }

    async fn version(&mut self) -> wasmtime::Result<u32> {
        Ok(self.call.version)
    }

    async fn attempt(&mut self) -> wasmtime::Result<u32> {
        self.call.recorder.inputs.has_read_attempt = true;
        Ok(self.call.attempt)
    }

    async fn max_attempts(&mut self) -> wasmtime::Result<u32> {
        let before = self.message().map_or(0, Message::attempts_before);
        Ok(before.saturating_add(self.call.worker.retry.attempts))
    }

    async fn now(&mut self) -> wasmtime::Result<u64> {
        self.call.recorder.inputs.has_read_now = true;
        Ok(u64::try_from(self.call.now.as_microsecond()).unwrap_or_default())
    }

    async fn remaining(&mut self) -> wasmtime::Result<u64> {
        match self.call.recorder.begin_call(0, || HostCall::Remaining)? {
            Some(HostResult::Number(left)) => Ok(left),
            Some(_) => self.call.recorder.mismatch(),
            None => {
                let left = self.deadline.saturating_duration_since(Instant::now());
                let left = units::milliseconds(left);
                self.call
                    .recorder
                    .finish_call(0, || HostResult::Number(left));
                Ok(left)
            }
        }
    }

    async fn traceparent(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self
            .message()
            .and_then(|message| message.header("traceparent"))
            .filter(|parent| message::is_traceparent(parent))
            .map(str::to_owned))
    }
}

impl logging::Host for CallState {
    async fn log(
        &mut self,
        level: logging::Level,
        context: String,
        message: String,
    ) -> wasmtime::Result<()> {
        self.check_deadline()?;
        let level = match level {
            logging::Level::Trace => "trace",
            logging::Level::Debug => "debug",
            logging::Level::Info => "info",
            logging::Level::Warn => "warn",
            logging::Level::Error => "error",
            logging::Level::Critical => "critical",
        };
        self.logs.append_line(level, &context, &message);
        Ok(())
    }
}
