//! The idempotency key of a request, and who sent it.

use axum::http::HeaderMap;
use sha2::{Digest, Sha256};

use super::problem::Problem;

/// The longest key, in bytes.
const KEY_MAX: usize = 255;

const HEADER: &str = "idempotency-key";

/// The key: a structured-field string (RFC 8941), as the draft has it, or the same without quotes, as most clients send it.
pub(super) fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::key_invalid("the header is there twice"));
    }
    let text = value.to_str().map_err(|_| Problem::key_invalid("it has characters that are not printable ASCII"))?;
    let key = match text.trim().strip_prefix('"') {
        Some(quoted) => unquoted(quoted).ok_or_else(|| Problem::key_invalid("its quotes do not match"))?,
        None => text.trim().to_owned(),
    };
    match key.len() {
        0 => Err(Problem::key_invalid("it is empty")),
        1..=KEY_MAX => Ok(Some(key)),
        _ => Err(Problem::key_invalid("it is longer than 255 bytes")),
    }
}

/// What stands before the closing quote; parameters behind it say nothing to us.
fn unquoted(text: &str) -> Option<String> {
    let mut key = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next()? {
            '"' => break,
            '\\' => key.push(chars.next().filter(|escaped| matches!(escaped, '"' | '\\'))?),
            other => key.push(other),
        }
    }
    let rest = chars.as_str().trim_start();
    (rest.is_empty() || rest.starts_with(';')).then_some(key)
}

/// Who asks: a digest of the header that says so, empty when it is not there. A key is the caller's own.
pub(super) fn caller(headers: &HeaderMap, header: Option<&str>) -> String {
    match headers.get(header.unwrap_or("authorization")) {
        Some(value) => hex::encode(Sha256::digest(value.as_bytes())),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn of(values: &[&str]) -> Result<Option<String>, String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(HEADER, HeaderValue::from_str(value).unwrap());
        }
        key(&headers).map_err(|problem| problem.detail)
    }

    #[test]
    fn quoted_and_bare_keys_are_the_same() {
        assert_eq!(of(&[]), Ok(None));
        for same in ["8e03", "\"8e03\"", " \"8e03\" ", "\"8e03\"; v=1"] {
            assert_eq!(of(&[same]), Ok(Some("8e03".to_owned())), "{same}");
        }
        assert_eq!(of(&[r#""a\"b\\c""#]), Ok(Some(r#"a"b\c"#.to_owned())));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let long = "x".repeat(KEY_MAX + 1);
        for odd in ["", "\"\"", "\"8e03", r#""8e03\x""#, "\"8e03\" rest", &long] {
            assert!(of(&[odd]).is_err(), "{odd}");
        }
        assert!(of(&["a", "b"]).is_err());
        assert!(of(&["x".repeat(KEY_MAX).as_str()]).is_ok());
    }
}
