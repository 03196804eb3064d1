//! Request and response bodies: their timeouts, and the limit on their bytes in memory.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use super::connections::BusyGuard;

/// The lowest average rate at which a body must be transferred, in bytes per second.
const RATE_MIN: u32 = 16 << 10;

/// How much of a response is handed to the connection at once, in bytes. The rest counts as held in
/// memory.
const CHUNK_MAX: usize = 64 << 10;

/// The new deadline for the next bytes, after `bytes` were transferred under the old `deadline`. A
/// body below the lowest rate uses up its timeout, and no pause may exceed the timeout.
pub(super) fn extend_deadline(deadline: Instant, bytes: usize, timeout: Duration) -> Instant {
    let earned = Duration::from_secs(bytes as u64) / RATE_MIN;
    (deadline + earned).min(Instant::now() + timeout)
}

/// The limit on the bytes of bodies that one listener may hold.
pub(super) struct Memory {
    used: AtomicUsize,
    max: usize,
}

/// The bytes of one request's body. They count until the last clone is dropped, so the body has to
/// travel with a clone.
#[derive(Clone)]
pub struct BodyMemory(Arc<HeldBytes>);

/// Bytes that count as in memory until this is dropped.
struct HeldBytes {
    memory: Arc<Memory>,
    bytes: AtomicUsize,
}

/// The reason why a body was not read to its end.
#[derive(Debug)]
pub enum BodyError {
    /// It arrived below the lowest rate.
    TooSlow,
    /// Other bodies use all the memory for bodies.
    NoMemory,
    Incomplete(hyper::Error),
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BodyError::TooSlow => f.write_str("the body arrived too slowly (`http_body_timeout`)"),
            BodyError::NoMemory => {
                f.write_str("the bodies of other requests use all the memory (`http_memory`)")
            }
            BodyError::Incomplete(_) => f.write_str("the body is incomplete"),
        }
    }
}

impl std::error::Error for BodyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            BodyError::Incomplete(error) => Some(error),
            BodyError::TooSlow | BodyError::NoMemory => None,
        }
    }
}

impl Memory {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Memory {
            used: AtomicUsize::new(0),
            max,
        })
    }
}

impl HeldBytes {
    fn new(memory: &Arc<Memory>) -> Self {
        HeldBytes {
            memory: Arc::clone(memory),
            bytes: AtomicUsize::new(0),
        }
    }

    /// Counts further bytes if they fit.
    fn try_add(&self, bytes: usize) -> bool {
        let with = |used: usize| {
            used.checked_add(bytes)
                .filter(|used| *used <= self.memory.max)
        };
        let is_added = self
            .memory
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, with)
            .is_ok();
        if is_added {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        is_added
    }

    /// Counts further bytes that are already in memory.
    fn add(&self, bytes: usize) {
        self.memory.used.fetch_add(bytes, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.memory
            .used
            .fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

impl BodyMemory {
    pub(super) fn new(memory: &Arc<Memory>) -> Self {
        BodyMemory(Arc::new(HeldBytes::new(memory)))
    }
}

/// The body of a request, with its timeout and memory limit enforced.
pub(super) struct RequestBody {
    incoming: Incoming,
    memory: BodyMemory,
    timeout: Duration,
    deadline: Instant,
    /// Created on the first wait.
    timer: Option<Pin<Box<Sleep>>>,
}

impl RequestBody {
    pub fn new(incoming: Incoming, memory: BodyMemory, timeout: Duration) -> Self {
        RequestBody {
            incoming,
            memory,
            timeout,
            deadline: Instant::now() + timeout,
            timer: None,
        }
    }

    fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = self.deadline;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(cx)
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) else {
            ready!(self.poll_too_slow(cx));
            return Poll::Ready(Some(Err(BodyError::TooSlow)));
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(BodyError::Incomplete(error)))),
            None => return Poll::Ready(None),
        };
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        self.deadline = extend_deadline(self.deadline, bytes, self.timeout);
        let has_room = self.memory.0.try_add(bytes);
        Poll::Ready(Some(if has_room {
            Ok(frame)
        } else {
            Err(BodyError::NoMemory)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// The body of a response, in chunks. Until all are written, the connection is busy and their bytes
/// count.
pub(super) struct ResponseBody {
    body: Body,
    /// The rest of the last frame.
    rest: Bytes,
    _held: HeldBytes,
    _busy: BusyGuard,
}

impl ResponseBody {
    pub fn new(body: Body, memory: &Arc<Memory>, busy: BusyGuard) -> Self {
        let held = HeldBytes::new(memory);
        // The response and its effects are committed, so it can no longer be refused.
        held.add(usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX));
        ResponseBody {
            body,
            rest: Bytes::new(),
            _held: held,
            _busy: busy,
        }
    }

    fn next_chunk(&mut self) -> Frame<Bytes> {
        let length = self.rest.len().min(CHUNK_MAX);
        Frame::data(self.rest.split_to(length))
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx))
                .transpose()?
                .map(Frame::into_data)
            {
                Some(Ok(data)) => self.rest = data,
                Some(Err(other)) => return Poll::Ready(Some(Ok(other))),
                None => return Poll::Ready(None),
            }
        }
        Poll::Ready(Some(Ok(self.next_chunk())))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut with_rest = SizeHint::new();
        with_rest.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            with_rest.set_upper(upper + rest);
        }
        with_rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_free_again_when_the_last_clone_is_dropped() {
        let memory = Memory::new(100);
        let (one, other) = (BodyMemory::new(&memory), BodyMemory::new(&memory));
        assert!(one.0.try_add(60) && !other.0.try_add(41) && other.0.try_add(40));
        let clone = one.clone();
        drop(one);
        assert!(!other.0.try_add(1));
        drop(clone);
        assert!(other.0.try_add(60) && !other.0.try_add(usize::MAX));
        drop(other);
        assert_eq!(memory.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn bytes_earn_time_at_16_kib_a_second_up_to_the_timeout() {
        let timeout = Duration::from_secs(30);
        let left = |deadline: Instant| (deadline - Instant::now()).as_secs_f64().round();
        let soon = Instant::now() + Duration::from_secs(10);
        assert_eq!(left(extend_deadline(soon, 16 << 10, timeout)), 11.0);
        assert_eq!(left(extend_deadline(soon, 0, timeout)), 10.0);
        assert_eq!(left(extend_deadline(soon, 64 << 20, timeout)), 30.0);
    }
}
