//! The `Idempotency-Key` of an operation, which identifies its tries to the server.

use reqwest::Method;
use reqwest::header::HeaderValue;

use crate::Error;

pub(crate) const HEADER: &str = "idempotency-key";

/// The longest key, in characters. Servers refuse longer ones.
const LENGTH_MAX: usize = 255;

/// The key of one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Key {
    /// Generated for this operation, so no other operation can have used it.
    Generated(String),
    /// Provided by the caller.
    Provided(String),
}

impl Key {
    /// The key of an operation whose caller provides none. Idempotent methods need no key.
    pub fn generate_for(method: &Method) -> Option<Self> {
        (!method.is_idempotent()).then(|| Key::Generated(uuid::Uuid::new_v4().to_string()))
    }

    pub fn as_str(&self) -> &str {
        match self {
            Key::Generated(text) | Key::Provided(text) => text,
        }
    }

    /// The key in the form of the draft: a quoted string of RFC 9651.
    pub fn header(&self) -> Result<HeaderValue, Error> {
        let text = self.as_str();
        let printable = text.chars().all(|c| c == ' ' || c.is_ascii_graphic());
        if text.is_empty() || text.len() > LENGTH_MAX || !printable {
            return Err(Error::Invalid(format!(
                "invalid key {text:?}: a key has 1 to {LENGTH_MAX} printable ASCII characters"
            )));
        }
        let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        HeaderValue::try_from(quoted).map_err(|_| Error::Invalid(format!("invalid key {text:?}")))
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
