//! Runs one operation from its first try to its last.

use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::budget::Budget;
use crate::error::{Error, Failure, GaveUp, GiveUpReason, Refused};
use crate::key::Key;
use crate::policy::Policy;
use crate::verdict::{Verdict, may_have_run, verdict};
use crate::{Method, Response};

/// Decides about retries. A client and its clones share one.
pub(crate) struct Retrier {
    pub policy: Policy,
    pub budget: Mutex<Budget>,
    pub random: Box<dyn Fn() -> f64 + Send + Sync>,
}

/// An operation of the caller, to be carried out once.
pub(crate) struct Operation {
    pub method: Method,
    pub path: String,
    pub key: Option<Key>,
    /// In place of the deadline of the policy.
    pub deadline: Option<Duration>,
}

impl Retrier {
    /// Tries until a response is final, or until another try is unsafe, over budget or past the
    /// deadline.
    pub async fn run<T>(
        &self,
        operation: &Operation,
        once: impl Fn() -> T,
    ) -> Result<Response, Error>
    where
        T: Future<Output = Result<Response, Failure>>,
    {
        let started_at = Instant::now();
        let deadline = operation.deadline.unwrap_or(self.policy.deadline);
        let left = || deadline.saturating_sub(started_at.elapsed());
        let mut tries = 0;
        let mut unclear = false;
        self.budget().deposit(started_at);
        loop {
            tries += 1;
            let limit = self.policy.try_timeout.min(left());
            let outcome = timeout(limit, once())
                .await
                .unwrap_or(Err(Failure::TimedOut(limit)));
            let failure = operation.settle(outcome, tries, unclear)?;
            let failure = match failure {
                TryResult::Done(response) => return Ok(response),
                TryResult::Failed(failure) => failure,
            };
            unclear |= operation.has_effects() && may_have_run(&failure);
            match self.next(operation, &failure, tries, deadline, left()) {
                Ok(wait) => sleep(wait).await,
                Err(reason) => return Err(operation.give_up(reason, tries, failure, unclear)),
            }
        }
    }

    /// The wait before the next try, or the reason for giving up.
    fn next(
        &self,
        operation: &Operation,
        failure: &Failure,
        tries: u32,
        deadline: Duration,
        left: Duration,
    ) -> Result<Duration, GiveUpReason> {
        if !operation.may_be_repeated() {
            return Err(GiveUpReason::NotSafe);
        }
        let retry_after = match failure {
            Failure::Response(response) => response.retry_after(),
            Failure::TimedOut(_) | Failure::Connection(_) => None,
        };
        let wait = self
            .policy
            .wait(tries, retry_after, left, (self.random)())
            .ok_or(GiveUpReason::Deadline(deadline))?;
        if self.budget().withdraw(Instant::now()) {
            Ok(wait)
        } else {
            Err(GiveUpReason::Budget)
        }
    }

    /// No panic can leave the budget inconsistent, so a poisoned lock is still usable.
    fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum TryResult {
    Done(Response),
    Failed(Failure),
}

impl Operation {
    /// Ends the operation if the outcome of a try is final.
    fn settle(
        &self,
        outcome: Result<Response, Failure>,
        tries: u32,
        unclear: bool,
    ) -> Result<TryResult, Error> {
        let mut response = match outcome {
            Ok(response) => response,
            Err(Failure::Connection(error)) if error.is_builder() => {
                return Err(Error::Invalid(error.to_string()));
            }
            Err(failure) => return Ok(TryResult::Failed(failure)),
        };
        response.tries = tries;
        response.key = self.key_string();
        match verdict(&response, self.key.as_ref()) {
            Verdict::Done => Ok(TryResult::Done(response)),
            Verdict::Retry => Ok(TryResult::Failed(Failure::Response(Box::new(response)))),
            Verdict::Refused => {
                // A stored response under the key is also the outcome of the earlier tries.
                let unclear = unclear && !response.replayed;
                Err(Error::Refused(Box::new(Refused {
                    operation: self.name(),
                    response,
                    unclear,
                })))
            }
            // The key belongs to another operation, so none of these tries was carried out.
            Verdict::KeyReused => Err(Error::KeyReused(Box::new(Refused {
                operation: self.name(),
                response,
                unclear: false,
            }))),
        }
    }

    fn give_up(&self, reason: GiveUpReason, tries: u32, last: Failure, unclear: bool) -> Error {
        let (operation, key) = (self.name(), self.key_string());
        Error::GaveUp(Box::new(GaveUp {
            operation,
            reason,
            tries,
            last,
            key,
            unclear,
        }))
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

    fn key_string(&self) -> Option<String> {
        self.key.as_ref().map(|key| key.as_str().to_owned())
    }
}
