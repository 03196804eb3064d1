//! Messages to publish, once this transaction has committed.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::bindings::oncely::worker::outbox as wit;
pub use crate::bindings::oncely::worker::outbox::{Error as ErrorKind, Outgoing};
use crate::failure::{Failure, milliseconds};
use crate::message::Message;

/// Hands over a message and returns its id. It is published after the commit, never before.
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
/// An output that was refused dooms the delivery, even when the handler goes on and returns `Ok`: one that went
/// missing silently would be a lost message.
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
    /// A reject with the code `not-serializable` when `value` has no JSON form, such as a map with keys that are no text.
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

    /// Adds a header. Names that begin with `Nats-` or `Oncely-` are the platform's own.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets the id of the message, which travels in the header `Oncely-Output-Id` and is the worker's own: the same id of
    /// another worker is another message. Without it the id is `{worker}:{event id}:{ordinal}`, which the same input
    /// always yields.
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

    /// Says which message caused this one, by its id. A batch handler says it for each; elsewhere there is but one.
    #[must_use]
    pub fn caused_by(mut self, message: &Message) -> Self {
        self.caused_by = Some(message.id.clone());
        self
    }

    /// Publishes so long after the commit, not at once; to the millisecond, rounded up.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(milliseconds(delay));
        self
    }
}

/// Why a message was not taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Error(ErrorKind);

impl Error {
    /// Which kind of refusal it was.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ErrorKind::InvalidSubject(why)
            | ErrorKind::InvalidHeader(why)
            | ErrorKind::InvalidId(why)
            | ErrorKind::NotGranted(why)
            | ErrorKind::TooLarge(why)
            | ErrorKind::TooMany(why)
            | ErrorKind::Other(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}
