//! Connections to NATS beside that of the client library, for two cases that the library does not
//! cover.
//!
//! Any publisher can store a subject or headers at which the client library closes its connection.
//! This connection reads them as bytes, so such a message affects only itself. The client library
//! also sends its unsent messages over the next connection, even if the server lost state in
//! between. Here a message goes over the connection it was meant for, or is not sent.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_nats::ServerAddr;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use rand::seq::SliceRandom;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::denials::Denials;
use super::login::{self, ConnectAuth};
use super::wire::{IncomingMessage, Op, next_op};
use crate::config::Nats;
use crate::model::retry::Backoff;

/// The timeout of each connection step, and of one write.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the server is pinged, and after how long a silence the connection counts as lost.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(12);

/// How many bytes one read may bring.
const READ_SIZE: usize = 64 << 10;

/// How many bytes are gathered for one write. The last message may exceed it.
const WRITE_BATCH_SIZE: usize = 256 << 10;

/// A connection that reconnects until all its handles are dropped. Cheap to clone.
#[derive(Clone)]
pub(super) struct Connection {
    commands: mpsc::UnboundedSender<Command>,
    sids: Arc<AtomicU64>,
    /// The number of connections so far. After a change, the server no longer has the requests made
    /// before.
    connections: watch::Receiver<u64>,
    is_up: Arc<AtomicBool>,
    denials: Denials,
}

/// One subscription, which ends when this is dropped.
pub(super) struct Listener {
    sid: u64,
    incoming: mpsc::UnboundedReceiver<IncomingMessage>,
    commands: mpsc::UnboundedSender<Command>,
}

enum Command {
    Listen {
        sid: u64,
        subject: String,
        incoming: mpsc::UnboundedSender<IncomingMessage>,
    },
    /// Ends a subscription after the messages in transit are received.
    Drain(u64),
    Unlisten(u64),
    Publish(Message),
}

/// A message to publish, with the subject for its answer.
pub(super) struct Message {
    /// The number of the connection to send it over. The message is dropped if that connection is
    /// gone.
    pub connection_number: u64,
    pub subject: String,
    pub reply: String,
    /// The header block; empty when there is none.
    pub headers: Vec<u8>,
    pub body: Bytes,
}

impl Message {
    /// Serializes the message as a `PUB` or `HPUB` operation.
    fn write(&self, to: &mut Vec<u8>) {
        let Message {
            subject,
            reply,
            headers,
            body,
            ..
        } = self;
        let size = headers.len() + body.len();
        let head = match headers.len() {
            0 => format!("PUB {subject} {reply} {size}\r\n"),
            header_size => format!("HPUB {subject} {reply} {header_size} {size}\r\n"),
        };
        to.reserve(head.len() + size + 2);
        to.extend_from_slice(head.as_bytes());
        to.extend_from_slice(headers);
        to.extend_from_slice(body);
        to.extend_from_slice(b"\r\n");
    }
}

impl Connection {
    /// Connects in a separate task, under a client name that the server shows.
    pub fn start(nats: Nats, name: &'static str) -> Self {
        let (commands, received) = mpsc::unbounded_channel();
        let (counter, connections) = watch::channel(0);
        let (is_up, denials) = (Arc::new(AtomicBool::new(false)), Denials::default());
        let task = ConnectionTask {
            nats,
            name,
            denials: denials.clone(),
            discovered: Vec::new(),
            commands: received,
            subscribers: BTreeMap::new(),
            pongs: VecDeque::new(),
            counter,
            is_up: Arc::clone(&is_up),
        };
        tokio::spawn(task.run());
        Connection {
            commands,
            sids: Arc::new(AtomicU64::new(1)),
            connections,
            is_up,
            denials,
        }
    }

    /// Returns once a connection exists or has existed.
    ///
    /// # Errors
    /// No connection within the timeout.
    pub async fn ready(&self) -> Result<()> {
        let mut connections = self.connections.clone();
        timeout(STEP_TIMEOUT * 2, connections.wait_for(|count| *count > 0))
            .await
            .context("open another connection to NATS: it does not answer in time")?
            .context("open another connection to NATS")?;
        Ok(())
    }

    /// Changes with each new connection.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// The number of the last connection; 0 before the first.
    pub fn number(&self) -> u64 {
        *self.connections.borrow()
    }

    /// Whether a connection exists, according to the last known state.
    pub fn is_up(&self) -> bool {
        // The counter's sender lives as long as the connection's task.
        self.is_up.load(Ordering::SeqCst) && self.connections.has_changed().is_ok()
    }

    /// Whether the server denied a message to this subject recently.
    pub fn is_denied(&self, subject: &str) -> bool {
        self.denials.contains(subject)
    }

    /// Subscribes to a subject or a pattern, on this connection and all later ones.
    pub fn listen(&self, subject: &str) -> Listener {
        let sid = self.sids.fetch_add(1, Ordering::Relaxed);
        let (sender, incoming) = mpsc::unbounded_channel();
        let _ = self.commands.send(Command::Listen {
            sid,
            subject: subject.to_owned(),
            incoming: sender,
        });
        Listener {
            sid,
            incoming,
            commands: self.commands.clone(),
        }
    }

    /// Sends a message over the connection with its number, or not at all.
    pub fn publish(&self, message: Message) {
        let _ = self.commands.send(Command::Publish(message));
    }
}

impl Listener {
    /// The next message; `None` once the subscription is drained.
    pub async fn next(&mut self) -> Option<IncomingMessage> {
        self.incoming.recv().await
    }

    /// Ends the subscription after the messages in transit are received.
    pub fn drain(&self) {
        let _ = self.commands.send(Command::Drain(self.sid));
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Unlisten(self.sid));
    }
}

/// The task that holds the connection and reconnects it.
struct ConnectionTask {
    nats: Nats,
    name: &'static str,
    denials: Denials,
    /// Servers that another server announced.
    discovered: Vec<String>,
    commands: mpsc::UnboundedReceiver<Command>,
    subscribers: BTreeMap<u64, Subscriber>,
    /// For each outstanding pong: the subscription that it ends.
    pongs: VecDeque<Option<u64>>,
    counter: watch::Sender<u64>,
    is_up: Arc<AtomicBool>,
}

struct Subscriber {
    subject: String,
    incoming: mpsc::UnboundedSender<IncomingMessage>,
    is_draining: bool,
}

/// All handles are dropped.
struct HandlesDropped;

impl ConnectionTask {
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            match self.connect_handling_commands().await {
                Ok(Some(socket)) => {
                    backoff.reset();
                    let served = self.serve(socket).await;
                    self.is_up.store(false, Ordering::SeqCst);
                    match served {
                        Ok(HandlesDropped) => return,
                        Err(error) => {
                            tracing::debug!(
                                connection = self.name,
                                error = format!("{error:#}"),
                                "connection lost"
                            );
                        }
                    }
                }
                Ok(None) => return,
                Err(error) => tracing::debug!(
                    connection = self.name,
                    error = format!("{error:#}"),
                    "failed to connect"
                ),
            }
            if self
                .wait_for_retry(backoff.next(rand::random()))
                .await
                .is_some()
            {
                return;
            }
        }
    }

    /// Connects. Meanwhile subscriptions are recorded and messages are dropped. `None` if all
    /// handles are dropped.
    async fn connect_handling_commands(&mut self) -> Result<Option<Socket>> {
        let (nats, discovered) = (self.nats.clone(), self.discovered.clone());
        let connecting = connect(&nats, self.name, discovered);
        tokio::pin!(connecting);
        loop {
            tokio::select! {
                socket = &mut connecting => return socket.map(Some),
                command = self.commands.recv() => match command {
                    Some(command) => self.handle_command(command, &mut Vec::new()),
                    None => return Ok(None),
                },
            }
        }
    }

    /// Waits between two attempts.
    async fn wait_for_retry(&mut self, wait: Duration) -> Option<HandlesDropped> {
        let until = Instant::now() + wait;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return None,
                command = self.commands.recv() => match command {
                    Some(command) => self.handle_command(command, &mut Vec::new()),
                    None => return Some(HandlesDropped),
                },
            }
        }
    }

    /// Serves one connection until it breaks.
    async fn serve(&mut self, mut socket: Socket) -> Result<HandlesDropped> {
        self.discovered.clone_from(&socket.discovered);
        self.pongs.clear();
        self.subscribers
            .retain(|_, subscriber| !subscriber.is_draining);

        // Renew the subscriptions.
        let listen = |(sid, subscriber): (&u64, &Subscriber)| {
            format!("SUB {} {sid}\r\n", subscriber.subject)
        };
        let listening: String = self.subscribers.iter().map(listen).collect();
        socket.write(listening.as_bytes()).await?;
        self.is_up.store(true, Ordering::SeqCst);
        self.counter.send_modify(|count| *count += 1);

        // Serve reads, commands and pings.
        let mut last_received = Instant::now();
        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let mut reply = Vec::new();
            while let Some(op) = next_op(&mut socket.buffer)? {
                self.handle_op(op, &mut reply)?;
            }
            if !reply.is_empty() {
                socket.write(&reply).await?;
            }
            socket.buffer.reserve(READ_SIZE);
            tokio::select! {
                read = socket.stream.read_buf(&mut socket.buffer) => match read.context("read")? {
                    0 => bail!("the server closed the connection"),
                    _ => last_received = Instant::now(),
                },
                command = self.commands.recv() => {
                    let Some(command) = command else { return Ok(HandlesDropped) };
                    let mut bytes = Vec::new();
                    self.handle_command(command, &mut bytes);
                    while bytes.len() < WRITE_BATCH_SIZE
                        && let Ok(command) = self.commands.try_recv()
                    {
                        self.handle_command(command, &mut bytes);
                    }
                    socket.write(&bytes).await?;
                }
                _ = ping.tick() => {
                    if last_received.elapsed() > SILENCE_MAX {
                        bail!("no answer to pings for {SILENCE_MAX:?}");
                    }
                    self.pongs.push_back(None);
                    socket.write(b"PING\r\n").await?;
                }
            }
        }
    }

    /// Handles one operation of the server; the response to it is appended to `reply`.
    fn handle_op(&mut self, op: Op, reply: &mut Vec<u8>) -> Result<()> {
        match op {
            Op::Ping => reply.extend(b"PONG\r\n"),
            Op::Pong => {
                if let Some(Some(sid)) = self.pongs.pop_front() {
                    self.subscribers.remove(&sid);
                }
            }
            Op::Message(incoming) => {
                if let Some(subscriber) = self.subscribers.get(&incoming.sid) {
                    let _ = subscriber.incoming.send(incoming);
                }
            }
            // The server keeps the connection open only after this error.
            Op::Error(error) if error.starts_with("Permissions Violation") => {
                tracing::warn!(
                    connection = self.name,
                    error,
                    "publish or subscription denied by the NATS server"
                );
                self.denials.record(&error);
            }
            Op::Error(error) => bail!("NATS server error: {error}"),
            Op::Info(info) => {
                if let Ok(info) = serde_json::from_slice::<Info>(&info) {
                    self.discovered = info.connect_urls;
                }
            }
            Op::Ok => {}
        }
        Ok(())
    }

    /// Carries out a command; the operations to send are appended to `bytes`.
    fn handle_command(&mut self, command: Command, bytes: &mut Vec<u8>) {
        match command {
            Command::Listen {
                sid,
                subject,
                incoming,
            } => {
                bytes.extend(format!("SUB {subject} {sid}\r\n").into_bytes());
                self.subscribers.insert(
                    sid,
                    Subscriber {
                        subject,
                        incoming,
                        is_draining: false,
                    },
                );
            }
            Command::Drain(sid) => {
                let Some(subscriber) = self.subscribers.get_mut(&sid) else {
                    return;
                };
                subscriber.is_draining = true;
                self.pongs.push_back(Some(sid));
                bytes.extend(format!("UNSUB {sid}\r\nPING\r\n").into_bytes());
            }
            Command::Unlisten(sid) => {
                if self.subscribers.remove(&sid).is_some() {
                    bytes.extend(format!("UNSUB {sid}\r\n").into_bytes());
                }
            }
            Command::Publish(message) if message.connection_number == *self.counter.borrow() => {
                message.write(bytes)
            }
            Command::Publish(_) => {}
        }
    }
}

/// A connection after the handshake.
struct Socket {
    stream: Box<dyn Stream>,
    buffer: BytesMut,
    discovered: Vec<String>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The relevant fields of the server information.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Info {
    nonce: String,
    tls_required: bool,
    connect_urls: Vec<String>,
}

/// Connects to one of the servers, in random order.
async fn connect(nats: &Nats, name: &str, discovered: Vec<String>) -> Result<Socket> {
    let mut servers: Vec<String> = nats.servers.clone();
    servers.extend(discovered);
    servers.sort_unstable();
    servers.dedup();
    servers.shuffle(&mut rand::rng());
    let mut last = None;
    for server in servers {
        match connect_to(nats, name, &server).await {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("no server address is known")?)
}

async fn connect_to(nats: &Nats, name: &str, server: &str) -> Result<Socket> {
    let address: ServerAddr = server.parse().context("parse the server address")?;
    let host_and_port = (address.host().to_owned(), address.port());
    let tcp = timeout(STEP_TIMEOUT, TcpStream::connect(host_and_port))
        .await
        .context("connect in time")?
        .context("connect")?;
    tcp.set_nodelay(true).context("set up the connection")?;
    let mut socket = Socket {
        stream: Box::new(tcp),
        buffer: BytesMut::new(),
        discovered: Vec::new(),
    };

    // Handshake: TLS and INFO in the configured order.
    if nats.tls_first {
        socket.encrypt(nats, address.host()).await?;
    }
    let Op::Info(info) = socket.read_op().await? else {
        bail!("the server did not send INFO first")
    };
    let info: Info = serde_json::from_slice(&info).context("parse the server's INFO")?;
    if !nats.tls_first && (info.tls_required || address.tls_required()) {
        socket.encrypt(nats, address.host()).await?;
    }

    // Log in and wait for the PONG.
    let connect_options = connect_options(
        nats,
        name,
        &info.nonce,
        nats.tls_first || address.tls_required(),
    )
    .await?;
    socket
        .write(format!("CONNECT {connect_options}\r\nPING\r\n").as_bytes())
        .await?;
    loop {
        match socket.read_op().await? {
            Op::Pong => break,
            Op::Error(error) => bail!("NATS server error: {error}"),
            _ => {}
        }
    }
    socket.discovered = info.connect_urls;
    Ok(socket)
}

impl Socket {
    /// Performs the TLS handshake with the server of this name.
    async fn encrypt(&mut self, nats: &Nats, host: &str) -> Result<()> {
        let name = ServerName::try_from(host.to_owned()).context("parse the server name")?;
        let connector = TlsConnector::from(Arc::new(tls(nats)?));
        let plain = std::mem::replace(&mut self.stream, Box::new(tokio::io::empty()));
        let encrypted = timeout(STEP_TIMEOUT, connector.connect(name, plain));
        self.stream = Box::new(
            encrypted
                .await
                .context("complete the TLS handshake in time")?
                .context("complete the TLS handshake")?,
        );
        Ok(())
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout(STEP_TIMEOUT, written)
            .await
            .context("write in time")?
            .context("write")
    }

    /// The next operation.
    async fn read_op(&mut self) -> Result<Op> {
        let next = async {
            loop {
                if let Some(op) = next_op(&mut self.buffer)? {
                    return Ok(op);
                }
                if self
                    .stream
                    .read_buf(&mut self.buffer)
                    .await
                    .context("read")?
                    == 0
                {
                    bail!("the server closed the connection");
                }
            }
        };
        timeout(STEP_TIMEOUT, next)
            .await
            .context("receive from the server in time")?
    }
}

/// The options of `CONNECT`. If the login is a key, they include a signature of the server's
/// `nonce`.
async fn connect_options(
    nats: &Nats,
    name: &str,
    nonce: &str,
    tls_required: bool,
) -> Result<serde_json::Value> {
    let mut connect_options = json!({
        "verbose": false,
        "pedantic": false,
        "tls_required": tls_required,
        "name": name,
        "lang": "rust",
        "version": env!("CARGO_PKG_VERSION"),
        "protocol": 1,
        "echo": true,
        "headers": true,
        "no_responders": true,
    });

    // Add the login.
    let ConnectAuth {
        user,
        password,
        token,
        jwt,
        nkey,
        signature,
    } = login::connect_auth(nats, nonce.as_bytes()).await?;
    let signature = signature.map(|signature| URL_SAFE_NO_PAD.encode(signature));
    let fields = [
        ("user", user),
        ("pass", password),
        ("auth_token", token),
        ("jwt", jwt),
        ("nkey", nkey),
        ("sig", signature),
    ];
    if let Some(connect_options) = connect_options.as_object_mut() {
        connect_options.extend(
            fields
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?.into()))),
        );
    }
    Ok(connect_options)
}

/// The TLS configuration, as in the client library: the configured authority alone, or those that
/// the operating system trusts.
fn tls(nats: &Nats) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match &nats.root_certificate {
        Some(path) => {
            let certificates =
                CertificateDer::pem_file_iter(path).context("read the authority's certificate")?;
            for certificate in certificates {
                roots
                    .add(certificate.context("read the authority's certificate")?)
                    .context("trust an authority")?;
            }
        }
        None => {
            let _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("select TLS versions")?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &nats.client_certificate else {
        return Ok(config.with_no_client_auth());
    };
    let chain =
        CertificateDer::pem_file_iter(certificate).context("read the client's certificate")?;
    let chain = chain
        .collect::<Result<Vec<_>, _>>()
        .context("read the client's certificate")?;
    let key = PrivateKeyDer::from_pem_file(key).context("read the client's key")?;
    config
        .with_client_auth_cert(chain, key)
        .context("use the client's certificate")
}
