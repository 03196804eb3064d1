//! Decoding of subjects and header blocks as a server delivers them, and the check that a handler
//! can receive them.

use std::str::FromStr;

use async_nats::header::{HeaderName, HeaderValue};
use async_nats::{HeaderMap, StatusCode};

/// A decoded header block.
#[derive(Debug, Default)]
pub(super) struct HeaderBlock {
    pub status: Option<StatusCode>,
    pub description: String,
    pub headers: HeaderMap,
}

/// Decodes a header block; an empty block has no headers. The error is the reason, in words.
pub(super) fn decode_headers(block: &[u8]) -> Result<HeaderBlock, String> {
    if block.is_empty() {
        return Ok(HeaderBlock::default());
    }
    let text = std::str::from_utf8(block).map_err(|_| "the headers are not UTF-8".to_owned())?;
    let mut lines = text.lines().peekable();
    let status = lines.next().unwrap_or_default().strip_prefix("NATS/1.0");
    let status = status
        .map(str::trim)
        .ok_or_else(|| "the headers do not begin with NATS/1.0".to_owned())?;
    let (code, description) = status.split_once(' ').unwrap_or((status, ""));
    let status = match code.trim() {
        "" => None,
        code => Some(
            code.parse()
                .map_err(|_| "the status of the headers is no number".to_owned())?,
        ),
    };

    // Header lines, with continuation lines.
    let mut headers = HeaderMap::new();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let shown = line.escape_debug().to_string();
        let (name, value) = line
            .split_once(':')
            .ok_or_else(|| format!("the header line `{shown}` has no colon"))?;
        let name = HeaderName::from_str(name)
            .map_err(|_| format!("the header line `{shown}` has a malformed name"))?;
        let mut value = value.to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        let value = HeaderValue::from_str(value.trim());
        headers.append(
            name,
            value
                .map_err(|_| format!("the header line `{shown}` has a line break in its value"))?,
        );
    }
    Ok(HeaderBlock {
        status,
        description: description.trim().to_owned(),
        headers,
    })
}

/// Whether a message with this header block and body is a delete marker. The server writes markers
/// in place of messages that it removed.
pub(super) fn is_delete_marker(block: &[u8], body: &[u8]) -> bool {
    // Empty messages are rare, so headers are rarely decoded twice.
    body.is_empty()
        && decode_headers(block)
            .is_ok_and(|block| block.headers.get("Nats-Marker-Reason").is_some())
}

/// Decodes a subject. If no handler can receive it, the error holds its printable part and the
/// reason.
pub(super) fn decode_subject(subject: &[u8]) -> Result<String, (String, String)> {
    let text = String::from_utf8_lossy(subject);
    let shown = || text.replace(char::is_control, "\u{fffd}");
    if std::str::from_utf8(subject).is_err() {
        Err((shown(), "the subject is not UTF-8".to_owned()))
    } else if text.contains(char::is_control) {
        Err((
            shown(),
            "the subject contains a control character".to_owned(),
        ))
    } else {
        Ok(text.into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_block_is_read_as_the_client_library_does() {
        for good in [
            "",
            "NATS/1.0\r\n\r\n",
            "NATS/1.0\r\nA: b\r\nC:\r\n\r\n",
            "NATS/1.0 503 No\r\nA: b\r\n\r\n",
        ] {
            assert!(decode_headers(good.as_bytes()).is_ok(), "{good:?}");
        }
        let block =
            decode_headers(b"NATS/1.0 409 Message Size\r\nA: b\r\n c\r\nA: d\r\n\r\n").unwrap();
        assert_eq!(block.status.map(|status| status.as_u16()), Some(409));
        assert_eq!(block.description, "Message Size");
        let values: Vec<&str> = block
            .headers
            .get_all("A")
            .map(|value| value.as_str())
            .collect();
        assert_eq!(values, ["b c", "d"]);
    }

    #[test]
    fn a_malformed_header_block_is_reported() {
        for (bad, says) in [
            (&b"HTTP/1.1\r\n"[..], "NATS/1.0"),
            (b"NATS/1.0\r\nA b\r\n", "no colon"),
            (b"NATS/1.0\r\nA b: c\r\n", "malformed name"),
            (b"NATS/1.0\r\nA: b\rc\r\n\r\n", "line break"),
            (b"NATS/1.0\r\nA: \xff\r\n\r\n", "not UTF-8"),
            (b"NATS/1.0 abc\r\n\r\n", "no number"),
        ] {
            let why = decode_headers(bad).map(drop).unwrap_err();
            assert!(why.contains(says), "{}: {why}", bad.escape_ascii());
        }
    }

    #[test]
    fn unreadable_subjects_are_decoded_without_control_characters() {
        assert_eq!(
            decode_subject("n.ü\u{2003}".as_bytes()),
            Ok("n.ü\u{2003}".to_owned())
        );
        for bad in [
            &b"n.\xff\xfe"[..],
            b"n.caf\xe9",
            b"n.\0",
            b"n.a\rb",
            b"n.\x0b",
            b"n.\xff\0",
        ] {
            let (shown, _) = decode_subject(bad).unwrap_err();
            assert!(
                shown.starts_with("n.") && !shown.contains(char::is_control),
                "{shown:?}"
            );
        }
    }
}
