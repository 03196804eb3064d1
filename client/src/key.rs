//! `Idempotency-Key`: what tells a server that two requests are one operation.

use reqwest::Method;
use reqwest::header::HeaderValue;

use crate::Error;

pub(crate) const HEADER: &str = "idempotency-key";

/// The longest key, in characters; servers keep no longer ones.
const LENGTH_MAX: usize = 255;

/// The key of one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Key {
    /// Made for this operation, so that nobody can have used it before.
    Generated(String),
    /// Brought by the caller.
    Provided(String),
}

impl Key {
    /// The key an operation has if its caller brings none: methods that are idempotent by themselves need none.
    pub fn generate_for(method: &Method) -> Option<Self> {
        (!method.is_idempotent()).then(|| Key::Generated(uuid::Uuid::new_v4().to_string()))
    }

    pub fn as_str(&self) -> &str {
        match self {
            Key::Generated(text) | Key::Provided(text) => text,
        }
    }

    /// The key as the draft has it: a string of RFC 9651, in quotes.
    pub fn header(&self) -> Result<HeaderValue, Error> {
        let text = self.as_str();
        let printable = text.chars().all(|c| c == ' ' || c.is_ascii_graphic());
        if text.is_empty() || text.len() > LENGTH_MAX || !printable {
            return Err(Error::Invalid(format!(
                "{text:?} cannot be a key: a key has 1 to {LENGTH_MAX} printable ASCII characters"
            )));
        }
        let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        HeaderValue::try_from(quoted)
            .map_err(|_| Error::Invalid(format!("{text:?} cannot be a key")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_sent_as_a_quoted_string() {
        let header = |text: &str| Key::Provided(text.to_owned()).header();
        assert_eq!(header("order 4711").unwrap(), "\"order 4711\"");
        assert_eq!(header(r#"a"b\c"#).unwrap(), r#""a\"b\\c""#);
        for wrong in ["", "naïve", "two\nlines", &"x".repeat(256)] {
            assert!(matches!(header(wrong), Err(Error::Invalid(_))), "{wrong:?}");
        }
    }

    #[test]
    fn only_methods_that_are_not_idempotent_get_a_key() {
        let key = Key::generate_for(&Method::POST).unwrap();
        assert_ne!(Some(key), Key::generate_for(&Method::POST));
        assert!(Key::generate_for(&Method::PATCH).is_some());
        assert!(Key::generate_for(&Method::from_bytes(b"LOCK").unwrap()).is_some());
        for method in [
            Method::GET,
            Method::HEAD,
            Method::PUT,
            Method::DELETE,
            Method::OPTIONS,
        ] {
            assert_eq!(Key::generate_for(&method), None);
        }
    }
}
