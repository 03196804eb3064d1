//! The open connections of one listener: their number, their phases and their timeouts.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, Sleep};

use super::body::extend_deadline;
use crate::config::HttpLimits;

/// The shortest interval between two warnings of a listener.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The open connections of one listener.
pub(super) struct Connections {
    name: &'static str,
    limits: HttpLimits,
    open: Mutex<Vec<Arc<Connection>>>,
    /// Notified when a connection has ended, or has begun to wait for a request.
    changed: Arc<Notify>,
    warned_at: Mutex<Option<Instant>>,
}

/// The slot of one open connection, released on drop.
pub(super) struct ConnectionSlot {
    connections: Arc<Connections>,
    connection: Arc<Connection>,
}

/// The state of one connection.
pub(super) struct Connection {
    limits: HttpLimits,
    state: Mutex<State>,
    /// Requests a close, which happens if the connection still waits for a request.
    close: Notify,
    changed: Arc<Notify>,
}

struct State {
    phase: Phase,
    /// When the phase began.
    since: Instant,
    /// The deadline for the bytes that are being written; `None` if there are none.
    write_deadline: Option<Instant>,
    is_closing: bool,
}

/// The phases of a connection: `New`, `Head`, `Busy`, `Idle`, and then `Head` again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No byte received yet.
    New,
    /// A head is partly received.
    Head,
    /// A request is being handled, or its response is being written.
    Busy,
    /// Between two requests.
    Idle,
}

/// Keeps a connection busy, from the head of a request to the last chunk of its response.
pub(super) struct BusyGuard(Arc<Connection>);

impl Connections {
    pub fn new(name: &'static str, limits: HttpLimits) -> Self {
        Connections {
            name,
            limits,
            open: Mutex::default(),
            changed: Arc::new(Notify::new()),
            warned_at: Mutex::new(None),
        }
    }

    /// Acquires a slot for one more connection. At the limit, the connection that has waited
    /// longest for a request is closed for it. While all are busy, this waits.
    pub async fn acquire_slot(self: &Arc<Self>) -> ConnectionSlot {
        loop {
            if let Some(slot) = self.try_acquire_slot() {
                return slot;
            }
            self.changed.notified().await;
        }
    }

    /// Returns once the last connection has ended.
    pub async fn wait_until_closed(&self) {
        while !self.lock().is_empty() {
            self.changed.notified().await;
        }
    }

    /// Closes the connection that has waited longest: `accept` fails when no file descriptor is
    /// left.
    pub fn free_file_descriptor(&self, error: &io::Error) {
        if self.take_warning_turn() {
            tracing::warn!(listener = self.name, %error, "accept failed, retrying");
        }
        close_longest_waiting(&self.lock());
    }

    fn try_acquire_slot(self: &Arc<Self>) -> Option<ConnectionSlot> {
        let mut open = self.lock();
        if open.len() < self.limits.connections {
            let connection = Arc::new(Connection::new(self.limits, Arc::clone(&self.changed)));
            open.push(Arc::clone(&connection));
            return Some(ConnectionSlot {
                connections: Arc::clone(self),
                connection,
            });
        }
        if self.take_warning_turn() {
            let connections = self.limits.connections;
            tracing::warn!(
                listener = self.name,
                connections,
                "connection limit reached, closing idle connections"
            );
        }
        close_longest_waiting(&open);
        None
    }

    /// Whether a warning is due. If so, the next one is due after [`WARN_INTERVAL`].
    fn take_warning_turn(&self) -> bool {
        let mut warned_at = self
            .warned_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_due = warned_at.is_none_or(|warned_at| warned_at.elapsed() >= WARN_INTERVAL);
        if is_due {
            *warned_at = Some(Instant::now());
        }
        is_due
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close_longest_waiting(open: &[Arc<Connection>]) {
    let waiting = open
        .iter()
        .filter_map(|connection| Some((connection.waiting_since()?, connection)));
    if let Some((_, connection)) = waiting.min_by_key(|(since, _)| *since) {
        connection.request_close();
    }
}

impl ConnectionSlot {
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections
            .lock()
            .retain(|open| !Arc::ptr_eq(open, &self.connection));
        self.connections.changed.notify_one();
    }
}

impl Connection {
    fn new(limits: HttpLimits, changed: Arc<Notify>) -> Self {
        let state = State {
            phase: Phase::New,
            since: Instant::now(),
            write_deadline: None,
            is_closing: false,
        };
        Connection {
            limits,
            state: Mutex::new(state),
            close: Notify::new(),
            changed,
        }
    }

    /// Records received bytes.
    pub fn received(&self) {
        let mut state = self.lock();
        match state.phase {
            // The time since the connection was opened counts.
            Phase::New => state.phase = Phase::Head,
            Phase::Idle => state.enter(Phase::Head),
            Phase::Head | Phase::Busy => {}
        }
    }

    /// Begins a request once its head is complete.
    pub fn begin_request(self: &Arc<Self>) -> BusyGuard {
        self.lock().enter(Phase::Busy);
        BusyGuard(Arc::clone(self))
    }

    /// Records the start of a write.
    pub fn writing(&self) {
        let timeout = self.limits.body_timeout;
        self.lock()
            .write_deadline
            .get_or_insert_with(|| Instant::now() + timeout);
    }

    /// Records written bytes.
    pub fn wrote(&self, bytes: usize) {
        if let Some(write_deadline) = &mut self.lock().write_deadline {
            *write_deadline = extend_deadline(*write_deadline, bytes, self.limits.body_timeout);
        }
    }

    /// Records that all bytes are written.
    pub fn flushed(&self) {
        self.lock().write_deadline = None;
    }

    /// The time at which the connection is closed without further progress.
    fn deadline(&self) -> Option<Instant> {
        let state = self.lock();
        let phase_ends = match state.phase {
            Phase::New | Phase::Head => Some(state.since + self.limits.head_timeout),
            Phase::Idle => Some(state.since + self.limits.idle_timeout),
            Phase::Busy => None,
        };
        phase_ends.into_iter().chain(state.write_deadline).min()
    }

    /// Since when the connection has waited for a request; `None` if it does not, or a close was
    /// already requested.
    fn waiting_since(&self) -> Option<Instant> {
        let state = self.lock();
        (state.is_waiting() && !state.is_closing).then_some(state.since)
    }

    fn request_close(&self) {
        self.lock().is_closing = true;
        self.close.notify_one();
    }

    /// Whether the connection still waits for a request when its close is due. If a request has
    /// arrived meanwhile, another connection has to be closed.
    fn may_close(&self) -> bool {
        let mut state = self.lock();
        state.is_closing = false;
        let may_close = state.is_waiting();
        if !may_close {
            self.changed.notify_one();
        }
        may_close
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn enter(&mut self, phase: Phase) {
        (self.phase, self.since) = (phase, Instant::now());
    }

    fn is_waiting(&self) -> bool {
        self.phase != Phase::Busy && self.write_deadline.is_none()
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.lock().enter(Phase::Idle);
        self.0.changed.notify_one();
    }
}

/// Detects the end of a connection: it was too slow, or its slot is needed.
pub(super) struct Watchdog<'c> {
    connection: &'c Connection,
    close_requested: Pin<Box<Notified<'c>>>,
    timer: Pin<Box<Sleep>>,
}

impl<'c> Watchdog<'c> {
    pub fn new(connection: &'c Connection) -> Self {
        let close_requested = Box::pin(connection.close.notified());
        let timer = Box::pin(tokio::time::sleep(connection.limits.head_timeout));
        Watchdog {
            connection,
            close_requested,
            timer,
        }
    }

    /// To be polled after everything that may change the state of the connection.
    pub fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.close_requested.as_mut().poll(cx).is_ready() {
            self.close_requested.set(self.connection.close.notified());
            if self.connection.may_close() {
                return Poll::Ready(());
            }
        }
        let Some(deadline) = self.connection.deadline() else {
            return Poll::Pending;
        };
        if self.timer.deadline() != deadline {
            self.timer.as_mut().reset(deadline);
        }
        self.timer.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HttpLimits = HttpLimits {
        connections: 2,
        memory: 0,
        head_timeout: Duration::from_secs(10),
        body_timeout: Duration::from_secs(30),
        idle_timeout: Duration::from_secs(75),
    };

    /// The time left in whole seconds.
    fn left(connection: &Connection) -> Option<f64> {
        connection
            .deadline()
            .map(|deadline| (deadline - Instant::now()).as_secs_f64().round())
    }

    #[test]
    fn each_connection_phase_has_a_deadline() {
        let connection = Arc::new(Connection::new(LIMITS, Arc::default()));
        connection.lock().since -= Duration::from_secs(4);
        // A client that sends its head byte by byte does not extend the timeout.
        for _ in 0..2 {
            connection.received();
            assert_eq!(left(&connection), Some(6.0));
        }
        let busy = connection.begin_request();
        assert_eq!(left(&connection), None);
        connection.writing();
        connection.wrote(32 << 10);
        assert_eq!(left(&connection), Some(30.0));
        drop(busy);
        assert_eq!(
            (left(&connection), connection.waiting_since()),
            (Some(30.0), None)
        );
        connection.flushed();
        assert_eq!(left(&connection), Some(75.0));
        assert!(connection.waiting_since().is_some());
        connection.received();
        assert_eq!(left(&connection), Some(10.0));
    }

    #[tokio::test]
    async fn the_longest_waiting_connection_is_closed_at_the_limit() {
        let connections = Arc::new(Connections::new("test", LIMITS));
        let (first, second) = (
            connections.acquire_slot().await,
            connections.acquire_slot().await,
        );
        let busy = first.connection().begin_request();
        assert!(connections.try_acquire_slot().is_none());
        assert!(second.connection().lock().is_closing && !first.connection().lock().is_closing);
        // A request that arrived in the meantime keeps its connection.
        let other = second.connection().begin_request();
        assert!(!second.connection().may_close());
        assert!(connections.try_acquire_slot().is_none());
        drop(busy);
        assert!(connections.try_acquire_slot().is_none());
        assert!(first.connection().may_close());
        drop(first);
        assert!(connections.try_acquire_slot().is_some());
        drop(other);
    }
}
