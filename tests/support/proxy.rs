//! A TCP proxy that cuts connections at chosen PostgreSQL, NATS and HTTP messages.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// A place to cut a connection, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cut {
    /// A commit reaches the proxy and is not forwarded.
    CommitNotForwarded,
    /// A commit takes effect, and its answer is lost.
    CommitAnswerLost,
    /// A commit takes effect, and its answer is held back until the client is gone.
    CommitAnswerHeld,
    /// The client loses its connection at the commit, which takes effect a moment later.
    CommitDelayed,
    /// Outputs reach the proxy and are not forwarded.
    OutputsNotForwarded,
    /// The broker stores outputs, and its acknowledgements are lost.
    OutputAnswersLost,
    /// An HTTP server carries out a request, and its whole answer is lost.
    HttpAnswerLost,
    /// Like `HttpAnswerLost`, but only for a success that is not a replayed answer.
    HttpFirstAnswerLost,
    /// Like `HttpAnswerLost`, but only the last byte of the answer is lost.
    HttpAnswerTorn,
}

/// A proxy to a loopback port.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    upstream: u16,
    armed: Mutex<Option<Cut>>,
    done: Mutex<HashMap<Cut, u64>>,
    changed: Notify,
    /// Whether only commits of guests' transactions are cut.
    guests_only: AtomicBool,
    /// Whether all traffic is held, in both directions.
    is_blackhole: watch::Sender<bool>,
}

impl Proxy {
    /// Starts a proxy to `upstream`, a port of the loopback interface.
    pub async fn start(upstream: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("listen for the proxy")?;
        let port = listener
            .local_addr()
            .context("read the proxy's port")?
            .port();
        let shared = Arc::new(Shared {
            upstream,
            ..Shared::default()
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Proxy {
            port,
            shared,
            accepting,
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Number of connections that were cut at this place.
    pub fn count(&self, cut: Cut) -> u64 {
        self.shared
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&cut)
            .copied()
            .unwrap_or_default()
    }

    /// Restricts cuts to commits of guests' transactions and lengthens their delays.
    pub fn cut_guests_only(&self) {
        self.shared.guests_only.store(true, Ordering::Relaxed);
    }

    /// Holds all traffic of existing and new connections, or resumes it. Neither end sees a closed
    /// connection.
    pub fn set_blackhole(&self, is_blackhole: bool) {
        self.shared.is_blackhole.send_replace(is_blackhole);
    }

    /// Cuts at the next opportunity. Returns false if none comes within `limit`.
    pub async fn cut(&self, cut: Cut, limit: Duration) -> bool {
        let before = self.count(cut);
        self.shared.arm(Some(cut));
        let happened = async {
            while self.count(cut) == before {
                // Checked again periodically: a wake-up between the check and the wait would be
                // missed.
                let _ =
                    tokio::time::timeout(Duration::from_millis(20), self.shared.changed.notified())
                        .await;
            }
        };
        let in_time = tokio::time::timeout(limit, happened).await.is_ok();
        self.shared.arm(None);
        in_time
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    fn arm(&self, cut: Option<Cut>) {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = cut;
    }

    fn armed(&self) -> Option<Cut> {
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the armed cut if it is one of these; only one connection gets it.
    fn take(&self, wanted: &[Cut]) -> Option<Cut> {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        armed.take_if(|cut| wanted.contains(cut))
    }

    fn done(&self, cut: Cut) {
        *self
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(cut)
            .or_default() += 1;
        self.changed.notify_waiters();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            // Without an upstream server the client sees a closed connection, as without the proxy.
            if let Ok(server) = TcpStream::connect(("127.0.0.1", shared.upstream)).await {
                let _ = client.set_nodelay(true);
                let _ = server.set_nodelay(true);
                let _ = Connection {
                    client,
                    server,
                    shared,
                    messages: Messages::default(),
                }
                .run()
                .await;
            }
        });
    }
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    shared: Arc<Shared>,
    messages: Messages,
}

impl Connection {
    /// Copies in both directions until either end closes or the connection is cut.
    async fn run(mut self) -> std::io::Result<()> {
        let mut up = vec![0; 1 << 16];
        let mut down = vec![0; 1 << 16];
        let mut is_blackhole = self.shared.is_blackhole.subscribe();
        loop {
            let Ok(_) = is_blackhole.wait_for(|is_blackhole| !is_blackhole).await else {
                return Ok(());
            };
            tokio::select! {
                Ok(()) = is_blackhole.changed() => {}
                read = self.client.read(&mut up) => match read? {
                    0 => return Ok(()),
                    length => if self.pass_up(up.get(..length).unwrap_or_default()).await? { return Ok(()) },
                },
                read = self.server.read(&mut down) => match read? {
                    0 => return Ok(()),
                    length => if self.pass_down(down.get(..length).unwrap_or_default()).await? { return Ok(()) },
                },
            }
        }
    }

    /// Forwards bytes from the client; true when the connection is cut.
    async fn pass_up(&mut self, bytes: &[u8]) -> std::io::Result<bool> {
        let guests_only = self.shared.guests_only.load(Ordering::Relaxed);
        let commits = self.messages.ends_with_commit(bytes, guests_only);
        if commits && let Some(cut) = self.shared.take(COMMIT_CUTS) {
            if cut == Cut::CommitNotForwarded {
                self.shared.done(cut);
                return Ok(true);
            }
            if cut == Cut::CommitDelayed {
                self.client.shutdown().await?;
                tokio::time::sleep(if guests_only {
                    COMMIT_DELAY * 3
                } else {
                    COMMIT_DELAY
                })
                .await;
            }
            self.server.write_all(bytes).await?;
            return self.hold_answer(cut).await;
        }
        let sends = matches!(self.shared.armed(), Some(Cut::OutputsNotForwarded))
            && contains(bytes, b"PUB out.");
        if sends && let Some(cut) = self.shared.take(&[Cut::OutputsNotForwarded]) {
            self.shared.done(cut);
            return Ok(true);
        }
        self.server.write_all(bytes).await?;
        Ok(false)
    }

    /// Reads the answer to a commit without forwarding it.
    async fn hold_answer(&mut self, cut: Cut) -> std::io::Result<bool> {
        let mut answer = Vec::new();
        // Read until the server is ready for the next query outside a transaction.
        while !answer.ends_with(b"Z\0\0\0\x05I") {
            if self.server.read_buf(&mut answer).await? == 0 {
                return Ok(true);
            }
        }
        if contains(&answer, b"COMMIT\0") {
            self.shared.done(cut);
        }
        if cut == Cut::CommitAnswerHeld {
            let mut ignored = vec![0; 1 << 10];
            while self.client.read(&mut ignored).await? > 0 {}
        }
        Ok(true)
    }

    /// Forwards bytes from the server; true when the connection is cut.
    async fn pass_down(&mut self, bytes: &[u8]) -> std::io::Result<bool> {
        let answers = matches!(self.shared.armed(), Some(Cut::OutputAnswersLost))
            && contains(bytes, b"{\"stream\":\"OUT\"");
        if answers && let Some(cut) = self.shared.take(&[Cut::OutputAnswersLost]) {
            self.shared.done(cut);
            return Ok(true);
        }
        if bytes.starts_with(b"HTTP/1.1 ")
            && let Some(cut) = self.shared.take(http_cuts(bytes))
        {
            let arrives = if cut == Cut::HttpAnswerTorn {
                bytes.len() - 1
            } else {
                0
            };
            self.client
                .write_all(bytes.get(..arrives).unwrap_or_default())
                .await?;
            self.shared.done(cut);
            return Ok(true);
        }
        self.client.write_all(bytes).await?;
        Ok(false)
    }
}

/// The places where this response may be cut.
fn http_cuts(response: &[u8]) -> &'static [Cut] {
    let is_first =
        response.starts_with(b"HTTP/1.1 2") && !contains(response, b"idempotent-replayed");
    match is_first {
        true => &[
            Cut::HttpAnswerLost,
            Cut::HttpAnswerTorn,
            Cut::HttpFirstAnswerLost,
        ],
        false => &[Cut::HttpAnswerLost, Cut::HttpAnswerTorn],
    }
}

const COMMIT_CUTS: &[Cut] = &[
    Cut::CommitNotForwarded,
    Cut::CommitAnswerLost,
    Cut::CommitAnswerHeld,
    Cut::CommitDelayed,
];

/// Long enough for the client to query the state of its commit.
const COMMIT_DELAY: Duration = Duration::from_millis(400);

/// An incomplete PostgreSQL message from the client.
#[derive(Default)]
struct Messages {
    rest: Vec<u8>,
    started: bool,
    /// The connection does not speak PostgreSQL.
    is_other_protocol: bool,
}

impl Messages {
    /// Whether a message that ends in `bytes` is a simple query whose text ends in `commit`. With
    /// `guests_only`, only the end of a guest's transaction counts.
    fn ends_with_commit(&mut self, bytes: &[u8], guests_only: bool) -> bool {
        const NEGOTIATIONS: [&[u8]; 2] =
            [&80_877_103_u32.to_be_bytes(), &80_877_104_u32.to_be_bytes()];
        if self.is_other_protocol {
            return false;
        }
        self.rest.extend_from_slice(bytes);
        let mut commits = false;
        loop {
            // The startup messages have no type byte.
            let typed = usize::from(self.started);
            let Some(length) = self
                .rest
                .get(typed..typed + 4)
                .and_then(|length| length.try_into().ok())
            else {
                break;
            };
            let length = typed + u32::from_be_bytes(length) as usize;
            if !self.started && length > 10_000 {
                self.is_other_protocol = true;
                return false;
            }
            if self.rest.len() < length {
                break;
            }
            let rest = self.rest.split_off(length);
            let message = std::mem::replace(&mut self.rest, rest);
            match self.started {
                true => {
                    let is_commit = message.starts_with(b"Q") && message.ends_with(b"commit\0");
                    commits |=
                        is_commit && (!guests_only || contains(&message, b".commit_token = '"));
                }
                false => {
                    self.started = !NEGOTIATIONS.contains(&message.get(4..8).unwrap_or_default())
                }
            }
        }
        commits
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
