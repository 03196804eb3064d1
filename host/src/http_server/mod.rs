//! The HTTP/1.1 server, robust against clients that are slow, silent or too many.
//!
//! Each listener has its own limits: on connections, on time, and on the bytes of bodies in memory.
//! At the connection limit, the connection that has waited longest for a request is closed for the
//! next client. A connection with a request in progress stays open. The control API and the
//! requests to workers have separate listeners, so neither can use up the connections of the other.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};

use crate::config::HttpLimits;
use crate::drain::Stopping;

mod body;
mod connections;
mod file_limit;
mod header_names;
mod late_router;
mod watched_stream;

pub use body::{BodyError, BodyMemory};
pub use file_limit::{file_limit, within_file_limit};
pub use header_names::original_header_names;
pub use late_router::LateRouter;

use body::{Memory, RequestBody, ResponseBody};
use connections::{Connection, ConnectionSlot, Connections, Watchdog};
use watched_stream::WatchedStream;

/// The maximum size of a request head in bytes.
const HEAD_MAX: usize = 64 << 10;

/// The delay after a failed accept. Most such failures come from too many open files.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// One listener and its limits.
struct Server {
    http: http1::Builder,
    router: Router,
    limits: HttpLimits,
    memory: Arc<Memory>,
}

/// Serves requests until the host stops, then finishes those in progress. `name` is the listener's
/// name in the log.
pub async fn serve(
    name: &'static str,
    listener: TcpListener,
    router: Router,
    limits: HttpLimits,
    stopping: Stopping,
) {
    let mut http = http1::Builder::new();
    // Timeouts are enforced by `Watchdog`: that of hyper does not distinguish an idle connection
    // from a slow head.
    http.max_buf_size(HEAD_MAX)
        .header_read_timeout(None)
        .preserve_header_case(true);

    // Accept until the host stops.
    let connections = Arc::new(Connections::new(name, limits));
    let server = Arc::new(Server {
        http,
        router,
        limits,
        memory: Memory::new(limits.memory),
    });
    let mut stop = stopping.clone();
    loop {
        let accepted = async {
            let stream = accept(&listener, &connections).await;
            (stream, connections.acquire_slot().await)
        };
        tokio::select! {
            biased;
            () = stop.stopped() => break,
            (stream, slot) = accepted => {
                tokio::spawn(serve_connection(Arc::clone(&server), stream, slot, stopping.clone()));
            }
        }
    }

    // Finish the requests in progress.
    drop(listener);
    connections.wait_until_closed().await;
}

/// Accepts the next connection. A failed accept does not end the listener.
async fn accept(listener: &TcpListener, connections: &Connections) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) if is_client_error(&error) => {}
            Err(error) => {
                connections.free_file_descriptor(&error);
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

fn is_client_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// Serves one connection until its client, a timeout or the shutdown of the host closes it.
async fn serve_connection(
    server: Arc<Server>,
    stream: TcpStream,
    slot: ConnectionSlot,
    mut stopping: Stopping,
) {
    // Responses are written as a whole, so delaying packets saves nothing.
    let _ = stream.set_nodelay(true);
    let connection = Arc::clone(slot.connection());
    let io = TokioIo::new(WatchedStream::new(stream, Arc::clone(&connection)));
    let (http, current) = (server.http.clone(), Arc::clone(&connection));
    let service = service_fn(move |request| server.serve_request(&current, request));
    let mut serving = pin!(http.serve_connection(io, service));
    let mut stopped = pin!(stopping.stopped());
    let mut is_stopping = false;
    let mut watchdog = Watchdog::new(&connection);
    poll_fn(|cx| {
        if serving.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if !is_stopping && stopped.as_mut().poll(cx).is_ready() {
            is_stopping = true;
            serving.as_mut().graceful_shutdown();
            if serving.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
        }
        // Polled last, because it checks the state that the connection is in now.
        watchdog.poll_expired(cx)
    })
    .await;
}

impl Server {
    /// Handles one request. The connection counts as busy until the response is written.
    fn serve_request(
        &self,
        connection: &Arc<Connection>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<ResponseBody>, Infallible>> + Send + use<> {
        let busy = connection.begin_request();
        let memory = Arc::clone(&self.memory);
        let held = BodyMemory::new(&memory);
        let mut request = request.map(|body| {
            Body::new(RequestBody::new(
                body,
                held.clone(),
                self.limits.body_timeout,
            ))
        });
        request.extensions_mut().insert(held);
        let handling = TowerToHyperService::new(self.router.clone()).call(request);
        async move {
            Ok(handling
                .await?
                .map(|body| ResponseBody::new(body, &memory, busy)))
        }
    }
}

#[cfg(test)]
mod tests;
