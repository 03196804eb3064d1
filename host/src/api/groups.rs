//! Owners and notes of failure groups in the control API.

use std::sync::Arc;

use anyhow::anyhow;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::access::{Caller, StatedBy};
use super::activity::{on_object, recorded};
use super::{ApiError, ApiResult};
use crate::model::hint::WithHint;
use crate::runtime::Host;
use crate::store::{GroupNote, GroupNoteChange, StoreError};

/// The longest owner and the longest note, in characters.
pub const OWNER_MAX: usize = 100;
pub const NOTE_MAX: usize = 2_000;

/// A change of the owner or of the note of a group.
#[derive(Debug, Clone, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct GroupNoteRequest {
    /// None keeps it, an empty text removes it.
    pub owner: Option<String>,
    /// None keeps it, an empty text removes it.
    pub note: Option<String>,
    pub by: StatedBy,
}

/// Changes the owner or the note of a group. Answers with both as they are now.
pub async fn note(
    State(host): State<Arc<Host>>,
    caller: Caller,
    Path(group): Path<String>,
    Json(request): Json<GroupNoteRequest>,
) -> ApiResult<Option<GroupNote>> {
    check_length("owner", request.owner.as_deref(), OWNER_MAX)?;
    check_length("note", request.note.as_deref(), NOTE_MAX)?;
    if request.owner.is_none() && request.note.is_none() {
        return Err(anyhow!("neither an owner nor a note is given")
            .hint("oncely dlq note GROUP --owner NAME --note TEXT")
            .into());
    }
    let caller = caller.stating(&request.by);
    let details = json!({ "owner": request.owner, "note": request.note });
    let activity = on_object("dlq note", format!("group {group}"), details);
    let (store, actor) = (Arc::clone(&host.services.store), caller.actor.clone());
    let change = async move {
        let change = GroupNoteChange {
            owner: request.owner,
            note: request.note,
        };
        let written = store.note_group(&group, &change, &actor).await;
        let written = written.map_err(|error| match error {
            StoreError::Refused(_) => group_not_found(&group),
            error => error.into(),
        })?;
        Ok((written, json!({})))
    };
    Ok(Json(recorded(&host, &caller, activity, change).await?))
}

fn check_length(name: &str, text: Option<&str>, max: usize) -> anyhow::Result<()> {
    let length = text.map_or(0, |text| text.chars().count());
    anyhow::ensure!(
        length <= max,
        "the {name} has {length} characters; the limit is {max}"
    );
    Ok(())
}

fn group_not_found(group: &str) -> ApiError {
    ApiError(
        StatusCode::NOT_FOUND,
        anyhow!("there is no group {group}").hint("oncely dlq list --groups --closed"),
    )
}
