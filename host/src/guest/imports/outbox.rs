//! The outbox: checks outgoing messages against the grants and limits of the manifest.

use std::time::Duration;

use bytes::Bytes;

use super::READ_ONLY_REQUEST;
use crate::guest::bindings::oncely::worker::outbox;
use crate::guest::failure::FailureKind;
use crate::guest::record::{HostCall, OutgoingMessage};
use crate::guest::state::CallState;
use crate::model::failure_code::FailureCode;
use crate::model::message::{
    self, DELAY_MAX, EVENT_ID_MAX, Headers, Message, Output, OutputKind, output_id,
};
use crate::model::subject;
use crate::model::trace_context::{self, OutputTrace};

impl outbox::Host for CallState {
    async fn send(
        &mut self,
        outgoing: outbox::Outgoing,
    ) -> wasmtime::Result<Result<String, outbox::Error>> {
        self.check_deadline()?;
        let outbox::Outgoing {
            subject,
            headers,
            body,
            id,
            ordering_key,
            delay: delay_ms,
            caused_by,
        } = outgoing;
        let body = Bytes::from(body);
        let outgoing = OutgoingMessage {
            subject,
            headers,
            body,
            id,
            ordering_key,
            delay_ms,
            caused_by,
        };
        self.call.recorder.record_call(outgoing.size(), || {
            HostCall::Send(Box::new(outgoing.clone()))
        })?;
        match self.accept(outgoing) {
            Ok(output) => {
                let id = output.id.clone();
                self.output_bytes += output_size(&output);
                self.outputs.push(output);
                Ok(Ok(id))
            }
            Err(error) => {
                self.doom(
                    FailureKind::OutputRefused,
                    FailureCode::OutputRefused,
                    error_message(&error),
                );
                Ok(Err(error))
            }
        }
    }
}

impl CallState {
    /// Checks one outgoing message against the grants and limits of the manifest.
    fn accept(&self, outgoing: OutgoingMessage) -> Result<Output, outbox::Error> {
        let worker = &self.call.worker;
        if !self.may_write() {
            return Err(outbox::Error::NotGranted(READ_ONLY_REQUEST.to_owned()));
        }
        subject::check_subject(&outgoing.subject)
            .map_err(|why| outbox::Error::InvalidSubject(why.to_string()))?;
        if !worker.grants(&outgoing.subject) {
            return Err(outbox::Error::NotGranted(format!(
                "worker {} may not publish to `{}`; to allow it, add to its manifest: {}",
                worker.name,
                outgoing.subject,
                worker.grant_line(&outgoing.subject)
            )));
        }
        check_headers(&outgoing.headers)?;
        check_ordering_key(outgoing.ordering_key.as_deref())?;
        let delay = checked_delay(outgoing.delay_ms.unwrap_or_default())?;
        let cause = self.cause(outgoing.caused_by.as_deref())?;
        // Counted per event, so a message yields the same ids in every batch.
        let ordinal = self
            .outputs
            .iter()
            .filter(|output| output.event_id == cause.event_id)
            .count();
        let trace = self.output_trace(cause);
        let trace = trace.filter(|_| !trace_context::has_trace(&outgoing.headers));
        let mut output = Output {
            kind: if outgoing.id.is_some() {
                OutputKind::Chosen
            } else {
                OutputKind::Derived
            },
            id: self.id_for(outgoing.id, cause, ordinal)?,
            event_id: cause.event_id.clone(),
            ordinal: u32::try_from(ordinal).unwrap_or(u32::MAX),
            subject: outgoing.subject,
            headers: with_trace(outgoing.headers, cause),
            body: outgoing.body,
            ordering_key: outgoing.ordering_key,
            delay,
        };
        self.check_size(&output)?;
        worker
            .check_schema(&output.subject, &output.headers, &output.body)
            .map_err(|why| {
                outbox::Error::Other(format!("the output to `{}`: {why}", output.subject))
            })?;
        // After the checks: traces do not change which outputs are accepted.
        if let Some(trace) = trace {
            trace.set(&mut output.headers, &worker.name, &output.id);
        }
        if let Some(events) = &worker.cloudevents {
            events.apply(&mut output, self.call.now);
            self.check_size(&output)?;
        }
        Ok(output)
    }

    /// The message that caused an output.
    fn cause(&self, event_id: Option<&str>) -> Result<&Message, outbox::Error> {
        let caused = |event_id: &str| {
            self.call
                .messages
                .iter()
                .find(|message| message.event_id == event_id)
        };
        let cause = match event_id {
            Some(event_id) => {
                caused(event_id).ok_or_else(|| format!("this call has no message `{event_id}`"))
            }
            None if self.in_batch => Err(
                "a batch handler must name for each output which message caused it \
                (`caused-by`: the id of the message)"
                    .to_owned(),
            ),
            None => self
                .call
                .messages
                .first()
                .ok_or_else(|| "this call has no message".to_owned()),
        };
        cause.map(AsRef::as_ref).map_err(outbox::Error::Other)
    }

    /// The trace of the outputs of a message; none when traces are off.
    fn output_trace(&self, cause: &Message) -> Option<&OutputTrace> {
        let traced = self.call.messages.iter().zip(&self.call.traces);
        let mut traced = traced.filter(|(message, _)| std::ptr::eq(message.as_ref(), cause));
        traced.next().map(|(_, trace)| trace)
    }

    fn id_for(
        &self,
        requested: Option<String>,
        cause: &Message,
        ordinal: usize,
    ) -> Result<String, outbox::Error> {
        let Some(id) = requested else {
            return Ok(output_id(&self.call.worker.name, &cause.event_id, ordinal));
        };
        if id.is_empty() || id.len() > EVENT_ID_MAX || id.chars().any(char::is_control) {
            return Err(outbox::Error::InvalidId(format!(
                "the id of an output must have 1 to {EVENT_ID_MAX} bytes and no control characters"
            )));
        }
        if self.outputs.iter().any(|output| output.id == id) {
            return Err(outbox::Error::InvalidId(format!(
                "the id `{id}` was already used in this delivery"
            )));
        }
        Ok(id)
    }

    fn check_size(&self, output: &Output) -> Result<(), outbox::Error> {
        let limits = &self.call.worker.limits;
        if self.outputs.len() >= limits.outputs as usize {
            return Err(outbox::Error::TooMany(format!(
                "a delivery may send {} messages (`outputs` under [worker.limits])",
                limits.outputs
            )));
        }
        let size = output_size(output);
        let most = usize::try_from(limits.output_size)
            .unwrap_or(usize::MAX)
            .min(self.call.payload_max);
        if size > most {
            return Err(outbox::Error::TooLarge(format!(
                "the message to `{}` has {size} bytes with its headers; at most {most} are allowed \
                 (`output_size` under [worker.limits], and max_payload of the NATS server)",
                output.subject
            )));
        }
        if (self.output_bytes + size) as u64 > limits.outputs_size {
            return Err(outbox::Error::TooLarge(format!(
                "the messages of this delivery exceed {} bytes in total (`outputs_size` under \
                 [worker.limits])",
                limits.outputs_size
            )));
        }
        Ok(())
    }
}

/// Copies the trace context of the message, unless the handler set one.
fn with_trace(mut headers: Headers, cause: &Message) -> Headers {
    // A `tracestate` is valid only with its own `traceparent`.
    if trace_context::has_trace(&headers) {
        return headers;
    }
    let Some(parent) = cause
        .header("traceparent")
        .filter(|parent| message::is_traceparent(parent))
    else {
        return headers;
    };
    headers.push(("traceparent".to_owned(), parent.to_owned()));
    if let Some(state) = cause.header("tracestate") {
        headers.push(("tracestate".to_owned(), state.to_owned()));
    }
    headers
}

fn check_ordering_key(key: Option<&str>) -> Result<(), outbox::Error> {
    match key {
        Some(key) if key.len() > EVENT_ID_MAX || key.contains('\0') => Err(outbox::Error::Other(
            format!("an ordering key has at most {EVENT_ID_MAX} bytes and no NUL"),
        )),
        _ => Ok(()),
    }
}

/// Checks a delay. A longer one could exceed the range of timestamps.
fn checked_delay(delay_ms: u64) -> Result<Duration, outbox::Error> {
    let delay = Duration::from_millis(delay_ms);
    if delay > DELAY_MAX {
        return Err(outbox::Error::Other(format!(
            "a delay of {delay_ms} ms is too long: an output may be delayed by {} days at most",
            DELAY_MAX.as_secs() / (24 * 60 * 60)
        )));
    }
    Ok(delay)
}

/// Bytes reserved for the headers that the host adds.
const PLATFORM_HEADERS: usize = 1024;

fn output_size(output: &Output) -> usize {
    let headers: usize = output
        .headers
        .iter()
        .map(|(name, value)| name.len() + value.len() + 4)
        .sum();
    headers + PLATFORM_HEADERS + output.body.len()
}

fn check_headers(headers: &Headers) -> Result<(), outbox::Error> {
    for (name, value) in headers {
        let token = |c: char| c.is_ascii_graphic() && c != ':';
        if name.is_empty() || name.len() > 128 || !name.chars().all(token) {
            return Err(outbox::Error::InvalidHeader(format!(
                "`{}` cannot be a header's name: 1 to 128 printable ASCII characters without space \
                 and colon",
                name.escape_debug()
            )));
        }
        let lower = name.to_ascii_lowercase();
        if lower.starts_with("nats-") || lower.starts_with("oncely-") {
            return Err(outbox::Error::InvalidHeader(format!(
                "the header `{name}` is reserved: names that begin with `Nats-` or `Oncely-` \
                 belong to the platform"
            )));
        }
        if value.len() > 8192 || value.chars().any(|c| c.is_control() && c != '\t') {
            return Err(outbox::Error::InvalidHeader(format!(
                "the value of header `{name}` has control characters or more than 8192 bytes"
            )));
        }
    }
    Ok(())
}

pub(super) fn error_message(error: &outbox::Error) -> &str {
    match error {
        outbox::Error::InvalidSubject(why)
        | outbox::Error::InvalidHeader(why)
        | outbox::Error::InvalidId(why)
        | outbox::Error::NotGranted(why)
        | outbox::Error::TooLarge(why)
        | outbox::Error::TooMany(why)
        | outbox::Error::Other(why) => why,
    }
}
