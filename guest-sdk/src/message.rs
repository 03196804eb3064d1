//! What a handler is given.

use serde::de::DeserializeOwned;

pub use crate::bindings::oncely::worker::types::{Headers, Message, Origin};
use crate::failure::Failure;

impl Message {
    /// Reads the body as JSON.
    ///
    /// # Errors
    /// A body that is not what `T` expects will not become so by trying again: the failure is a reject with the code
    /// `malformed` and a sentence that says where the body departs.
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

    /// The first value of a header, its name compared without regard to case.
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
    fn a_malformed_body_is_rejected_and_the_sentence_says_where() {
        let failure = message(r#"{"cent":7}"#).json::<Order>().unwrap_err();
        assert_eq!(failure.kind, FailureKind::Reject);
        assert_eq!(failure.code.as_deref(), Some("malformed"));
        assert_eq!(
            failure.message,
            "the body is not the expected JSON: missing field `cents` at line 1 column 10"
        );
    }

    #[test]
    fn the_first_header_of_a_name_counts_whatever_its_case() {
        assert_eq!(message("").header("ACCOUNT"), Some("a"));
        assert_eq!(message("").header("other"), None);
    }
}
