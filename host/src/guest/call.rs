//! One call of a guest: its instance, its limits, its deadline and its outcome.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use wasmtime::component::{Accessor, Instance};
use wasmtime::{Store, Trap, UpdateDeadline};
use wasmtime_wasi::WasiView;

use super::bindings::oncely::worker::types as wit;
use super::bucket::MessageHandle;
use super::component::{Entry, Guest};
use super::failure::{
    CallFailure, HandlerResult, check_result_count, doomed_failure, failure_from_text,
    failure_from_wit, timeout_failure, trap_failure,
};
use super::http;
use super::imports;
use super::record::Record;
use super::recorder::ReplayProgress;
use super::state::{Call, CallState};
use crate::model::cache_writes::CacheWrites;
use crate::model::keyed_state::BatchState;
use crate::model::message::{Message, Output};
use crate::model::request::HttpResponse;

/// How long a call may overrun its deadline before the host stops waiting for it. Guest code is
/// stopped at the deadline. The grace period is for a host call, such as a statement that the
/// database ends at the same deadline.
const GRACE: Duration = Duration::from_millis(500);

/// Maximum number of bytes that one host call may copy out of guest memory.
const HOST_CALL_BYTES: usize = 32 << 20;

/// Maximum number of handles of one instance: resources, streams, futures, tasks. The host keeps
/// some hundred bytes for each.
const HANDLES_MAX: usize = 10_000;

/// The outcome of a call.
pub struct CallOutcome {
    /// One result for each message. The outer error means that the call failed as a whole.
    pub result: Result<Vec<HandlerResult>, CallFailure>,
    /// The response of an HTTP worker.
    pub response: Option<HttpResponse>,
    /// Outputs in the order in which the guest sent them.
    pub outputs: Vec<Output>,
    /// State after this call, for the next item.
    pub state: BatchState,
    /// Cache writes of the call.
    pub cache: CacheWrites,
    /// Whether the call ran any SQL. A call without SQL leaves the transaction unchanged, so it can
    /// be dropped from its batch. A deferred statement that is still queued did not run.
    pub ran_sql: bool,
    /// Log output of the guest, one line per entry, truncated at `log_size` of the worker's limits.
    pub logs: String,
    /// The record of a failed call, without the failure of the single message.
    pub record: Option<Box<Record>>,
    /// The number of host calls.
    pub host_calls: u64,
    /// The progress of a replay.
    pub replay_progress: Option<ReplayProgress>,
    /// The instance, if all messages succeeded. It can be called again.
    pub warm: Option<WarmInstance>,
}

/// An instance that has handled a message without a failure.
pub struct WarmInstance {
    store: Store<CallState>,
    instance: Instance,
}

impl Guest {
    /// Runs the handler once, in the instance `warm` or in a fresh one.
    ///
    /// # Errors
    /// A failure of the host. No attempt is counted.
    pub async fn call(
        &self,
        call: Call,
        warm: Option<WarmInstance>,
    ) -> anyhow::Result<CallOutcome> {
        // Prepare the instance.
        let time = call.worker.limits.time;
        let deadline = Instant::now() + time;
        let messages = call
            .messages
            .iter()
            .map(|message| wit_message(message))
            .collect();
        let (mut store, mut instance) = match warm {
            Some(mut warm) => {
                warm.store.data_mut().reset(call, deadline);
                (warm.store, Some(warm.instance))
            }
            None => (self.store(call, deadline), None),
        };
        store.set_epoch_deadline(1);

        // Run the handler until it returns or its time is over.
        let running = async {
            let results = self.run(&mut store, &mut instance, messages).await?;
            store.data_mut().end_call(&results).await?;
            Ok(results)
        };
        let finished: Result<wasmtime::Result<Vec<HandlerResult>>, _> =
            tokio::time::timeout_at((deadline + GRACE).into(), running).await;

        // Determine the result.
        let state = store.data_mut();
        if let Some(error) = state.host_error.take() {
            return Err(error);
        }
        let result = match finished {
            Ok(Ok(results)) => check_result_count(state.call.messages.len(), results),
            Ok(Err(error)) if error.is::<wasmtime::PoolConcurrencyLimitError>() => {
                return Err(anyhow::Error::from(error)).context("allocate one more instance");
            }
            Ok(Err(error)) => Err(trap_failure(&error, &state.limiter, time)),
            Err(_) => Err(timeout_failure(time)),
        };
        let result = match state.doomed.take() {
            Some(doom) => Err(doomed_failure(result, doom)),
            None => result,
        };
        let logs = state.logs.take();
        let result = result.map_err(|failure| failure.with_panic_location(&logs));
        let all_succeeded = result
            .as_ref()
            .is_ok_and(|results| results.iter().all(Result::is_ok));

        // Complete the record or the replay.
        let recorder = std::mem::take(&mut state.call.recorder);
        let host_calls = recorder.calls();
        let (record, replay_progress) = match (recorder.is_playback(), all_succeeded) {
            (true, _) => (None, Some(recorder.into_progress())),
            (false, true) => (None, None),
            (false, false) => (Some(Box::new(state.record(recorder, &logs))), None),
        };
        Ok(CallOutcome {
            result,
            response: state.response.take(),
            outputs: std::mem::take(&mut state.outputs),
            cache: std::mem::take(&mut state.cache),
            state: std::mem::take(&mut state.call.state),
            ran_sql: state.ran_sql,
            logs,
            record,
            host_calls,
            replay_progress,
            // What an async handler left under way must not go on in the call of another message.
            warm: instance
                .filter(|_| all_succeeded && !self.0.pre.engine().get_concurrency_support())
                .map(|instance| WarmInstance { store, instance }),
        })
    }

    async fn run(
        &self,
        store: &mut Store<CallState>,
        instance: &mut Option<Instance>,
        mut messages: Vec<wit::Message>,
    ) -> wasmtime::Result<Vec<HandlerResult>> {
        let instance = match instance {
            Some(instance) => instance,
            None => instance.insert(self.0.pre.instantiate_async(&mut *store).await?),
        };
        let results = match &self.0.entry {
            Entry::Http(indices) => {
                let (result, response) = http::serve(store, instance, indices).await?;
                store.data_mut().response = response;
                return Ok(vec![result]);
            }
            Entry::AsyncHttp(indices) => {
                let (result, response) = http::serve_async(store, instance, indices).await?;
                store.data_mut().response = response;
                return Ok(vec![result]);
            }
            Entry::AsyncHandler(indices) => {
                let message = messages.pop().ok_or_else(no_message)?;
                let handler = indices.load(&mut *store, &*instance)?;
                let call = async |accessor: &Accessor<CallState>| {
                    handler.call_handle(accessor, message).await
                };
                vec![store.run_concurrent(call).await??]
            }
            Entry::Nats(indices) => {
                let handle = store.data_mut().ctx().table.push(MessageHandle)?;
                let handler = indices.load(&mut *store, &*instance)?;
                let call = async |accessor: &Accessor<CallState>| {
                    handler.call_handle_message(accessor, handle).await
                };
                let result = store.run_concurrent(call).await??;
                return Ok(vec![result.map_err(failure_from_text)]);
            }
            Entry::Handler(indices) => {
                let message = messages.pop().ok_or_else(no_message)?;
                vec![
                    indices
                        .load(&mut *store, &*instance)?
                        .call_handle(&mut *store, &message)
                        .await?,
                ]
            }
            Entry::Messaging(indices) => {
                let message = store
                    .data()
                    .message()
                    .map(imports::messaging::broker_message);
                let message = message.ok_or_else(no_message)?;
                let handler = indices.load(&mut *store, &*instance)?;
                let result = handler.call_handle_message(&mut *store, &message).await?;
                return Ok(vec![result.map_err(failure_from_text)]);
            }
            Entry::BatchHandler(indices) => {
                indices
                    .load(&mut *store, &*instance)?
                    .call_handle_batch(&mut *store, &messages)
                    .await?
            }
        };
        Ok(results
            .into_iter()
            .map(|result| result.map_err(failure_from_wit))
            .collect())
    }

    fn store(&self, call: Call, deadline: Instant) -> Store<CallState> {
        let mut store = Store::new(
            self.0.pre.engine(),
            CallState::new(call, deadline, self.is_batch_handler()),
        );
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(HOST_CALL_BYTES);
        store.set_max_component_handles(HANDLES_MAX);
        store.epoch_deadline_callback(|context| {
            if Instant::now() >= context.data().deadline {
                return Err(wasmtime::Error::from(Trap::Interrupt));
            }
            // Yields to other tasks. A busy guest shares its thread with the rest of the host.
            Ok(UpdateDeadline::YieldCustom(
                1,
                Box::pin(tokio::task::yield_now()),
            ))
        });
        store
    }
}

fn no_message() -> wasmtime::Error {
    wasmtime::Error::msg("a call needs a message")
}

fn wit_message(message: &Message) -> wit::Message {
    wit::Message {
        id: message.event_id.clone(),
        subject: message.subject.clone(),
        headers: message.headers.clone(),
        body: message.body.to_vec(),
        origin: message.origin.as_ref().map(|origin| wit::Origin {
            stream: origin.stream.clone(),
            sequence: origin.sequence,
            stored_at: u64::try_from(origin.stored_at.as_microsecond()).unwrap_or_default(),
        }),
    }
}
