//! A nats-server per test: publish, read streams raw, kill and restart.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_nats::jetstream;
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::{ConnectOptions, HeaderMap};
use futures::StreamExt;
use tempfile::TempDir;

use crate::eventually::eventually;
use crate::server::{Server, free_port};

/// A nats-server with JetStream in its own folder.
pub struct NatsServer {
    port: u16,
    folder: TempDir,
    server: Option<Server>,
    /// Connect options of the test's own clients.
    options: ConnectOptions,
}

/// A message to publish.
#[derive(Debug, Clone)]
pub struct NewMessage {
    pub subject: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// A stored message of a stream.
#[derive(Debug, Clone)]
pub struct Stored {
    pub sequence: u64,
    pub stored_at: jiff::Timestamp,
    pub subject: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl NewMessage {
    /// A message for the test guests: their behaviour, its options and the event id.
    pub fn new(subject: &str, event_id: &str, behaviour: &str, options: &str) -> Self {
        NewMessage {
            subject: subject.to_owned(),
            headers: vec![
                // A new broker id each time: only the inbox can recognise the repeated event.
                ("Nats-Msg-Id".to_owned(), uuid::Uuid::new_v4().to_string()),
                ("ce-id".to_owned(), event_id.to_owned()),
                ("do".to_owned(), behaviour.to_owned()),
            ],
            body: options.as_bytes().to_vec(),
        }
    }
}

impl NewMessage {
    /// Event number `n` for the test guests: one effect and one output of it.
    pub fn insert(n: u64) -> Self {
        NewMessage::new("in.x", &format!("e{n}"), "insert", r#"{"n": 1}"#)
    }
}

impl NatsServer {
    pub async fn start() -> Result<Self> {
        Self::start_with("").await
    }

    /// Starts a server with additional configuration.
    pub async fn start_with(configuration: &str) -> Result<Self> {
        Self::start_secured(configuration, ConnectOptions::new()).await
    }

    /// Starts a server that requires authentication; the test's own clients connect with `options`.
    pub async fn start_secured(configuration: &str, options: ConnectOptions) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-nats-")
            .tempdir()
            .context("create a folder")?;
        if !configuration.is_empty() {
            std::fs::write(folder.path().join("configuration"), configuration)
                .context("write the configuration")?;
        }
        let mut nats = NatsServer {
            port: free_port()?,
            folder,
            server: None,
            options,
        };
        nats.restart().await?;
        Ok(nats)
    }

    /// Starts a cluster of three servers and waits until it has a leader.
    pub async fn start_cluster() -> Result<Vec<Self>> {
        let routes: Vec<u16> = (0..3).map(|_| free_port()).collect::<Result<_>>()?;
        let all: Vec<String> = routes
            .iter()
            .map(|port| format!("nats://127.0.0.1:{port}"))
            .collect();
        let configuration = |n: usize, port: u16| {
            format!(
                "server_name: n{n}\ncluster {{ name: c, listen: \"127.0.0.1:{port}\", routes: [{}] }}\n",
                all.iter()
                    .map(|url| format!("\"{url}\""))
                    .collect::<Vec<_>>()
                    .join(", ")
            )
        };
        let start = |(n, port): (usize, &u16)| {
            let text = configuration(n, *port);
            async move { Self::start_with(&text).await }
        };
        let servers = futures::future::try_join_all(routes.iter().enumerate().map(start)).await?;
        for server in &servers {
            server.until_leader_elected().await?;
        }
        Ok(servers)
    }

    /// Waits until JetStream answers.
    pub async fn until_leader_elected(&self) -> Result<()> {
        let context = jetstream::new(self.client().await?);
        eventually("a leader is elected", || async {
            context.query_account().await?;
            Ok(Some(()))
        })
        .await
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Starts the server again on the same port and store.
    pub async fn restart(&mut self) -> Result<()> {
        let folder = self.folder.path();
        let configuration = folder.join("configuration");
        let command = format!(
            "exec nats-server {} -a 127.0.0.1 -p {} -js -sd '{}' -P '{}' >'{}' 2>&1",
            if configuration.exists() {
                format!("-c '{}'", configuration.display())
            } else {
                String::new()
            },
            self.port,
            folder.join("store").display(),
            folder.join("pid").display(),
            folder.join("log").display()
        );
        self.server = Some(Server::start(
            &format!("( {command} )"),
            &folder.join("no-such-folder"),
        )?);
        self.client().await.map(|_| ())
    }

    /// Kills the server and restarts it with another configuration; the test's own clients log in
    /// with `options`.
    pub async fn restart_secured(
        &mut self,
        configuration: &str,
        options: ConnectOptions,
    ) -> Result<()> {
        self.kill()?;
        std::fs::write(self.folder.path().join("configuration"), configuration)
            .context("write the configuration")?;
        self.options = options;
        self.restart().await
    }

    /// Kills the server like a power cut.
    pub fn kill(&mut self) -> Result<()> {
        self.signal("KILL")?;
        self.server = None;
        Ok(())
    }

    /// The folder of a stream's store. It must only be changed while the server is stopped.
    fn stream_folder(&self, stream: &str) -> PathBuf {
        self.folder
            .path()
            .join("store/jetstream/$G/streams")
            .join(stream)
    }

    /// Copies the store of a stream; the server must be stopped.
    pub fn copy_stream(&self, stream: &str) -> Result<()> {
        let copy = self.folder.path().join(format!("copy-{stream}"));
        let _ = std::fs::remove_dir_all(&copy);
        copy_folder(&self.stream_folder(stream), &copy)
    }

    /// Restores a stream from its copy; the server must be stopped.
    pub fn roll_back_stream(&self, stream: &str) -> Result<()> {
        std::fs::remove_dir_all(self.stream_folder(stream)).context("remove a stream")?;
        copy_folder(
            &self.folder.path().join(format!("copy-{stream}")),
            &self.stream_folder(stream),
        )
    }

    /// Suspends the server: its connections stay open, and nothing answers.
    pub fn pause(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Resumes a paused server.
    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let pid = std::fs::read_to_string(self.folder.path().join("pid"))
            .context("read the server's pid")?;
        crate::world::signal(pid.trim().parse().context("read the server's pid")?, name)
    }

    /// Connects a test client once the server answers.
    pub async fn client(&self) -> Result<async_nats::Client> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match self.options.clone().connect(self.url()).await {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() > end => {
                    let log =
                        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                    bail!("the nats-server does not answer: {error}\n{log}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Creates a stream that refuses messages larger than `bytes`.
    pub async fn make_narrow_stream(&self, name: &str, subject: &str, bytes: i32) -> Result<()> {
        let config = jetstream::stream::Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            max_message_size: bytes,
            allow_direct: true,
            ..Default::default()
        };
        let context = jetstream::new(self.client().await?);
        context
            .create_or_update_stream(config)
            .await
            .context("create a narrow stream")?;
        Ok(())
    }

    /// Creates a stream that holds one message per subject and refuses a second one.
    pub async fn make_one_per_subject_stream(&self, name: &str, subject: &str) -> Result<()> {
        let config = jetstream::stream::Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            max_messages_per_subject: 1,
            discard: jetstream::stream::DiscardPolicy::New,
            discard_new_per_subject: true,
            allow_direct: true,
            ..Default::default()
        };
        jetstream::new(self.client().await?)
            .create_stream(config)
            .await
            .context("create a stream with one message per subject")?;
        Ok(())
    }

    /// Purges the messages of a subject from a stream.
    pub async fn purge_subject(&self, stream: &str, subject: &str) -> Result<()> {
        let context = jetstream::new(self.client().await?);
        let stream = context
            .get_stream(stream)
            .await
            .context("open the stream")?;
        stream
            .purge()
            .filter(subject)
            .await
            .context("purge a subject")?;
        Ok(())
    }

    /// Creates a stream whose duplicate window is `window`.
    pub async fn make_stream(&self, name: &str, subject: &str, window: Duration) -> Result<()> {
        let config = jetstream::stream::Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            duplicate_window: window,
            allow_direct: true,
            ..Default::default()
        };
        jetstream::new(self.client().await?)
            .create_stream(config)
            .await
            .context("create a stream")?;
        Ok(())
    }

    /// Deletes a stream with its messages and returns its configuration.
    pub async fn delete_stream(&self, name: &str) -> Result<jetstream::stream::Config> {
        let context = jetstream::new(self.client().await?);
        let config = context
            .get_stream(name)
            .await
            .context("open the stream")?
            .cached_info()
            .config
            .clone();
        context
            .delete_stream(name)
            .await
            .context("delete the stream")?;
        Ok(config)
    }

    /// Creates a stream from the configuration of a deleted one.
    pub async fn recreate_stream(&self, config: jetstream::stream::Config) -> Result<()> {
        jetstream::new(self.client().await?)
            .create_stream(config)
            .await
            .context("recreate the stream")?;
        Ok(())
    }

    /// Limits a stream to its present size, or lifts that limit.
    pub async fn fill_stream(&self, name: &str, is_full: bool) -> Result<()> {
        let context = jetstream::new(self.client().await?);
        let stream = context.get_stream(name).await.context("open the stream")?;
        let info = stream.cached_info();
        let full = i64::try_from(info.state.messages)
            .unwrap_or(i64::MAX)
            .max(1);
        let max_messages = if is_full { full } else { -1 };
        let config = jetstream::stream::Config {
            max_messages,
            ..info.config.clone()
        };
        context
            .update_stream(config)
            .await
            .context("change the size limit of the stream")?;
        Ok(())
    }

    /// Publishes messages in order and waits until all of them are stored.
    pub async fn publish_all(&self, messages: Vec<NewMessage>) -> Result<()> {
        let context = jetstream::new(self.client().await?);
        for chunk in messages.chunks(500) {
            let mut answers = Vec::new();
            for message in chunk {
                let mut headers = HeaderMap::new();
                for (name, value) in &message.headers {
                    headers.append(name.as_str(), value.parse::<async_nats::HeaderValue>()?);
                }
                let publish = context.publish_with_headers(
                    message.subject.clone(),
                    headers,
                    message.body.clone().into(),
                );
                answers.push(publish.await.context("publish")?);
            }
            for answer in answers {
                answer
                    .await
                    .context("wait for the publish acknowledgement")?;
            }
        }
        Ok(())
    }

    /// Publishes a subject and a raw header block that no client library would send. An empty block
    /// means no headers.
    pub fn publish_raw(&self, subject: &[u8], headers: &[u8], body: &[u8]) -> Result<()> {
        use std::io::{BufRead, BufReader, Write};
        let mut stream =
            std::net::TcpStream::connect(("127.0.0.1", self.port)).context("connect")?;
        let connect = b"CONNECT {\"headers\":true,\"verbose\":false}\r\n";
        let sizes = match headers.len() {
            0 => format!(" {}\r\n", body.len()),
            length => format!(" {length} {}\r\n", length + body.len()),
        };
        let verb: &[u8] = if headers.is_empty() {
            b"PUB "
        } else {
            b"HPUB "
        };
        let bytes = [
            connect,
            verb,
            subject,
            sizes.as_bytes(),
            headers,
            body,
            b"\r\nPING\r\n",
        ]
        .concat();
        stream.write_all(&bytes).context("publish raw")?;
        for line in BufReader::new(stream).lines() {
            match line.context("read from the server")?.as_str() {
                "PONG" => return Ok(()),
                line if line.starts_with("-ERR") => bail!("the server refused the message: {line}"),
                _ => {}
            }
        }
        bail!("the server closed the connection")
    }

    /// All messages of a stream, raw, in sequence order.
    pub async fn read_stream(&self, stream: &str) -> Result<Vec<Stored>> {
        let context = jetstream::new(self.client().await?);
        let stream = context
            .get_stream(stream)
            .await
            .context("open the stream")?;
        let state = &stream.cached_info().state;
        if state.messages == 0 {
            return Ok(Vec::new());
        }
        let read = |sequence| {
            let stream = &stream;
            async move {
                match stream.direct_get(sequence).await {
                    Ok(message) => Ok(Some(message)),
                    // Deleted.
                    Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error).context("read a stream message"),
                }
            }
        };
        let mut stored = Vec::new();
        let mut messages = futures::stream::iter(state.first_sequence..=state.last_sequence)
            .map(read)
            .buffered(64);
        while let Some(message) = messages.next().await {
            let Some(message) = message? else { continue };
            let headers = message
                .headers
                .iter()
                .filter_map(|(name, values)| Some((name.to_string(), values.first()?.to_string())))
                .collect();
            let stored_at = jiff::Timestamp::from_nanosecond(message.time.unix_timestamp_nanos());
            stored.push(Stored {
                sequence: message.sequence,
                stored_at: stored_at.context("read a timestamp")?,
                subject: message.subject.to_string(),
                headers,
                body: message.payload.to_vec(),
            });
        }
        Ok(stored)
    }
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for entry in std::fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)
                .with_context(|| format!("copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}
