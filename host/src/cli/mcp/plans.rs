//! Plans of changes, in memory: each with the state that it has seen, for minutes, for one use.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use jiff::Timestamp;

use crate::api::StatedBy;
use crate::api::dead_letters::{CloseAction, PlannedRedrive};
use crate::model::hint::WithHint as _;
use crate::runtime::SkipPlan;
use crate::store::{JobAction, JobState, Pause, SeenDeadLetter};

/// How many plans are kept. The oldest ones give way.
const PLANS_MAX: usize = 100;

/// A change with the state that it depends on.
#[derive(Debug, Clone)]
pub enum Change {
    /// Redrive as a job, each dead letter if its dry run still has the same result.
    Redrive {
        dead_letters: Vec<PlannedRedrive>,
        seen: Vec<SeenDeadLetter>,
    },
    /// Resolve or drop dead letters.
    Close {
        action: CloseAction,
        seen: Vec<SeenDeadLetter>,
    },
    /// Store a corrected body.
    Edit { seen: SeenDeadLetter, body: Vec<u8> },
    /// Pause a worker that is not paused.
    Pause { worker: String },
    /// End this pause.
    Resume { worker: String, pause: Pause },
    /// Skip messages of a paused worker.
    Skip { plan: SkipPlan },
    /// Activate an earlier version.
    Rollback { worker: String, from: u32, to: u32 },
    /// Retry or drop parked outputs.
    Outputs {
        is_drop: bool,
        seen: Vec<SeenOutput>,
    },
    /// Pause, resume or cancel a job.
    Job {
        id: i64,
        action: JobAction,
        seen: JobState,
    },
}

/// A parked output as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenOutput {
    pub number: i64,
    pub state: String,
    pub failures: u32,
    pub parked_at: Option<Timestamp>,
}

/// A plan.
#[derive(Debug, Clone)]
pub struct Plan {
    pub id: String,
    /// The host that it is for.
    pub host: String,
    /// The change in words, without text of outsiders.
    pub does: String,
    /// The reason of the user, for the activity log.
    pub reason: String,
    pub change: Change,
    created_at: Instant,
}

impl Plan {
    /// The reason with the id of the plan.
    pub fn note(&self) -> String {
        format!("{} (plan {} of oncely mcp)", self.reason, self.id)
    }

    /// The note for a request that has an actor, too: the user, as the client states.
    pub fn by(&self) -> StatedBy {
        StatedBy {
            actor: None,
            note: Some(self.note()),
        }
    }
}

/// The plans of a session.
#[derive(Debug)]
pub struct Plans {
    expiry: Duration,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    plans: VecDeque<Plan>,
    /// The ids of applied plans.
    applied: VecDeque<String>,
}

impl Plans {
    pub fn new(expiry: Duration) -> Self {
        Plans {
            expiry,
            kept: Mutex::default(),
        }
    }

    /// Keeps a plan. Returns it with the time at which it expires.
    pub fn add(
        &self,
        host: &str,
        does: String,
        reason: String,
        change: Change,
    ) -> (Plan, Timestamp) {
        let plan = Plan {
            id: hex::encode(rand::random::<[u8; 8]>()),
            host: host.to_owned(),
            does,
            reason,
            change,
            created_at: Instant::now(),
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.plans.push_back(plan.clone());
        if kept.plans.len() > PLANS_MAX {
            kept.plans.pop_front();
        }
        let now = Timestamp::now();
        let expires_at = now.checked_add(self.expiry).unwrap_or(now);
        let whole = Timestamp::from_second(expires_at.as_second());
        (plan, whole.unwrap_or(expires_at))
    }

    /// Takes a plan out: it is applied now, or never.
    ///
    /// # Errors
    /// It was taken before, has expired, or never existed.
    pub fn take(&self, id: &str) -> Result<Plan> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.applied.iter().any(|applied| applied == id) {
            return Err(anyhow!(
                "the plan was applied already; each is applied at most once"
            ));
        }
        let position = kept.plans.iter().position(|plan| plan.id == id);
        let plan = position.and_then(|position| kept.plans.remove(position));
        let Some(plan) = plan else {
            return Err(anyhow!("there is no such plan"))
                .hint("plans are kept in memory, until the server of the assistant ends");
        };
        if plan.created_at.elapsed() >= self.expiry {
            return Err(anyhow!("the plan has expired; make a new one"));
        }
        kept.applied.push_back(plan.id.clone());
        if kept.applied.len() > PLANS_MAX {
            kept.applied.pop_front();
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(plans: &Plans) -> String {
        let change = Change::Pause {
            worker: "w".to_owned(),
        };
        let (plan, _) = plans.add("http://h", "pause w".to_owned(), "why".to_owned(), change);
        plan.id
    }

    #[test]
    fn a_plan_is_taken_once_and_before_it_expires() {
        let plans = Plans::new(Duration::from_secs(600));
        let id = plan(&plans);
        assert!(plans.take("other").is_err());
        assert_eq!(
            plans.take(&id).map(|plan| plan.does).ok().as_deref(),
            Some("pause w")
        );
        let again = plans
            .take(&id)
            .map_or_else(|error| error.to_string(), |_| String::new());
        assert!(again.contains("applied already"), "{again}");

        let expired = Plans::new(Duration::ZERO);
        let id = plan(&expired);
        let refused = expired
            .take(&id)
            .map_or_else(|error| error.to_string(), |_| String::new());
        assert!(refused.contains("has expired"), "{refused}");
    }

    #[test]
    fn the_oldest_plans_give_way() {
        let plans = Plans::new(Duration::from_secs(600));
        let first = plan(&plans);
        let last = (0..PLANS_MAX)
            .map(|_| plan(&plans))
            .last()
            .unwrap_or_default();
        assert!(plans.take(&first).is_err());
        assert!(plans.take(&last).is_ok());
    }
}
