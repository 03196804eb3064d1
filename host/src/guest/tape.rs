//! What a call asks and sees, as it goes: a tape that records, or one that answers from a record.
//!
//! Recording costs a copy of what goes in and out, up to [`RECORD_MAX`]; it is written down only when the call fails.

use std::collections::VecDeque;

use super::call::Replayed;
use super::record::{Asked, Looks, RECORD_MAX, Record, Saw, Step};

/// What one thing costs besides its text.
const STEP_SIZE: usize = 64;

/// The tape of one call.
#[derive(Debug, Default)]
pub struct Tape {
    pub(super) steps: Vec<Step>,
    pub(super) looks: Looks,
    /// How much of [`RECORD_MAX`] is used.
    size: usize,
    pub(super) cut: bool,
    replay: Option<Replay>,
}

/// What is left of a record that a call is answered from.
#[derive(Debug)]
struct Replay {
    script: VecDeque<Step>,
    cut: bool,
    ended: Option<Ended>,
}

/// Why a replay ended before the guest did.
#[derive(Debug, Clone)]
pub enum Ended {
    /// The guest asked something else than the record has; none when the record has nothing more.
    Departed { expected: Option<Box<Asked>>, instead: Box<Asked> },
    /// Here the recorded call was stopped, too.
    Stopped,
    /// There was no room for more in the record.
    Cut,
    /// The answer does not fit what was asked: somebody changed the record.
    Foreign(Box<Asked>),
}

impl Tape {
    /// A tape that answers from a record.
    pub fn replaying(record: &Record) -> Self {
        let replay = Replay { script: record.steps.clone().into(), cut: record.cut, ended: None };
        Tape { looks: record.looks.clone(), replay: Some(replay), ..Tape::default() }
    }

    pub(super) fn is_replay(&self) -> bool {
        self.replay.is_some()
    }

    /// Notes what the guest asks, which is of about this size. A replay says what it sees, or ends the call; None: find out,
    /// and then tell with [`Tape::saw`].
    pub fn ask(&mut self, size: usize, asked: impl FnOnce() -> Asked) -> wasmtime::Result<Option<Saw>> {
        match self.replay.as_mut() {
            None => {
                if self.has_room(STEP_SIZE + size) {
                    self.steps.push(Step { asked: asked(), saw: None });
                }
                Ok(None)
            }
            Some(replay) => match replay.answer(asked()) {
                Ok(step) => {
                    let saw = step.saw.clone();
                    self.steps.push(step);
                    Ok(saw)
                }
                Err(ended) => {
                    replay.ended.get_or_insert(ended);
                    Err(wasmtime::Error::msg("the replay ends here"))
                }
            },
        }
    }

    /// Notes what the guest sees.
    pub fn saw(&mut self, size: usize, saw: impl FnOnce() -> Saw) {
        if !self.is_replay()
            && self.has_room(size)
            && let Some(last) = self.steps.last_mut()
        {
            last.saw = Some(saw());
        }
    }

    /// Notes what the guest asks where the answer follows from the call itself.
    pub fn note(&mut self, size: usize, asked: impl FnOnce() -> Asked) -> wasmtime::Result<()> {
        if self.ask(size, asked)?.is_none() {
            self.saw(0, || Saw::Nothing);
        }
        Ok(())
    }

    /// The answer of the record does not fit: ends the call.
    pub fn foreign<T>(&mut self) -> wasmtime::Result<T> {
        if let (Some(replay), Some(step)) = (self.replay.as_mut(), self.steps.last()) {
            replay.ended.get_or_insert(Ended::Foreign(Box::new(step.asked.clone())));
        }
        Err(wasmtime::Error::msg("the replay ends here"))
    }

    /// Whether there is room for so much more. Once there was not, nothing more is kept: a record has no gaps.
    fn has_room(&mut self, size: usize) -> bool {
        self.size += size;
        self.cut |= self.size > RECORD_MAX;
        !self.cut
    }

    /// How far a replay went.
    pub(super) fn end(self) -> Replayed {
        let (ended, next) = match self.replay {
            Some(mut replay) => (replay.ended, replay.script.pop_front().map(|step| step.asked)),
            None => (None, None),
        };
        Replayed { steps: self.steps.len(), ended, next }
    }
}

impl Replay {
    fn answer(&mut self, asked: Asked) -> Result<Step, Ended> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        let departed = |expected: Option<Asked>, instead| Ended::Departed {
            expected: expected.map(Box::new),
            instead: Box::new(instead),
        };
        match self.script.pop_front() {
            None if self.cut => Err(Ended::Cut),
            None => Err(departed(None, asked)),
            Some(step) if !step.asked.is_same(&asked) => Err(departed(Some(step.asked), asked)),
            Some(Step { saw: None, .. }) if self.cut => Err(Ended::Cut),
            Some(Step { saw: None, .. }) => Err(Ended::Stopped),
            Some(step) => Ok(step),
        }
    }
}
