//! Keyed state: read through the transaction, changed in the host until the commit.

use bytes::Bytes;

use super::CHANGES_NOTHING;
use crate::guest::bindings::oncely::worker::state;
use crate::guest::call::CallState;
use crate::guest::record::{Asked, Saw};
use crate::message::EVENT_ID_MAX;
use crate::state::StateEntry;

impl CallState {
    /// The version of `key` before it is changed, or what is wrong with the change.
    async fn before(
        &mut self,
        key: &str,
        value: &[u8],
        asked: impl FnOnce() -> Asked,
    ) -> wasmtime::Result<Result<Option<u64>, state::Error>> {
        self.in_time()?;
        if !self.may_write() {
            return Ok(Err(state::Error::Other(CHANGES_NOTHING.to_owned())));
        }
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
        self.in_time()?;
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
