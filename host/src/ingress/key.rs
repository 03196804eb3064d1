//! The idempotency key and the caller of a request.

use axum::http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};

use super::problem::Problem;

/// The longest key, in bytes.
const KEY_MAX: usize = 255;

const HEADER: &str = "idempotency-key";

/// The idempotency key of a request.
///
/// The IETF draft requires a structured-field string (RFC 8941). Most clients send the same text
/// without quotes, which is accepted as well.
pub(super) fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Problem::key_invalid("the header occurs more than once"));
    }
    let text = value
        .to_str()
        .map_err(|_| Problem::key_invalid("it has characters that are not printable ASCII"))?;
    let key = match text.trim().strip_prefix('"') {
        Some(quoted) => {
            unquoted(quoted).ok_or_else(|| Problem::key_invalid("its quotes do not match"))?
        }
        None => text.trim().to_owned(),
    };
    match key.len() {
        0 => Err(Problem::key_invalid("it is empty")),
        1..=KEY_MAX => Ok(Some(key)),
        _ => Err(Problem::key_invalid("it is longer than 255 bytes")),
    }
}

/// The text before the closing quote. Parameters after it are ignored.
fn unquoted(text: &str) -> Option<String> {
    let mut key = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next()? {
            '"' => break,
            '\\' => key.push(
                chars
                    .next()
                    .filter(|escaped| matches!(escaped, '"' | '\\'))?,
            ),
            other => key.push(other),
        }
    }
    let rest = chars.as_str().trim_start();
    (rest.is_empty() || rest.starts_with(';')).then_some(key)
}

/// The caller, as a digest of the header that identifies it; empty without that header.
///
/// Keys of different callers are independent.
pub(super) fn caller(headers: &HeaderMap, header: Option<&str>) -> String {
    let name = header.unwrap_or("authorization");
    if !headers.contains_key(name) {
        return String::new();
    }
    let mut digest = LabelledDigest::default();
    digest.header(headers, name);
    digest.hex()
}

/// A digest over named lists of values.
///
/// A length precedes every name and value, and a count every list. So different inputs never have
/// the same bytes.
#[derive(Default)]
pub(super) struct LabelledDigest(Sha256);

impl LabelledDigest {
    pub fn add<'v>(&mut self, name: &str, values: impl IntoIterator<Item = &'v [u8]>) {
        let values: Vec<&[u8]> = values.into_iter().collect();
        self.put(name.as_bytes());
        self.0.update((values.len() as u64).to_be_bytes());
        values.into_iter().for_each(|value| self.put(value));
    }

    /// All values of a header, in order.
    pub fn header(&mut self, headers: &HeaderMap, name: &str) {
        self.add(
            name,
            headers.get_all(name).iter().map(HeaderValue::as_bytes),
        );
    }

    pub fn hex(self) -> String {
        hex::encode(self.0.finalize())
    }

    fn put(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(values: &[&str]) -> Result<Option<String>, String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(HEADER, HeaderValue::from_str(value).unwrap());
        }
        key(&headers).map_err(|problem| problem.detail)
    }

    #[test]
    fn quoted_and_bare_keys_are_the_same() {
        assert_eq!(parse(&[]), Ok(None));
        for same in ["8e03", "\"8e03\"", " \"8e03\" ", "\"8e03\"; v=1"] {
            assert_eq!(parse(&[same]), Ok(Some("8e03".to_owned())), "{same}");
        }
        assert_eq!(parse(&[r#""a\"b\\c""#]), Ok(Some(r#"a"b\c"#.to_owned())));
    }

    #[test]
    fn a_digest_distinguishes_names_counts_and_bounds() {
        let digest = |lists: &[(&str, &[&str])]| {
            let mut digest = LabelledDigest::default();
            lists.iter().for_each(|(name, values)| {
                digest.add(name, values.iter().map(|value| value.as_bytes()))
            });
            digest.hex()
        };
        let all = [
            digest(&[("authorization", &["x"]), ("cookie", &[])]),
            digest(&[("authorization", &[]), ("cookie", &["x"])]),
            digest(&[("authorization", &["x"]), ("cookie", &[""])]),
            digest(&[("authorization", &["x", "y"]), ("cookie", &[])]),
            digest(&[("authorization", &["xy"]), ("cookie", &[])]),
            digest(&[("authorization", &["x", "cookie"])]),
        ];
        let different: std::collections::BTreeSet<&String> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }

    #[test]
    fn the_caller_includes_all_values_of_a_header() {
        let caller_of = |header: &str, values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("x-user", HeaderValue::from_str(value).unwrap());
            }
            caller(&headers, Some(header))
        };
        assert_eq!(caller_of("x-user", &[]), "");
        assert_ne!(caller_of("x-user", &[""]), "");
        assert_ne!(
            caller_of("x-user", &["proxy", "alice"]),
            caller_of("x-user", &["proxy", "bob"])
        );
        assert_ne!(
            caller_of("x-user", &["alice"]),
            caller_of("x-user", &["alice", "bob"])
        );
    }

    #[test]
    fn invalid_keys_are_refused() {
        let long = "x".repeat(KEY_MAX + 1);
        for odd in ["", "\"\"", "\"8e03", r#""8e03\x""#, "\"8e03\" rest", &long] {
            assert!(parse(&[odd]).is_err(), "{odd}");
        }
        assert!(parse(&["a", "b"]).is_err());
        assert!(parse(&["x".repeat(KEY_MAX).as_str()]).is_ok());
    }
}
