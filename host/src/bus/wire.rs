//! The part of the NATS protocol that the reading connection receives, with subjects and headers as
//! bytes.
//!
//! A server stores any bytes except line feeds in headers, and any except spaces, tabs and line
//! feeds in subjects. The client library closes its connection at bytes it cannot parse, and again
//! at each redelivery.

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes, BytesMut};

/// The longest line that a server sends, in bytes: the `INFO` line.
const LINE_MAX: usize = 1 << 20;

/// The largest message with its headers, in bytes; servers allow 64 MiB at most.
const MESSAGE_MAX: usize = 128 << 20;

/// An operation that a server sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// The server information, in JSON.
    Info(Bytes),
    Ping,
    Pong,
    Ok,
    Error(String),
    Message(IncomingMessage),
}

/// A message as received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IncomingMessage {
    /// The id of its subscription.
    pub sid: u64,
    pub subject: Bytes,
    pub reply: Option<String>,
    /// The header block; empty when there is none.
    pub headers: Bytes,
    pub body: Bytes,
}

/// Takes the first operation from a buffer; `None` until it is complete. After an error the
/// connection is unusable.
pub(super) fn next_op(buffer: &mut BytesMut) -> Result<Option<Op>> {
    let Some(end) = buffer.windows(2).position(|two| two == b"\r\n") else {
        ensure!(
            buffer.len() <= LINE_MAX,
            "the server sent a line longer than {LINE_MAX} bytes ({})",
            buffer.len()
        );
        return Ok(None);
    };
    let line = buffer.get(..end).unwrap_or_default();
    let space = line.iter().position(|byte| *byte == b' ').unwrap_or(end);
    let (verb, rest) = line.split_at(space);
    let rest = rest.trim_ascii();
    let op = match verb {
        b"MSG" => return message(buffer, end, false),
        b"HMSG" => return message(buffer, end, true),
        b"PING" => Op::Ping,
        b"PONG" => Op::Pong,
        b"+OK" => Op::Ok,
        b"-ERR" => Op::Error(String::from_utf8_lossy(rest).trim_matches('\'').to_owned()),
        b"INFO" => Op::Info(Bytes::copy_from_slice(rest)),
        _ => bail!(
            "the server sent an unknown operation: `{}`",
            line.escape_ascii()
        ),
    };
    buffer.advance(end + 2);
    Ok(Some(op))
}

/// `MSG subject sid [reply] size`, or `HMSG subject sid [reply] header-size size`, then that many
/// bytes.
fn message(buffer: &mut BytesMut, end: usize, has_headers: bool) -> Result<Option<Op>> {
    let line = buffer.get(..end).unwrap_or_default();
    let malformed = || format!("parse the line `{}`", line.escape_ascii());
    // Only spaces separate the words: a subject may contain any other byte.
    let words: Vec<&[u8]> = line
        .split(|byte| *byte == b' ')
        .filter(|word| !word.is_empty())
        .skip(1)
        .collect();
    let (subject, sid, reply, header_size, size) = match (has_headers, words.as_slice()) {
        (false, [subject, sid, size]) => (subject, sid, None, None, size),
        (false, [subject, sid, reply, size]) => (subject, sid, Some(reply), None, size),
        (true, [subject, sid, header, size]) => (subject, sid, None, Some(header), size),
        (true, [subject, sid, reply, header, size]) => {
            (subject, sid, Some(reply), Some(header), size)
        }
        _ => bail!(malformed()),
    };

    // Wait for the complete message.
    let size = number(size).with_context(malformed)?;
    let header_size = header_size
        .map_or(Ok(0), |size| number(size))
        .with_context(malformed)?;
    ensure!(header_size <= size && size <= MESSAGE_MAX, malformed());
    let whole = end + 2 + size + 2;
    if buffer.len() < whole {
        let missing = whole - buffer.len();
        buffer.reserve(missing);
        return Ok(None);
    }

    // Split it off the buffer.
    let sid = number(sid).with_context(malformed)? as u64;
    let subject = Bytes::copy_from_slice(subject);
    let reply = reply.map(|reply| String::from_utf8_lossy(reply).into_owned());
    buffer.advance(end + 2);
    let headers = buffer.split_to(header_size).freeze();
    let body = buffer.split_to(size - header_size).freeze();
    buffer.advance(2);
    Ok(Some(Op::Message(IncomingMessage {
        sid,
        subject,
        reply,
        headers,
        body,
    })))
}

fn number(word: &[u8]) -> Result<usize> {
    Ok(std::str::from_utf8(word)?.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops(bytes: &[u8]) -> Vec<Op> {
        let mut buffer = BytesMut::from(bytes);
        std::iter::from_fn(|| next_op(&mut buffer).unwrap()).collect()
    }

    fn subject(bytes: &[u8]) -> Bytes {
        match ops(bytes).remove(0) {
            Op::Message(message) => message.subject,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_operation_is_parsed_and_partial_input_waits() {
        let bytes = b"INFO {\"nonce\":\"n\"}\r\nPING\r\nPONG\r\n+OK\r\n-ERR 'Stale Connection'\r\n\
            MSG a.b 1 2\r\nhi\r\nMSG a.b 1 $JS.ACK.x 0\r\n\r\nHMSG a 7 12 14\r\nNATS/1.0\r\n\r\nhi\r\n";
        let seen = ops(bytes);
        assert_eq!(seen.len(), 8);
        assert_eq!(seen[0], Op::Info(Bytes::from_static(b"{\"nonce\":\"n\"}")));
        assert_eq!(seen[4], Op::Error("Stale Connection".to_owned()));
        let Op::Message(last) = &seen[7] else {
            panic!("{seen:?}")
        };
        assert_eq!(
            (last.sid, last.headers.as_ref(), last.body.as_ref()),
            (7, b"NATS/1.0\r\n\r\n".as_slice(), b"hi".as_slice())
        );
        for cut in 0..bytes.len() {
            let mut buffer = BytesMut::from(&bytes[..cut]);
            let first = std::iter::from_fn(|| next_op(&mut buffer).unwrap()).count();
            buffer.extend_from_slice(&bytes[cut..]);
            let rest = std::iter::from_fn(|| next_op(&mut buffer).unwrap()).count();
            assert_eq!(first + rest, 8, "cut at {cut}");
        }
    }

    #[test]
    fn a_subject_may_contain_any_byte_that_a_server_accepts() {
        for hostile in [
            &b"n.\xff\xfe"[..],
            b"n.caf\xe9",
            b"n.a\rb",
            b"n.\x0b\x0c",
            "n.\u{a0}\u{2003}".as_bytes(),
            b"n.\0",
        ] {
            let message = [b"MSG ", hostile, b" 1 $JS.ACK.x 0\r\n\r\n"].concat();
            assert_eq!(subject(&message), hostile);
            let message = [
                b"HMSG ",
                hostile,
                b" 1 $JS.ACK.x 12 12\r\nNATS/1.0\r\n\r\n\r\n",
            ]
            .concat();
            assert_eq!(subject(&message), hostile);
        }
    }

    #[test]
    fn malformed_operations_end_the_connection() {
        for bad in [
            &b"HELLO\r\n"[..],
            b"MSG a\r\n",
            b"MSG a 1 x\r\n",
            b"HMSG a 1 5 2\r\n",
            b"MSG a 1 999999999999\r\n",
        ] {
            assert!(
                next_op(&mut BytesMut::from(bad)).is_err(),
                "{}",
                bad.escape_ascii()
            );
        }
        assert!(next_op(&mut BytesMut::from(vec![b'x'; LINE_MAX + 1].as_slice())).is_err());
    }
}
