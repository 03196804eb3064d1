//! Recorder of host calls and their results, and the playback of a record.
//!
//! Recording copies the arguments and results of each host call, up to [`RECORD_MAX`] bytes. The
//! record is stored only when the call fails.

use std::collections::VecDeque;

use super::record::{AttemptInputs, HostCall, HostResult, RECORD_MAX, Record, Step};

/// Bytes that a step counts for besides its arguments and result.
const STEP_SIZE: usize = 64;

/// The error of a pretended crash.
const CRASH: &str = "the host crashed";

/// The recorder of one call.
#[derive(Debug, Default)]
pub struct Recorder {
    pub(super) steps: Vec<Step>,
    pub(super) inputs: AttemptInputs,
    /// Used part of [`RECORD_MAX`], in bytes.
    size: usize,
    pub(super) truncated: bool,
    playback: Option<Playback>,
    /// The number of calls so far.
    calls: u64,
    /// The call, counted from 1, at which the host pretends to crash.
    crash_at: Option<u64>,
}

/// The steps of a record that are still to be played back.
#[derive(Debug)]
struct Playback {
    remaining: VecDeque<Step>,
    truncated: bool,
    ended: Option<PlaybackEnd>,
}

/// Why a playback ended before the guest returned.
#[derive(Debug, Clone)]
pub enum PlaybackEnd {
    /// The guest made a different call. `expected` is `None` when the record has no more steps.
    Diverged {
        /// Recorded call of this step.
        expected: Option<Box<HostCall>>,
        /// Call that the guest made.
        instead: Box<HostCall>,
    },
    /// The recorded call was stopped at this step.
    Stopped,
    /// The record was truncated at this step.
    Truncated,
    /// The recorded result does not fit its call, so the record was edited.
    Mismatched(Box<HostCall>),
}

/// How far a replay went.
pub struct ReplayProgress {
    /// Number of calls that equal those of the record.
    pub steps: usize,
    /// The reason why the playback ended before the guest returned.
    pub ended: Option<PlaybackEnd>,
    /// The first recorded call that the guest did not make.
    pub next: Option<HostCall>,
}

impl Recorder {
    /// A recorder that plays back a record.
    pub fn playback(record: &Record) -> Self {
        let playback = Playback {
            remaining: record.steps.clone().into(),
            truncated: record.truncated,
            ended: None,
        };
        Recorder {
            inputs: record.inputs.clone(),
            playback: Some(playback),
            ..Recorder::default()
        }
    }

    /// A recorder that ends the guest at a host call, counted from 1, as a crash would.
    pub fn crashing_at(call: u64) -> Self {
        Recorder {
            crash_at: Some(call),
            ..Recorder::default()
        }
    }

    /// The number of host calls so far.
    pub(super) fn calls(&self) -> u64 {
        self.calls
    }

    pub(super) fn is_playback(&self) -> bool {
        self.playback.is_some()
    }

    /// Begins a host call with arguments of about `size` bytes.
    ///
    /// A playback returns the recorded result. `None` means that the host has to make the call, and
    /// then to pass its result to [`Recorder::finish_call`].
    ///
    /// # Errors
    /// The playback has ended. The error stops the guest.
    pub fn begin_call(
        &mut self,
        size: usize,
        call: impl FnOnce() -> HostCall,
    ) -> wasmtime::Result<Option<HostResult>> {
        self.calls += 1;
        if self.crash_at == Some(self.calls) {
            return Err(wasmtime::Error::msg(CRASH));
        }
        match self.playback.as_mut() {
            None => {
                if self.reserve(STEP_SIZE + size) {
                    self.steps.push(Step {
                        call: call(),
                        result: None,
                    });
                }
                Ok(None)
            }
            Some(playback) => match playback.next_step(call()) {
                Ok(step) => {
                    let result = step.result.clone();
                    self.steps.push(step);
                    Ok(result)
                }
                Err(ended) => {
                    playback.ended.get_or_insert(ended);
                    Err(wasmtime::Error::msg("the playback has ended"))
                }
            },
        }
    }

    /// Records the result of the last host call, of about `size` bytes.
    pub fn finish_call(&mut self, size: usize, result: impl FnOnce() -> HostResult) {
        if !self.is_playback()
            && self.reserve(size)
            && let Some(last) = self.steps.last_mut()
        {
            last.result = Some(result());
        }
    }

    /// Records a host call whose result follows from its arguments.
    ///
    /// # Errors
    /// The playback has ended. The error stops the guest.
    pub fn record_call(
        &mut self,
        size: usize,
        call: impl FnOnce() -> HostCall,
    ) -> wasmtime::Result<()> {
        if self.begin_call(size, call)?.is_none() {
            self.finish_call(0, || HostResult::Nothing);
        }
        Ok(())
    }

    /// Ends a playback whose recorded result does not fit the call.
    pub fn mismatch<T>(&mut self) -> wasmtime::Result<T> {
        if let (Some(playback), Some(step)) = (self.playback.as_mut(), self.steps.last()) {
            playback
                .ended
                .get_or_insert(PlaybackEnd::Mismatched(Box::new(step.call.clone())));
        }
        Err(wasmtime::Error::msg("the playback has ended"))
    }

    /// Reserves `size` bytes of the record. After the first refusal nothing more is kept, because a
    /// record has no gaps.
    fn reserve(&mut self, size: usize) -> bool {
        self.size += size;
        self.truncated |= self.size > RECORD_MAX;
        !self.truncated
    }

    /// How far the playback came.
    pub(super) fn into_progress(self) -> ReplayProgress {
        let (ended, next) = match self.playback {
            Some(mut playback) => (
                playback.ended,
                playback.remaining.pop_front().map(|step| step.call),
            ),
            None => (None, None),
        };
        ReplayProgress {
            steps: self.steps.len(),
            ended,
            next,
        }
    }
}

impl Playback {
    fn next_step(&mut self, call: HostCall) -> Result<Step, PlaybackEnd> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        let diverged = |expected: Option<HostCall>, instead| PlaybackEnd::Diverged {
            expected: expected.map(Box::new),
            instead: Box::new(instead),
        };
        match self.remaining.pop_front() {
            None if self.truncated => Err(PlaybackEnd::Truncated),
            None => Err(diverged(None, call)),
            Some(step) if !step.call.is_same(&call) => Err(diverged(Some(step.call), call)),
            Some(Step { result: None, .. }) if self.truncated => Err(PlaybackEnd::Truncated),
            Some(Step { result: None, .. }) => Err(PlaybackEnd::Stopped),
            Some(step) => Ok(step),
        }
    }
}
