//! Messages whose headers the NATS client cannot read.
//!
//! A server stores any bytes as headers. Some of them break the client's connection, others end the client, and the
//! message would come again for ever. Asked for by sequence the server answers in JSON, so such a message can be found
//! among those that were delivered and not acknowledged, and go the way of every message that cannot be handled.

use std::str::FromStr;

use anyhow::{Context, Result};
use async_nats::header::{HeaderName, HeaderValue};
use async_nats::{StatusCode, Subject};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Bus;
use super::pull::{Subscription, Unread};

/// How many messages are looked at; a consumer rarely has more out.
const LOOK_AT_MAX: u64 = 20_000;

impl Bus {
    /// The messages this subscription was given, has not acknowledged, and cannot read.
    pub(super) async fn find_unreadable(&self, subscription: &Subscription) -> Result<Vec<Unread>> {
        let stream = self.context.get_stream_no_info(&subscription.stream).await.context("open the stream")?;
        let info = stream.consumer_info(&subscription.durable).await.context("look at the consumer")?;
        if info.num_ack_pending == 0 {
            return Ok(Vec::new());
        }
        let first = info.ack_floor.stream_sequence + 1;
        let last = info.delivered.stream_sequence.min(first + LOOK_AT_MAX);
        let mut unreadable = Vec::new();
        for sequence in first..=last {
            let Some(raw) = self.raw_message(&subscription.stream, sequence).await? else { continue };
            let block = STANDARD.decode(&raw.hdrs).context("decode a message's headers")?;
            let Some(why) = why_unreadable(&block) else { continue };
            unreadable.push(Unread {
                sequence,
                stored_at: raw.time,
                subject: raw.subject,
                headers: String::from_utf8_lossy(&block).into_owned(),
                body: STANDARD.decode(&raw.data).context("decode a message's body")?.into(),
                why,
                reply: Subject::from(format!(
                    "$JS.ACK.{}.{}.1.{sequence}.{sequence}.{}.0",
                    subscription.stream,
                    subscription.durable,
                    raw.time.as_nanosecond()
                )),
            });
        }
        Ok(unreadable)
    }
}

/// What is wrong with a header block, by the rules of the client that reads it; none when it can be read.
fn why_unreadable(block: &[u8]) -> Option<String> {
    if block.is_empty() {
        return None;
    }
    let Ok(text) = std::str::from_utf8(block) else {
        return Some("the headers are not UTF-8".to_owned());
    };
    let mut lines = text.lines();
    let Some(status) = lines.next().unwrap_or_default().strip_prefix("NATS/1.0").map(str::trim) else {
        return Some("the headers do not begin with NATS/1.0".to_owned());
    };
    let code = status.split(' ').next().unwrap_or_default();
    if !code.is_empty() && code.parse::<StatusCode>().is_err() {
        return Some("the headers begin with a status that is no number".to_owned());
    }
    lines.filter(|line| !line.is_empty()).find_map(|line| {
        if line.starts_with(char::is_whitespace) {
            return HeaderValue::from_str(line).err().map(|_| "a header's value has a line break".to_owned());
        }
        let shown = line.escape_debug().to_string();
        match line.split_once(':') {
            None => Some(format!("the header line `{shown}` has no colon")),
            Some((name, _)) if HeaderName::from_str(name).is_err() => {
                Some(format!("the header line `{shown}` has a malformed name"))
            }
            Some((_, value)) if HeaderValue::from_str(value.trim()).is_err() => {
                Some(format!("the header line `{shown}` has a line break in its value"))
            }
            Some(_) => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_headers_that_break_the_client_are_unreadable() {
        for good in ["", "NATS/1.0\r\n\r\n", "NATS/1.0\r\nA: b\r\nC:\r\n\r\n", "NATS/1.0 503 No\r\nA: b\r\n\r\n"] {
            assert_eq!(why_unreadable(good.as_bytes()), None, "{good:?}");
        }
        for bad in ["HTTP/1.1\r\n", "NATS/1.0\r\nA b\r\n", "NATS/1.0\r\nA b: c\r\n", "NATS/1.0\r\nA: b\rc\r\n\r\n"] {
            assert!(why_unreadable(bad.as_bytes()).is_some(), "{bad:?}");
        }
        assert!(why_unreadable(b"NATS/1.0\r\nA: \xff\r\n\r\n").is_some());
    }
}
