//! Keyed state: read in the transaction, and buffered in the host until the commit.

use bytes::Bytes;

use super::READ_ONLY_REQUEST;
use crate::guest::bindings::oncely::worker::state;
use crate::guest::record::{HostCall, HostResult};
use crate::guest::state::CallState;
use crate::model::keyed_state::{StateEntry, StateSlot};
use crate::model::message::EVENT_ID_MAX;

impl CallState {
    /// Returns the version of `key` before a change, or the reason to refuse the change.
    async fn prepare_write(
        &mut self,
        key: &str,
        value: &[u8],
        call: impl FnOnce() -> HostCall,
    ) -> wasmtime::Result<Result<Option<u64>, state::Error>> {
        self.check_deadline()?;
        if !self.may_write() {
            return Ok(Err(state::Error::Other(READ_ONLY_REQUEST.to_owned())));
        }
        if let Err(error) = check_key(key).and_then(|()| self.check_value(value)) {
            return Ok(Err(error));
        }
        let (version, size) = match self
            .call
            .recorder
            .begin_call(key.len() + value.len(), call)?
        {
            Some(HostResult::PreviousEntry {
                version,
                last,
                size,
            }) => {
                // The recorded result has no previous value, because the guest cannot read it here.
                let entry = version.map(|version| StateEntry {
                    value: Bytes::new(),
                    version,
                });
                if self.call.state.slot(key).is_none() {
                    self.call.state.record_read(
                        key.to_owned(),
                        StateSlot {
                            entry,
                            version: last,
                            has_row: false,
                        },
                    );
                }
                (version, size)
            }
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                self.load(key).await?;
                let slot = self.call.state.slot(key).cloned().unwrap_or_default();
                let (version, last) =
                    (slot.entry.as_ref().map(|entry| entry.version), slot.version);
                let size = slot.entry.map_or(0, |entry| entry.value.len());
                self.call
                    .recorder
                    .finish_call(0, || HostResult::PreviousEntry {
                        version,
                        last,
                        size,
                    });
                (version, size)
            }
        };
        Ok(self.count_state(key, size, value.len()).map(|()| version))
    }

    /// Counts a key and a value against the limits of one delivery. The first use of a key counts
    /// the key and its current value. Each write counts the new value.
    ///
    /// # Errors
    /// The delivery exceeds `state_entries` or `state_entries_size`.
    fn count_state(
        &mut self,
        key: &str,
        current_size: usize,
        new_size: usize,
    ) -> Result<(), state::Error> {
        let limits = &self.call.worker.limits;
        let is_new = !self.state_usage.keys.contains(key);
        if is_new && self.state_usage.keys.len() >= limits.state_entries as usize {
            return Err(state::Error::TooLarge(format!(
                "a delivery may read and change {} keys (`state_entries` under [worker.limits])",
                limits.state_entries
            )));
        }
        if is_new {
            self.state_usage.keys.insert(key.to_owned());
            self.state_usage.bytes += key.len() + current_size;
        }
        self.state_usage.bytes += new_size;
        if self.state_usage.bytes as u64 > limits.state_entries_size {
            return Err(state::Error::TooLarge(format!(
                "the keys and values that this delivery reads and writes exceed {} bytes in total \
                 (`state_entries_size` under [worker.limits])",
                limits.state_entries_size
            )));
        }
        Ok(())
    }

    /// Reads `key` into the state of the batch, unless it was read before.
    async fn load(&mut self, key: &str) -> wasmtime::Result<()> {
        if self.call.state.slot(key).is_some() {
            return Ok(());
        }
        match self.call.database.load_state(key.to_owned()).await {
            Ok(slot) => {
                self.call.state.record_read(key.to_owned(), slot);
                Ok(())
            }
            Err(error) => self.host_error(error),
        }
    }

    fn check_value(&self, value: &[u8]) -> Result<(), state::Error> {
        let most = self.call.worker.limits.state_size;
        if value.len() as u64 > most {
            return Err(state::Error::TooLarge(format!(
                "the value has {} bytes; at most {most} are allowed (`state_size` under \
                 [worker.limits])",
                value.len()
            )));
        }
        Ok(())
    }
}

/// Whether a key can be in the state.
pub(super) fn is_valid_key(key: &str) -> bool {
    check_key(key).is_ok()
}

fn check_key(key: &str) -> Result<(), state::Error> {
    if key.is_empty() || key.len() > EVENT_ID_MAX || key.contains('\0') {
        return Err(state::Error::InvalidKey(format!(
            "a key has 1 to {EVENT_ID_MAX} bytes and no NUL"
        )));
    }
    Ok(())
}

/// The version before a change. Returns the error of a refused change to the guest.
macro_rules! version_before {
    ($self:ident, $key:expr, $value:expr, $call:expr) => {
        match $self.prepare_write($key, $value, $call).await? {
            Ok(version) => version,
            Err(error) => return Ok(Err(error)),
        }
    };
}

impl state::Host for CallState {
    async fn get(
        &mut self,
        key: String,
    ) -> wasmtime::Result<Result<Option<state::Entry>, state::Error>> {
        self.check_deadline()?;
        if let Err(error) = check_key(&key) {
            return Ok(Err(error));
        }
        let entry = match self
            .call
            .recorder
            .begin_call(key.len(), || HostCall::Get { key: key.clone() })?
        {
            Some(HostResult::Entry(entry)) => entry,
            Some(_) => return self.call.recorder.mismatch(),
            None => {
                self.load(&key).await?;
                let entry = self.call.state.get(&key).flatten().cloned();
                let size = entry.as_ref().map_or(0, |entry| entry.value.len());
                self.call
                    .recorder
                    .finish_call(size, || HostResult::Entry(entry.clone()));
                entry
            }
        };
        let size = entry.as_ref().map_or(0, |entry| entry.value.len());
        if let Err(error) = self.count_state(&key, size, 0) {
            return Ok(Err(error));
        }
        Ok(Ok(entry.map(|entry| state::Entry {
            value: entry.value.into(),
            version: entry.version,
        })))
    }

    async fn set(
        &mut self,
        key: String,
        value: Vec<u8>,
    ) -> wasmtime::Result<Result<u64, state::Error>> {
        let value = Bytes::from(value);
        version_before!(self, &key, &value, || HostCall::Set {
            key: key.clone(),
            value: value.clone()
        });
        Ok(Ok(self.call.state.set(key, value)))
    }

    async fn delete(&mut self, key: String) -> wasmtime::Result<Result<bool, state::Error>> {
        version_before!(self, &key, &[], || HostCall::Delete { key: key.clone() });
        Ok(Ok(self.call.state.delete(key)))
    }

    async fn compare_and_set(
        &mut self,
        key: String,
        expected: Option<u64>,
        value: Vec<u8>,
    ) -> wasmtime::Result<Result<u64, state::Error>> {
        let value = Bytes::from(value);
        let call = || HostCall::CompareAndSet {
            key: key.clone(),
            expected,
            value: value.clone(),
        };
        let version = version_before!(self, &key, &value, call);
        if version != expected {
            return Ok(Err(state::Error::VersionMismatch(version)));
        }
        Ok(Ok(self.call.state.set(key, value)))
    }
}
