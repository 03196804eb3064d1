//! The tools that plan a change: they read, keep the state that they saw, and change nothing.

use super::Session;
use super::answer::Answer;
use super::plans::Change;
use crate::cli::client::Client;

pub mod dead_letters;
pub mod outputs;
pub mod workers;

/// The maximum number of dead letters or outputs of a plan.
const ITEMS_MAX: usize = 100;

/// Keeps a plan, and returns it for the assistant.
fn planned(
    session: &Session,
    client: &Client,
    does: String,
    reason: String,
    change: Change,
) -> Answer {
    let (plan, expires_at) = session.plans.add(client.base(), does, reason, change);
    let next = match session.may_apply {
        true => "show this plan to the user; after their consent, call apply with its id",
        false => {
            "this server may not apply plans; the user can start it with --allow-apply, or use \
             the commands of oncely"
        }
    };
    Answer::default()
        .with("plan", plan.id)
        .with("does", plan.does)
        .with("reason", plan.reason)
        .with("expires_at", expires_at)
        .with("next", next)
}
