//! Messages to publish after this transaction has committed.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::bindings::oncely::worker::outbox as wit;
pub use crate::bindings::oncely::worker::outbox::{Error as ErrorKind, Outgoing};
use crate::failure::{Failure, milliseconds};
use crate::message::Message;

/// Adds a message to the outbox and returns its id. It is published after the commit, never before.
///
/// ```no_run
/// # use oncely_guest::prelude::*;
/// # fn example() -> Result<(), Failure> {
/// let reminder = Outgoing::new("mail.reminder", "your invoice is due")
///     .header("Content-Type", "text/plain")
///     .ordering_key("customer-7")
///     .delay(std::time::Duration::from_secs(3600));
/// let id = outbox::send(reminder)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// See [`ErrorKind`]. A refused output dooms the delivery, even if the handler returns `Ok`: a
/// silently missing output would be a lost message.
pub fn send(message: Outgoing) -> Result<String, Error> {
    wit::send(&message).map_err(Error)
}

impl Outgoing {
    /// A message with any body. The subject must match one of the `outputs` of the manifest.
    pub fn new(subject: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Self {
            subject: subject.into(),
            headers: Vec::new(),
            body: body.into(),
            id: None,
            ordering_key: None,
            delay: None,
            caused_by: None,
        }
    }

    /// A message whose body is `value` as JSON, with the header `Content-Type: application/json`.
    ///
    /// # Errors
    /// A reject with the code `not-serializable` when `value` cannot be serialized as JSON, for
    /// example a map whose keys are not text.
    pub fn json(subject: impl Into<String>, value: &impl Serialize) -> Result<Self, Failure> {
        let subject = subject.into();
        match serde_json::to_vec(value) {
            Ok(body) => Ok(Self::new(subject, body).header("Content-Type", "application/json")),
            Err(error) => Err(Failure::reject(format!(
                "the message for `{subject}` cannot be written as JSON: {error}"
            ))
            .code("not-serializable")),
        }
    }

    /// Adds a header. Names that begin with `Nats-` or `Oncely-` are reserved.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets the id of the message, which is sent in the header `Oncely-Output-Id`. The default is
    /// `{worker}:{event id}:{ordinal}`, which the same input always yields. Ids belong to the
    /// worker: the same id of another worker is a different message.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Publishes this message after all earlier ones with the same key.
    #[must_use]
    pub fn ordering_key(mut self, key: impl Into<String>) -> Self {
        self.ordering_key = Some(key.into());
        self
    }

    /// Sets the message that caused this one. Required in a batch handler; implied in others.
    #[must_use]
    pub fn caused_by(mut self, message: &Message) -> Self {
        self.caused_by = Some(message.id.clone());
        self
    }

    /// Publishes the message this long after the commit; to the millisecond, rounded up.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(milliseconds(delay));
        self
    }
}

/// Why a message was refused.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    /// The kind of refusal.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::InvalidSubject(reason)
            | ErrorKind::InvalidHeader(reason)
            | ErrorKind::InvalidId(reason)
            | ErrorKind::NotGranted(reason)
            | ErrorKind::TooLarge(reason)
            | ErrorKind::TooMany(reason)
            | ErrorKind::Other(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}
