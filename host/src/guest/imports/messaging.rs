//! `wasmcloud:messaging`: messages to publish go to the outbox.

use super::super::bindings::oncely::worker::outbox;
use super::super::bindings::others::wasmcloud::messaging::{consumer, types};
use super::outbox::error_message;
use crate::guest::state::CallState;
use crate::model::message::{Message, header};

/// The header that holds the subject for replies, since a stored message has no reply subject.
const REPLY_TO: &str = "Reply-To";

/// A message as a `wasmcloud:messaging` handler receives it.
pub(in crate::guest) fn broker_message(message: &Message) -> types::BrokerMessage {
    types::BrokerMessage {
        subject: message.subject.clone(),
        body: message.body.to_vec(),
        reply_to: header(&message.headers, REPLY_TO).map(str::to_owned),
    }
}

impl types::Host for CallState {}

impl consumer::Host for CallState {
    /// A request leaves the transaction: its effect would remain after a rollback.
    async fn request(
        &mut self,
        subject: String,
        _: Vec<u8>,
        _: u32,
    ) -> wasmtime::Result<Result<types::BrokerMessage, String>> {
        Ok(Err(format!(
            "wasmcloud:messaging/consumer.request to `{subject}` is not available: a request \
             cannot be rolled back, and its response would not be the same in the next attempt; \
             publish a message, and handle the response as a message of its own"
        )))
    }

    async fn publish(
        &mut self,
        message: types::BrokerMessage,
    ) -> wasmtime::Result<Result<(), String>> {
        let headers = message
            .reply_to
            .map(|subject| (REPLY_TO.to_owned(), subject));
        let sent = outbox::Host::send(
            self,
            outbox::Outgoing {
                subject: message.subject,
                headers: headers.into_iter().collect(),
                body: message.body,
                id: None,
                ordering_key: None,
                delay: None,
                caused_by: None,
            },
        );
        Ok(sent
            .await?
            .map(|_| ())
            .map_err(|error| error_message(&error).to_owned()))
    }
}
