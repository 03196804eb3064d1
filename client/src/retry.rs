//! One operation from its first try to its end.

use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::budget::Budget;
use crate::error::{Error, Failure, GaveUp, Refused, Why};
use crate::judge::{Verdict, may_have_run, verdict};
use crate::key::Key;
use crate::policy::Policy;
use crate::{Answer, Method};

/// What decides about retries; a client and its clones have one.
pub(crate) struct Retrier {
    pub policy: Policy,
    pub budget: Mutex<Budget>,
    pub random: Box<dyn Fn() -> f64 + Send + Sync>,
}

/// What a caller wants done once.
pub(crate) struct Operation {
    pub method: Method,
    pub path: String,
    pub key: Option<Key>,
    /// Instead of the policy's.
    pub deadline: Option<Duration>,
}

impl Retrier {
    /// Tries until there is an answer that will not change, or no further try is safe, affordable or in time.
    pub async fn run<T>(&self, operation: &Operation, once: impl Fn() -> T) -> Result<Answer, Error>
    where
        T: Future<Output = Result<Answer, Failure>>,
    {
        let begun = Instant::now();
        let deadline = operation.deadline.unwrap_or(self.policy.deadline);
        let left = || deadline.saturating_sub(begun.elapsed());
        let mut tries = 0;
        let mut unclear = false;
        self.budget().earn(begun);
        loop {
            tries += 1;
            let limit = self.policy.try_timeout.min(left());
            let outcome = timeout(limit, once()).await.unwrap_or(Err(Failure::TimedOut(limit)));
            let failure = operation.settle(outcome, tries, unclear)?;
            let failure = match failure {
                Settled::Done(answer) => return Ok(answer),
                Settled::Failed(failure) => failure,
            };
            unclear |= operation.has_effects() && may_have_run(&failure);
            match self.next(operation, &failure, tries, deadline, left()) {
                Ok(wait) => sleep(wait).await,
                Err(why) => return Err(operation.give_up(why, tries, failure, unclear)),
            }
        }
    }

    /// How long to wait before the next try, or why there is none.
    fn next(
        &self,
        operation: &Operation,
        failure: &Failure,
        tries: u32,
        deadline: Duration,
        left: Duration,
    ) -> Result<Duration, Why> {
        if !operation.may_be_repeated() {
            return Err(Why::NotSafe);
        }
        let asked = match failure {
            Failure::Answer(answer) => answer.retry_after(),
            Failure::TimedOut(_) | Failure::Broken(_) => None,
        };
        let wait = self.policy.wait(tries, asked, left, (self.random)()).ok_or(Why::Deadline(deadline))?;
        if self.budget().take(Instant::now()) { Ok(wait) } else { Err(Why::Budget) }
    }

    /// Counting cannot leave it half-changed, so a panic elsewhere is no reason to stop counting.
    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Settled {
    Done(Answer),
    Failed(Failure),
}

impl Operation {
    /// Ends the operation if the outcome of a try ends it.
    fn settle(&self, outcome: Result<Answer, Failure>, tries: u32, unclear: bool) -> Result<Settled, Error> {
        let mut answer = match outcome {
            Ok(answer) => answer,
            Err(Failure::Broken(error)) if error.is_builder() => return Err(Error::Invalid(error.to_string())),
            Err(failure) => return Ok(Settled::Failed(failure)),
        };
        answer.tries = tries;
        answer.key = self.key_text();
        match verdict(&answer, self.key.as_ref()) {
            Verdict::Done => Ok(Settled::Done(answer)),
            Verdict::Again => Ok(Settled::Failed(Failure::Answer(Box::new(answer)))),
            Verdict::Refused => {
                // What is stored under the key is what became of the earlier tries, too.
                let unclear = unclear && !answer.replayed;
                Err(Error::Refused(Box::new(Refused { operation: self.name(), answer, unclear })))
            }
            // The key is another operation's, so none of these tries was carried out.
            Verdict::KeyReused => {
                Err(Error::KeyReused(Box::new(Refused { operation: self.name(), answer, unclear: false })))
            }
        }
    }

    fn give_up(&self, why: Why, tries: u32, last: Failure, unclear: bool) -> Error {
        let (operation, key) = (self.name(), self.key_text());
        Error::GaveUp(Box::new(GaveUp { operation, why, tries, last, key, unclear }))
    }

    fn may_be_repeated(&self) -> bool {
        self.key.is_some() || self.method.is_idempotent()
    }

    fn has_effects(&self) -> bool {
        !self.method.is_safe()
    }

    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn key_text(&self) -> Option<String> {
        self.key.as_ref().map(|key| key.text().to_owned())
    }
}
