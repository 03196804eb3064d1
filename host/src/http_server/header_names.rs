//! Header names in the case in which the client sent them.
//!
//! HTTP compares names without regard to case, and the `http` crate stores them in lower case.
//! Message headers are case sensitive. hyper keeps the original names in a request extension that
//! only its own client can read. The client therefore writes the head once more, into memory, and
//! the names are parsed from there.

use axum::http::HeaderMap;
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::Empty;
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, DuplexStream};

/// The size of the in-memory pipe for the head, in bytes.
const BUFFER: usize = 64 << 10;

/// The names of the headers that begin with `prefix` (in lower case), one for each value, in the
/// order of the request's header map. A name whose original case is unknown is in lower case.
pub async fn original_header_names(parts: &Parts, prefix: &str) -> Vec<String> {
    let mut headers = HeaderMap::new();
    for (name, value) in parts
        .headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with(prefix))
    {
        headers.append(name.clone(), value.clone());
    }
    let in_lower_case: Vec<String> = headers.iter().map(|(name, _)| name.to_string()).collect();
    if in_lower_case.is_empty() {
        return in_lower_case;
    }
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.extensions_mut() = parts.extensions.clone();
    *request.headers_mut() = headers;
    let written = write(request)
        .await
        .map(|head| parse_names(&head, prefix))
        .unwrap_or_default();
    let is_same = |(written, lower): (&String, &String)| written.eq_ignore_ascii_case(lower);
    let are_same =
        written.len() == in_lower_case.len() && written.iter().zip(&in_lower_case).all(is_same);
    if are_same { written } else { in_lower_case }
}

/// The head of a request as written by hyper's client.
async fn write(request: Request<Empty<Bytes>>) -> Option<Vec<u8>> {
    let (near, mut far) = tokio::io::duplex(BUFFER);
    let mut client = http1::Builder::new();
    let (mut sender, connection) = client
        .preserve_header_case(true)
        .handshake(TokioIo::new(near))
        .await
        .ok()?;
    let sending = async { tokio::join!(connection, sender.send_request(request)) };
    tokio::select! {
        head = read_head(&mut far) => head,
        _ = sending => None,
    }
}

async fn read_head(stream: &mut DuplexStream) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

fn parse_names(head: &[u8], prefix: &str) -> Vec<String> {
    let names = head
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b':').next());
    let names = names.filter_map(|name| std::str::from_utf8(name).ok());
    let has_prefix = |name: &&str| {
        name.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    names.filter(has_prefix).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_names_are_read_from_a_request_head() {
        let head = b"POST / HTTP/1.1\r\nX-Message-Kind: a:b\r\nx-MESSAGE-ce-id:\r\nOther: X-Message-No\r\n\r\n";
        assert_eq!(
            parse_names(head, "x-message-"),
            ["X-Message-Kind", "x-MESSAGE-ce-id"]
        );
    }

    #[tokio::test]
    async fn unknown_names_are_in_lower_case() {
        let (parts, ()) = Request::builder()
            .header("X-Message-Kind", "a")
            .body(())
            .unwrap()
            .into_parts();
        assert_eq!(
            original_header_names(&parts, "x-message-").await,
            ["x-message-kind"]
        );
    }
}
