//! The activity log: each change through the control API, with its actor and its result.

use std::future::Future;
use std::sync::Arc;

use anyhow::Context;
use axum::Json;
use axum::extract::{Query, State};
use serde_json::Value;

use super::access::Caller;
use super::{ApiError, ApiResult};
use crate::runtime::Host;
use crate::store::{ActivityFilter, ActivityOutcome, ActivityRecord, NewActivity};

/// The maximum number of activities of one response.
const ACTIVITIES_MAX: u32 = 10_000;

/// The activity of a command on a worker.
pub(super) fn on_worker(verb: &'static str, worker: &str, details: Value) -> NewActivity {
    NewActivity {
        verb,
        worker: Some(worker.to_owned()),
        object: String::new(),
        details,
    }
}

/// The activity of a command on something else.
pub(super) fn on_object(
    verb: &'static str,
    object: impl Into<String>,
    details: Value,
) -> NewActivity {
    NewActivity {
        verb,
        worker: None,
        object: object.into(),
        details,
    }
}

/// Makes a change and records it: its activity before, its outcome afterwards. `change` returns its
/// result with the part that is recorded. It runs in a task of its own, so a client that
/// disconnects does not interrupt it.
///
/// # Errors
/// The activity cannot be written; then nothing is changed. Or those of `change`.
pub(super) async fn recorded<T: Send + 'static>(
    host: &Arc<Host>,
    caller: &Caller,
    activity: NewActivity,
    change: impl Future<Output = Result<(T, Value), ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    recorded_with_id(host, caller, activity, |_| change).await
}

/// Like [`recorded`], for a change that records its outcome itself, by the id of its activity.
pub(super) async fn recorded_with_id<T, F>(
    host: &Arc<Host>,
    caller: &Caller,
    activity: NewActivity,
    change: impl FnOnce(i64) -> F,
) -> Result<T, ApiError>
where
    T: Send + 'static,
    F: Future<Output = Result<(T, Value), ApiError>> + Send + 'static,
{
    let store = Arc::clone(&host.services.store);
    let id = store
        .begin_activity(&caller.actor, &activity)
        .await
        .context("record the activity before the change")?;
    let change = change(id);
    let (verb, actor) = (activity.verb, caller.actor.name.clone());
    let task = tokio::spawn(async move {
        let result = change.await;
        let outcome = match &result {
            Ok((_, recorded)) => ActivityOutcome::Done(recorded.clone()),
            Err(ApiError(_, error)) => ActivityOutcome::Failed(format!("{error:#}")),
        };
        // The change is made: its caller gets the result, also without an outcome in the log.
        if let Err(error) = store.end_activity(id, &outcome).await {
            tracing::warn!(
                verb,
                actor,
                error = format!("{:#}", anyhow::Error::from(error)),
                "failed to record the outcome of an activity"
            );
        }
        result
    });
    let (value, _) = task.await.context("complete the change")??;
    Ok(value)
}

/// The matching activities, newest first.
pub async fn list(
    State(host): State<Arc<Host>>,
    Query(filter): Query<ActivityFilter>,
) -> ApiResult<Vec<ActivityRecord>> {
    let filter = ActivityFilter {
        limit: filter.limit.min(ACTIVITIES_MAX),
        ..filter
    };
    Ok(Json(host.services.store.activities(&filter).await?))
}
