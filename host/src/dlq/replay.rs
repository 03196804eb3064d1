//! Replays a failed attempt from its recording: on the same engine, without a database or a broker.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::CompileSettings;
use crate::config::manifest::{ResolvedConfig, Worker};
use crate::guest::{
    CacheReader, CachedValue, Call, CallFailure, CallOutcome, Database, Deferral, Guest,
    GuestEngine, PlaybackEnd, RECORD_FORMAT, Record, Recorder,
};
use crate::model::failure_code::FailureCode;
use crate::model::hint::WithHint;
use crate::model::keyed_state::{BatchState, StateSlot};
use crate::model::sql::{Dialect, Rows, SqlError, SqlLimits, Value};
use crate::store::{DeadLetterRecord, Store};

/// The time limit of a replay, unless the attempt itself timed out: a laptop may be slower than a
/// host.
const TIME_LIMIT: Duration = Duration::from_secs(10 * 60);

/// The data for a replay of the last attempt at a dead letter, without the component.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Replayable {
    /// The version of the worker that made the attempt.
    pub version: u32,
    /// SHA-256 of its component, lower-case hex.
    pub digest: String,
    /// Its manifest, with all defaults filled in.
    pub manifest: Worker,
    /// The recording, in a form of this version.
    #[schemars(with = "serde_json::Value")]
    pub record: Record,
}

/// The result of a replay.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub outcome: ReplayOutcome,
    /// How many host calls match the recording.
    pub calls: usize,
    pub divergence: Option<Divergence>,
    /// The failure of the guest; none when it succeeded, or when the replay ended before.
    pub failure: Option<CallFailure>,
    pub logs: String,
}

/// How a replay compares with its recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplayOutcome {
    /// Same calls, same failure.
    Reproduced,
    /// A different call, a different end or a different log.
    Diverged,
    /// Same calls up to the end of the recording, which was cut.
    Truncated,
}

/// The first difference between a replay and its recording.
#[derive(Debug, Serialize, Deserialize)]
pub struct Divergence {
    /// The number of the host call, from 1; none when only the log differs.
    pub call: Option<usize>,
    pub expected: String,
    pub actual: String,
}

/// The data for a replay of the last attempt at a dead letter; none without a recording.
///
/// # Errors
/// The recording or the manifest cannot be read.
pub async fn replayable(
    store: &Store,
    dead_letter: &DeadLetterRecord,
) -> Result<Option<Replayable>> {
    let (worker, event_id) = (&dead_letter.summary.worker, &dead_letter.summary.event_id);
    let Some(json) = store.attempt_recording(worker, event_id).await? else {
        return Ok(None);
    };
    let record: Record =
        serde_json::from_slice(&json).context("read the recording of an attempt")?;
    let deployments = store.deployments(worker).await?;
    let Some(deployment) = deployments
        .into_iter()
        .find(|deployment| deployment.version == record.version)
    else {
        return Ok(None);
    };
    let manifest =
        serde_json::from_str(&deployment.manifest).context("read the manifest of a deployment")?;
    Ok(Some(Replayable {
        version: deployment.version,
        digest: deployment.digest,
        manifest,
        record,
    }))
}

/// Replays the attempt at an event with `wasm`.
///
/// That is its own component or, if it `is_changed`, another one, whose log may differ. Compiled
/// components are cached in the folder `cache`.
///
/// # Errors
/// The recording has another format, or does not fit the event or the component.
pub async fn replay(
    attempt: &Replayable,
    event_id: &str,
    wasm: Bytes,
    is_changed: bool,
    cache: &Path,
) -> Result<Report> {
    let record = &attempt.record;
    if record.format != RECORD_FORMAT {
        let why = format!(
            "the recording has format {}, but this program reads format {RECORD_FORMAT}",
            record.format
        );
        return Err(anyhow!(why)).hint("replay it with the version of oncely that exported it");
    }
    let expected = record
        .failure
        .as_ref()
        .context("the recording does not contain the failure of the attempt")?;
    let item = record
        .messages
        .iter()
        .position(|message| message.event_id == event_id);
    let item =
        item.with_context(|| format!("the recording does not contain the event `{event_id}`"))?;
    let engine = GuestEngine::new(cache, CompileSettings::default())?;
    let guest = Guest::load(&engine, wasm)
        .await
        .context("load the component")?;
    ensure!(
        guest.is_batch_handler() || record.messages.len() == 1,
        "a batch handler made the attempt with {} messages, \
         but this component handles one at a time",
        record.messages.len()
    );
    let config = attempt
        .manifest
        .resolve_config()
        .context("read the configuration of the worker")?;
    let outcome = guest.call(call(attempt, expected, config), None).await?;
    compare(record, expected, item, outcome, is_changed)
}

/// The recorded call.
fn call(attempt: &Replayable, expected: &CallFailure, config: ResolvedConfig) -> Call {
    let record = &attempt.record;
    let mut worker = attempt.manifest.clone();
    if expected.code.as_deref() != Some(FailureCode::Timeout.as_str()) {
        worker.limits.time = worker.limits.time.max(TIME_LIMIT);
    }
    Call {
        messages: record.messages.iter().cloned().map(Arc::new).collect(),
        traces: Vec::new(),
        worker: Arc::new(worker),
        config: Arc::new(config),
        version: record.version,
        attempt: record.attempt,
        now: record.now,
        payload_max: record.payload_max,
        database: Arc::new(NoDatabase(record.dialect)),
        cache: Arc::new(NoDatabase(record.dialect)),
        state: BatchState::default(),
        request: None,
        recorder: Recorder::playback(record),
    }
}

/// Compares a run with its recording.
fn compare(
    record: &Record,
    expected: &CallFailure,
    item: usize,
    outcome: CallOutcome,
    is_changed: bool,
) -> Result<Report> {
    let replayed = outcome
        .replay_progress
        .context("the guest did not run from the recording")?;
    let actual = match outcome.result {
        Ok(answers) => answers.into_iter().nth(item).and_then(Result::err),
        Err(failure) => Some(failure),
    };
    let calls = replayed.steps;
    let diverged = |expected: String, actual: String| {
        Some(Divergence {
            call: Some(calls + 1),
            expected,
            actual,
        })
    };
    let (divergence, failure) = match replayed.ended {
        Some(PlaybackEnd::Mismatched(host_call)) => bail!(
            "the recording does not fit: its result {calls} does not answer the call `{host_call}`"
        ),
        Some(PlaybackEnd::Truncated) => (None, None),
        Some(PlaybackEnd::Stopped) => (None, Some(expected.clone())),
        Some(PlaybackEnd::Diverged {
            expected: next,
            instead,
        }) => {
            let next = next.map_or_else(|| describe(Some(expected)), |next| next.to_string());
            (diverged(next, instead.to_string()), None)
        }
        None => {
            let divergence = match replayed.next {
                Some(next) => diverged(next.to_string(), describe(actual.as_ref())),
                None if record.truncated => diverged(
                    "more than the recording could hold".to_owned(),
                    describe(actual.as_ref()),
                ),
                None if is_reproduced(expected, actual.as_ref(), is_changed) => None,
                None => diverged(describe(Some(expected)), describe(actual.as_ref())),
            };
            (divergence, actual)
        }
    };
    let is_cut = divergence.is_none() && failure.is_none();
    let divergence = divergence.or_else(|| {
        if is_cut || is_changed {
            None
        } else {
            log_divergence(&record.logs, &outcome.logs)
        }
    });
    let replay_outcome = match &divergence {
        Some(_) => ReplayOutcome::Diverged,
        None if is_cut => ReplayOutcome::Truncated,
        None => ReplayOutcome::Reproduced,
    };
    Ok(Report {
        outcome: replay_outcome,
        calls,
        divergence,
        failure,
        logs: outcome.logs,
    })
}

/// Whether a failure is the recorded one. Another build has other function names, so only kind and
/// code are compared.
fn is_reproduced(expected: &CallFailure, actual: Option<&CallFailure>, is_changed: bool) -> bool {
    actual.is_some_and(|failure| match is_changed {
        true => (failure.kind, &failure.code) == (expected.kind, &expected.code),
        false => failure == expected,
    })
}

/// The end of a run, for people.
fn describe(failure: Option<&CallFailure>) -> String {
    match failure {
        None => "success".to_owned(),
        Some(CallFailure {
            code: Some(code),
            message,
            ..
        }) => format!("failure ({code}): {message}"),
        Some(CallFailure { message, .. }) => format!("failure: {message}"),
    }
}

/// The first log line that differs.
fn log_divergence(expected: &str, actual: &str) -> Option<Divergence> {
    let (mut expected, mut actual) = (expected.lines(), actual.lines());
    loop {
        match (expected.next(), actual.next()) {
            (None, None) => return None,
            (one, two) if one == two => {}
            (one, two) => {
                let line = |line: Option<&str>| {
                    line.map_or("the end of the log".to_owned(), |line| {
                        format!("log line: {line}")
                    })
                };
                return Some(Divergence {
                    call: None,
                    expected: line(one),
                    actual: line(two),
                });
            }
        }
    }
}

/// The database of a replay. It is never called: the recording answers all calls.
struct NoDatabase(Dialect);

const NO_DATABASE: &str = "a replay has no database";

#[async_trait]
impl Database for NoDatabase {
    fn dialect(&self) -> Dialect {
        self.0
    }

    async fn query(
        &self,
        _: String,
        _: Vec<Value>,
        _: SqlLimits,
    ) -> Result<Result<Rows, SqlError>> {
        bail!(NO_DATABASE)
    }

    async fn execute(&self, _: String, _: Vec<Value>) -> Result<Result<u64, SqlError>> {
        bail!(NO_DATABASE)
    }

    async fn defer(&self, _: String, _: Vec<Value>) -> Result<Result<Deferral, SqlError>> {
        bail!(NO_DATABASE)
    }

    async fn run_deferred(&self) -> Result<Result<(), SqlError>> {
        bail!(NO_DATABASE)
    }

    async fn end_call(&self) -> Result<Result<(), SqlError>> {
        bail!(NO_DATABASE)
    }

    async fn load_state(&self, _: String) -> Result<StateSlot> {
        bail!(NO_DATABASE)
    }

    async fn list_state(&self, _: String, _: String, _: u32) -> Result<Vec<String>> {
        bail!(NO_DATABASE)
    }
}

#[async_trait]
impl CacheReader for NoDatabase {
    async fn get(&self, _: &str) -> Option<CachedValue> {
        None
    }
}
