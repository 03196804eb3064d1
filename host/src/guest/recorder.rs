//! The host calls of a guest and their results: a recorder, or a playback from a record.
//!
//! Recording costs a copy of what goes in and out, up to [`RECORD_MAX`]; it is written down only when the call fails.

use std::collections::VecDeque;

use super::call::ReplayProgress;
use super::record::{AttemptInputs, HostCall, HostResult, RECORD_MAX, Record, Step};

/// What one thing costs besides its text.
const STEP_SIZE: usize = 64;

/// The recorder of one call.
#[derive(Debug, Default)]
pub struct Recorder {
    pub(super) steps: Vec<Step>,
    pub(super) inputs: AttemptInputs,
    /// How much of [`RECORD_MAX`] is used.
    size: usize,
    pub(super) truncated: bool,
    playback: Option<Playback>,
}

/// What is left of a record that a call is answered from.
#[derive(Debug)]
struct Playback {
    remaining: VecDeque<Step>,
    truncated: bool,
    ended: Option<PlaybackEnd>,
}

/// Why a playback ended before the guest did.
#[derive(Debug, Clone)]
pub enum PlaybackEnd {
    /// The guest made another call than the record has; none when the record has nothing more.
    Diverged {
        expected: Option<Box<HostCall>>,
        instead: Box<HostCall>,
    },
    /// Here the recorded call was stopped, too.
    Stopped,
    /// There was no room for more in the record.
    Truncated,
    /// The answer does not fit the call: somebody changed the record.
    Mismatched(Box<HostCall>),
}

impl Recorder {
    /// A recorder that answers from a record.
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

    pub(super) fn is_playback(&self) -> bool {
        self.playback.is_some()
    }

    /// Notes what the guest asks, which is of about this size. A playback says what it sees, or ends the call; None: find out,
    /// and then tell with [`Recorder::finish_call`].
    pub fn begin_call(
        &mut self,
        size: usize,
        call: impl FnOnce() -> HostCall,
    ) -> wasmtime::Result<Option<HostResult>> {
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
                    Err(wasmtime::Error::msg("the playback ends here"))
                }
            },
        }
    }

    /// Notes what the guest sees.
    pub fn finish_call(&mut self, size: usize, result: impl FnOnce() -> HostResult) {
        if !self.is_playback()
            && self.reserve(size)
            && let Some(last) = self.steps.last_mut()
        {
            last.result = Some(result());
        }
    }

    /// Notes what the guest asks where the answer follows from the call itself.
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

    /// The answer of the record does not fit: ends the call.
    pub fn mismatch<T>(&mut self) -> wasmtime::Result<T> {
        if let (Some(playback), Some(step)) = (self.playback.as_mut(), self.steps.last()) {
            playback
                .ended
                .get_or_insert(PlaybackEnd::Mismatched(Box::new(step.call.clone())));
        }
        Err(wasmtime::Error::msg("the playback ends here"))
    }

    /// Whether there is room for so much more. Once there was not, nothing more is kept: a record has no gaps.
    fn reserve(&mut self, size: usize) -> bool {
        self.size += size;
        self.truncated |= self.size > RECORD_MAX;
        !self.truncated
    }

    /// How far a playback went.
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
