//! WASI 0.3: the same rights as WASI 0.2 in [`super::wasi`].
//!
//! Clocks and random numbers replace those of wasmtime-wasi, so that their results are recorded and
//! can be replayed.

use std::time::Duration;

use wasmtime::Result;
use wasmtime::component::{Accessor, Linker};
use wasmtime_wasi::p2::bindings::{clocks as clocks2, random as random2};
use wasmtime_wasi::p3::bindings::clocks::{monotonic_clock, system_clock, types};
use wasmtime_wasi::p3::bindings::random::{insecure, insecure_seed, random};

use super::bindings::nats;
use super::imports::AsyncHost;
use super::record::{HostCall, HostResult};
use super::state::CallState;

/// Links WASI 0.3 and its HTTP, and other interfaces with async functions.
pub(super) fn add_to_linker(linker: &mut Linker<CallState>) -> Result<()> {
    wasmtime_wasi::p3::add_to_linker(linker)?;
    wasmtime_wasi_http::p3::add_to_linker(linker)?;
    linker.allow_shadowing(true);
    types::add_to_linker::<_, AsyncHost>(linker, |state| state)?;
    system_clock::add_to_linker::<_, AsyncHost>(linker, |state| state)?;
    monotonic_clock::add_to_linker::<_, AsyncHost>(linker, |state| state)?;
    random::add_to_linker::<_, AsyncHost>(linker, |state| state)?;
    insecure::add_to_linker::<_, AsyncHost>(linker, |state| state)?;
    insecure_seed::add_to_linker::<_, AsyncHost>(linker, |state| state)?;
    linker.allow_shadowing(false);
    nats::Nats::add_to_linker::<_, AsyncHost>(linker, |state| state)
}

impl types::Host for CallState {}

impl system_clock::Host for CallState {
    fn now(&mut self) -> Result<system_clock::Instant> {
        let now = clocks2::wall_clock::Host::now(self)?;
        Ok(system_clock::Instant {
            seconds: i64::try_from(now.seconds)?,
            nanoseconds: now.nanoseconds,
        })
    }

    fn get_resolution(&mut self) -> Result<types::Duration> {
        let tick = clocks2::wall_clock::Host::resolution(self)?;
        Ok(tick.nanoseconds.into())
    }
}

impl monotonic_clock::Host for CallState {
    fn now(&mut self) -> Result<monotonic_clock::Mark> {
        clocks2::monotonic_clock::Host::now(self)
    }

    fn get_resolution(&mut self) -> Result<types::Duration> {
        clocks2::monotonic_clock::Host::resolution(self)
    }
}

impl<U: Send> monotonic_clock::HostWithStore<U> for AsyncHost {
    async fn wait_until(accessor: &Accessor<U, Self>, when: monotonic_clock::Mark) -> Result<()> {
        let left = accessor.with(|mut state| when.saturating_sub(state.get().elapsed()));
        wait(accessor, left).await
    }

    async fn wait_for(accessor: &Accessor<U, Self>, duration: types::Duration) -> Result<()> {
        wait(accessor, duration).await
    }
}

/// Waits for some nanoseconds. A playback does not wait.
async fn wait<U: Send>(accessor: &Accessor<U, AsyncHost>, duration: u64) -> Result<()> {
    let recorded = accessor.with(|mut state| -> Result<Option<HostResult>> {
        let recorder = &mut state.get().call.recorder;
        let recorded = recorder.begin_call(0, || HostCall::Wait)?;
        // Other calls may be made during the wait, and its result is known.
        recorder.finish_call(0, || HostResult::Nothing);
        Ok(recorded)
    })?;
    if recorded.is_none() {
        tokio::time::sleep(Duration::from_nanos(duration)).await;
    }
    Ok(())
}

impl random::Host for CallState {
    fn get_random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        random2::random::Host::get_random_bytes(self, len)
    }

    fn get_random_u64(&mut self) -> Result<u64> {
        random2::random::Host::get_random_u64(self)
    }
}

impl insecure::Host for CallState {
    fn get_insecure_random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        random2::insecure::Host::get_insecure_random_bytes(self, len)
    }

    fn get_insecure_random_u64(&mut self) -> Result<u64> {
        random2::insecure::Host::get_insecure_random_u64(self)
    }
}

impl insecure_seed::Host for CallState {
    fn get_insecure_seed(&mut self) -> Result<(u64, u64)> {
        random2::insecure_seed::Host::insecure_seed(self)
    }
}
