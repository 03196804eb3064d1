//! Clocks, random numbers and pollables of WASI: the imports whose results come from outside.
//!
//! They replace those of wasmtime-wasi, so that their results are recorded and can be replayed.

use std::sync::OnceLock;
use std::time::SystemTime;

use bytes::Bytes;
use rand::RngCore;
use sha2::{Digest, Sha256};
use wasmtime::Result;
use wasmtime::component::{HasSelf, Linker, Resource};
use wasmtime_wasi::WasiView;
use wasmtime_wasi::clocks::WasiClocksView;
use wasmtime_wasi::p2::DynPollable;
use wasmtime_wasi::p2::bindings::clocks::{monotonic_clock, wall_clock};
use wasmtime_wasi::p2::bindings::io::poll;
use wasmtime_wasi::p2::bindings::random::{insecure, insecure_seed, random};

use super::record::{HostCall, HostResult};
use super::state::CallState;

/// Maximum number of random bytes of one call.
const RANDOM_MAX: u64 = 64 << 10;

/// Resolution of the clocks, in nanoseconds. Equal on every machine.
const TICK: u32 = 1;

/// Links these imports. Must run after all other imports are linked, because it shadows some of
/// them.
pub(super) fn add_to_linker(linker: &mut Linker<CallState>) -> Result<()> {
    linker.allow_shadowing(true);
    wall_clock::add_to_linker::<_, HasSelf<_>>(linker, |state| state)?;
    monotonic_clock::add_to_linker::<_, HasSelf<_>>(linker, |state| state)?;
    random::add_to_linker::<_, HasSelf<_>>(linker, |state| state)?;
    insecure::add_to_linker::<_, HasSelf<_>>(linker, |state| state)?;
    insecure_seed::add_to_linker::<_, HasSelf<_>>(linker, |state| state)?;
    poll::add_to_linker::<_, HasSelf<_>>(linker, |state| state)?;
    linker.allow_shadowing(false);
    Ok(())
}

// Clocks.

impl wall_clock::Host for CallState {
    fn now(&mut self) -> Result<wall_clock::Datetime> {
        let recorder = &mut self.call.recorder;
        match recorder.begin_call(0, || HostCall::WallClock)? {
            Some(HostResult::Time {
                seconds,
                nanoseconds,
            }) => Ok(wall_clock::Datetime {
                seconds,
                nanoseconds,
            }),
            Some(_) => recorder.mismatch(),
            None => {
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default();
                let (seconds, nanoseconds) = (now.as_secs(), now.subsec_nanos());
                recorder.finish_call(0, || HostResult::Time {
                    seconds,
                    nanoseconds,
                });
                Ok(wall_clock::Datetime {
                    seconds,
                    nanoseconds,
                })
            }
        }
    }

    fn resolution(&mut self) -> Result<wall_clock::Datetime> {
        Ok(wall_clock::Datetime {
            seconds: 0,
            nanoseconds: TICK,
        })
    }
}

impl CallState {
    /// Nanoseconds since the instance was created.
    pub(super) fn elapsed(&self) -> u64 {
        u64::try_from(self.instantiated_at.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl monotonic_clock::Host for CallState {
    fn now(&mut self) -> Result<u64> {
        let elapsed = self.elapsed();
        let recorder = &mut self.call.recorder;
        match recorder.begin_call(0, || HostCall::MonotonicClock)? {
            Some(HostResult::Number(now)) => Ok(now),
            Some(_) => recorder.mismatch(),
            None => {
                recorder.finish_call(0, || HostResult::Number(elapsed));
                Ok(elapsed)
            }
        }
    }

    fn resolution(&mut self) -> Result<u64> {
        Ok(TICK.into())
    }

    fn subscribe_instant(&mut self, when: u64) -> Result<Resource<DynPollable>> {
        let left = when.saturating_sub(self.elapsed());
        self.subscribe_duration(left)
    }

    fn subscribe_duration(&mut self, duration: u64) -> Result<Resource<DynPollable>> {
        monotonic_clock::Host::subscribe_duration(&mut self.clocks(), duration)
    }
}

// Random numbers.

impl CallState {
    fn random(&mut self, bytes: u64) -> Result<Bytes> {
        if bytes > RANDOM_MAX {
            wasmtime::bail!(
                "{bytes} random bytes are too many for one call; {RANDOM_MAX} are allowed"
            );
        }
        let recorder = &mut self.call.recorder;
        match recorder.begin_call(0, || HostCall::Random { bytes })? {
            Some(HostResult::Bytes(random)) if random.len() as u64 == bytes => Ok(random),
            Some(_) => recorder.mismatch(),
            None => {
                let mut random = vec![0; usize::try_from(bytes)?];
                rand::rng().fill_bytes(&mut random);
                let random = Bytes::from(random);
                recorder.finish_call(random.len(), || HostResult::Bytes(random.clone()));
                Ok(random)
            }
        }
    }

    fn random_number(&mut self) -> Result<u64> {
        let random = self.random(8)?;
        Ok(random
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

impl random::Host for CallState {
    fn get_random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        Ok(self.random(len)?.into())
    }

    fn get_random_u64(&mut self) -> Result<u64> {
        self.random_number()
    }
}

impl insecure::Host for CallState {
    fn get_insecure_random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        Ok(self.random(len)?.into())
    }

    fn get_insecure_random_u64(&mut self) -> Result<u64> {
        self.random_number()
    }
}

impl insecure_seed::Host for CallState {
    /// The seed that language runtimes use for their hash maps. It is the same for every attempt at
    /// an event on this host, and publishers cannot guess it.
    fn insecure_seed(&mut self) -> Result<(u64, u64)> {
        if let Some(seed) = self.call.recorder.inputs.hash_seed {
            return Ok(seed);
        }
        let event_id = self
            .message()
            .map(|message| message.event_id.as_str())
            .unwrap_or_default();
        let seed = derive_hash_seed(event_id);
        self.call.recorder.inputs.hash_seed = Some(seed);
        Ok(seed)
    }
}

fn derive_hash_seed(event_id: &str) -> (u64, u64) {
    static KEY: OnceLock<[u8; 32]> = OnceLock::new();
    let mut hasher = Sha256::new();
    hasher.update(KEY.get_or_init(rand::random));
    hasher.update(event_id);
    let digest = hasher.finalize();
    let half = |bytes: &[u8]| {
        bytes
            .iter()
            .take(8)
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let (low, high) = digest.split_at(8);
    (half(low), half(high))
}

// Pollables.

impl poll::Host for CallState {
    async fn poll(&mut self, pollables: Vec<Resource<DynPollable>>) -> Result<Vec<u32>> {
        match self.call.recorder.begin_call(0, || HostCall::Poll {
            pollables: pollables.len(),
        })? {
            Some(HostResult::Ready(ready)) => Ok(ready),
            Some(_) => self.call.recorder.mismatch(),
            None => {
                let ready = poll::Host::poll(self.ctx().table, pollables).await?;
                self.call
                    .recorder
                    .finish_call(4 * ready.len(), || HostResult::Ready(ready.clone()));
                Ok(ready)
            }
        }
    }
}

impl poll::HostPollable for CallState {
    async fn ready(&mut self, pollable: Resource<DynPollable>) -> Result<bool> {
        match self.call.recorder.begin_call(0, || HostCall::IsReady)? {
            Some(HostResult::Number(ready)) => Ok(ready > 0),
            Some(_) => self.call.recorder.mismatch(),
            None => {
                let ready = poll::HostPollable::ready(self.ctx().table, pollable).await?;
                self.call
                    .recorder
                    .finish_call(0, || HostResult::Number(ready.into()));
                Ok(ready)
            }
        }
    }

    /// A playback does not wait.
    async fn block(&mut self, pollable: Resource<DynPollable>) -> Result<()> {
        if self
            .call
            .recorder
            .begin_call(0, || HostCall::Wait)?
            .is_none()
        {
            poll::HostPollable::block(self.ctx().table, pollable).await?;
            self.call.recorder.finish_call(0, || HostResult::Nothing);
        }
        Ok(())
    }

    fn drop(&mut self, pollable: Resource<DynPollable>) -> Result<()> {
        poll::HostPollable::drop(self.ctx().table, pollable)
    }
}
