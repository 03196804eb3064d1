//! The message that a handler receives.

use serde::de::DeserializeOwned;

pub use crate::bindings::oncely::worker::types::{Headers, Message, Origin};
use crate::failure::Failure;

impl Message {
    /// Parses the body as JSON.
    ///
    /// # Errors
    /// A reject with the code `malformed` and the position of the error. A retry cannot turn the
    /// body into the JSON that `T` expects.
    ///
    /// ```
    /// # use oncely_guest::prelude::*;
    /// #[derive(Deserialize)]
    /// struct Order { id: String }
    ///
    /// fn handle(message: Message) -> Result<(), Failure> {
    ///     let order: Order = message.json()?;
    ///     log::info!("order {}", order.id);
    ///     Ok(())
    /// }
    /// ```
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body)
            .map_err(|error| malformed(format!("the body is not the expected JSON: {error}")))
    }

    /// Reads the body as UTF-8 text.
    ///
    /// # Errors
    /// A reject with the code `malformed` when it is not UTF-8.
    pub fn text(&self) -> Result<&str, Failure> {
        std::str::from_utf8(&self.body)
            .map_err(|error| malformed(format!("the body is not UTF-8 text: {error}")))
    }

    /// The first value of a header; the name is not case-sensitive.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

fn malformed(message: String) -> Failure {
    Failure::reject(message).code("malformed")
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::failure::FailureKind;

    #[derive(Debug, Deserialize)]
    struct Order {
        cents: i64,
    }

    fn message(body: &str) -> Message {
        Message {
            id: "e1".to_owned(),
            subject: "orders.new".to_owned(),
            headers: vec![
                ("Account".to_owned(), "a".to_owned()),
                ("account".to_owned(), "b".to_owned()),
            ],
            body: body.into(),
            origin: None,
        }
    }

    #[test]
    fn a_typed_body_is_read() {
        assert_eq!(message(r#"{"cents":7}"#).json::<Order>().unwrap().cents, 7);
    }

    #[test]
    fn a_malformed_body_is_rejected_with_the_position() {
        let failure = message(r#"{"cent":7}"#).json::<Order>().unwrap_err();
        assert_eq!(failure.kind, FailureKind::Reject);
        assert_eq!(failure.code.as_deref(), Some("malformed"));
        assert_eq!(
            failure.message,
            "the body is not the expected JSON: missing field `cents` at line 1 column 10"
        );
    }

    #[test]
    fn header_returns_the_first_value_in_any_case() {
        assert_eq!(message("").header("ACCOUNT"), Some("a"));
        assert_eq!(message("").header("other"), None);
    }
}
