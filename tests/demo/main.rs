//! `make demo`: payments over HTTP with duplicates, lost answers and a host kill, and their checks.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer};
use futures::StreamExt;
use oncely_client::Client;
use serde_json::{Value, json};
use sqlx::{Connection, SqliteConnection};
use support::guests::repository;
use support::proxy::{Cut, Proxy};
use support::server::free_port;

mod previous_demo;

/// Payments, each with its own event id.
const PAYMENTS: usize = 300;
/// Every n-th payment is published twice.
const TWICE_EVERY: usize = 10;
/// Messages that are not payments.
const MALFORMED: usize = 12;
/// Interval between messages, so that the kill hits messages in flight.
const SEND_INTERVAL: Duration = Duration::from_millis(8);
const PAYMENTS_EXAMPLE: &str = "examples/payments";
/// Responses that never reach the client, each the first one of its request.
const DROPPED: i64 = 5;
const PATIENCE: Duration = Duration::from_secs(60);

const ACCOUNTS: [&str; 8] = [
    "alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi",
];

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            clear_line();
            oncely::cli::term::error(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let folder = repository().join("target/demo");
    let _lock = previous_demo::lock(&folder)?;
    previous_demo::remove(&folder)?;
    let mut demo = Demo::prepare(folder)?;
    say("Building the worker of examples/payments.");
    demo.build_worker()?;
    say("Starting a host: SQLite, its own nats-server, and the worker of examples/payments.");
    demo.start_host().await?;
    let messages = workload();
    say(&format!(
        "Sending {PAYMENTS} payments over HTTP, {} of them a second time directly to the stream, and {MALFORMED} \
         malformed ones.\nThe network drops {DROPPED} responses, so the client retries.",
        PAYMENTS / TWICE_EVERY
    ));
    let proxy = Arc::new(Proxy::start(demo.http_port).await?);
    let dropped = Arc::new(AtomicI64::new(0));
    let dropping = tokio::spawn(drop_answers(Arc::clone(&proxy), Arc::clone(&dropped)));
    let http = format!("http://127.0.0.1:{}", proxy.port());
    let sending = tokio::spawn(send_all(http, demo.nats_url()?, messages));
    demo.until_settled(PAYMENTS as i64 / 3).await?;
    say("Killing the host with SIGKILL under load.");
    demo.kill_host()?;
    let settled = demo.settled().await?;
    say(&format!(
        "The host is dead; {settled} messages are settled. Restarting it."
    ));
    demo.start_host().await?;
    let sent = sending.await.context("send")??;
    dropping.abort();
    demo.until_quiet(sent.messages).await?;
    let books = demo.books(&sent, dropped.load(Ordering::Relaxed)).await?;
    show(&books);
    demo.write(&books)?;
    demo.stop_host()?;
    check(&books)?;
    demo.print_check_commands();
    Ok(())
}

/// Files and processes of the demo.
struct Demo {
    folder: PathBuf,
    oncely: PathBuf,
    http_port: u16,
    host: Option<Child>,
}

/// A message: event id and body.
struct Payment {
    event_id: String,
    account: String,
    body: Vec<u8>,
    /// A duplicate, published without regard to the first attempt.
    is_copy: bool,
}

/// Figures that the demo checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Books {
    published: i64,
    tries: i64,
    dropped: i64,
    replayed: i64,
    unique: i64,
    effects: i64,
    outputs: i64,
    outputs_unique: i64,
    duplicates_skipped: i64,
    dead_letters: i64,
    ledger_sum: i64,
}

/// Payments in a fixed order, with copies a little later and malformed messages in between.
fn workload() -> Vec<Payment> {
    let pick = |n: usize| {
        ACCOUNTS
            .get(n % ACCOUNTS.len())
            .copied()
            .unwrap_or_default()
    };
    let payment = |n: usize| {
        let (from, to) = (pick(n * 5), pick(n * 5 + 1 + n % 7));
        let cents = 100 + (n * 7919) % 20_000;
        let body = json!({ "payment": format!("p-{n}"), "from": from, "to": to, "cents": cents });
        Payment {
            event_id: format!("p-{n}"),
            account: from.to_owned(),
            body: body.to_string().into_bytes(),
            is_copy: false,
        }
    };
    let mut messages = Vec::new();
    for n in 0..PAYMENTS {
        messages.push(payment(n));
        if n % TWICE_EVERY == 7 {
            messages.push(Payment {
                is_copy: true,
                ..payment(n - n % 5)
            });
        }
        if n % (PAYMENTS / MALFORMED) == 11 {
            let body = json!({ "payment": format!("m-{n}"), "from": "alice", "cents": "a lot" });
            let account = "alice".to_owned();
            messages.push(Payment {
                event_id: format!("m-{n}"),
                account,
                body: body.to_string().into_bytes(),
                is_copy: false,
            });
        }
    }
    messages
}

/// The results of sending.
#[derive(Debug, Default)]
struct Sent {
    messages: i64,
    /// Requests over HTTP, counting each try.
    tries: i64,
    /// Requests whose last try was answered with the stored response of an earlier one.
    replayed: i64,
}

/// Sends messages at a fixed interval. A payment is sent over HTTP, with retries until an answer
/// arrives. A copy is published directly to the stream.
async fn send_all(http: String, nats: String, messages: Vec<Payment>) -> Result<Sent> {
    let context = jetstream::new(
        async_nats::connect(&nats)
            .await
            .context("connect to NATS")?,
    );
    let client = Client::builder(&http)
        .try_timeout(Duration::from_secs(5))
        .deadline(PATIENCE)
        .build()?;
    let count = messages.len();
    let mut sent = Sent::default();
    for (n, message) in messages.into_iter().enumerate() {
        if message.is_copy {
            publish_directly(&context, message).await?;
        } else {
            let post = client
                .publish("payments.requested", message.body)
                .key(&*message.event_id);
            let post = post
                .header("X-Message-Ce-Id", &message.event_id)
                .header("X-Message-Ce-Source", "/demo");
            let answer = post
                .header("X-Message-Account", &message.account)
                .send()
                .await
                .context("post a payment")?;
            sent.tries += i64::from(answer.tries);
            sent.replayed += i64::from(answer.replayed);
        }
        sent.messages += 1;
        progress("sent", n + 1, count);
        tokio::time::sleep(SEND_INTERVAL).await;
    }
    Ok(sent)
}

async fn publish_directly(context: &jetstream::Context, message: Payment) -> Result<()> {
    let mut headers = HeaderMap::new();
    // A repeated payment keeps its event id; to the broker each message is new.
    headers.insert("ce-id", message.event_id.as_str());
    headers.insert("ce-source", "/demo");
    headers.insert("Nats-Msg-Id", uuid::Uuid::new_v4().to_string().as_str());
    headers.insert("Account", message.account.as_str());
    context
        .publish_with_headers("payments.requested", headers, message.body.into())
        .await?
        .await?;
    Ok(())
}

/// Repeatedly drops a connection after a request was carried out and before its answer arrives.
async fn drop_answers(proxy: Arc<Proxy>, dropped: Arc<AtomicI64>) {
    while dropped.load(Ordering::Relaxed) < DROPPED {
        if proxy.cut(Cut::HttpFirstAnswerLost, PATIENCE).await {
            dropped.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(SEND_INTERVAL * 10).await;
    }
}

impl Demo {
    /// Creates an empty working folder.
    fn prepare(folder: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&folder).context("create the demo's folder")?;
        Ok(Demo {
            folder,
            oncely: support::guests::oncely()?,
            http_port: free_port()?,
            host: None,
        })
    }

    fn data_dir(&self) -> PathBuf {
        self.folder.join(".oncely")
    }

    /// The host would build the worker as well, but into a log file; here cargo's progress is
    /// visible.
    fn build_worker(&self) -> Result<()> {
        let mut build = Command::new(&self.oncely);
        let status = build
            .arg("build")
            .arg(PAYMENTS_EXAMPLE)
            .current_dir(repository())
            .stdout(Stdio::null())
            .status();
        ensure!(
            status.context("run `oncely build`")?.success(),
            "the worker of {PAYMENTS_EXAMPLE} does not build"
        );
        Ok(())
    }

    async fn start_host(&mut self) -> Result<()> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("host.log"))?;
        let _ = std::fs::remove_file(self.data_dir().join("host.json"));
        let host = Command::new(&self.oncely)
            .args([
                "dev",
                "--listen",
                "127.0.0.1:0",
                "--http-publish",
                "payments.requested",
                "--data-dir",
            ])
            .arg(self.data_dir())
            .args(["--http", &format!("127.0.0.1:{}", self.http_port)])
            .arg(repository().join(PAYMENTS_EXAMPLE))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the host")?;
        self.host = Some(host);
        let started = Instant::now();
        while !self.is_ready() {
            if let Some(status) = self
                .host
                .as_mut()
                .and_then(|host| host.try_wait().ok())
                .flatten()
            {
                bail!("the host exited with {status}:\n{}", self.host_log());
            }
            ensure!(
                started.elapsed() < Duration::from_secs(300),
                "the host is not ready:\n{}",
                self.host_log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        say(&format!(
            "The host is ready after {:.1} s.",
            started.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    fn is_ready(&self) -> bool {
        let output = Command::new(&self.oncely)
            .args(["status", "--json"])
            .current_dir(&self.folder)
            .output();
        let status = output
            .ok()
            .and_then(|output| serde_json::from_slice::<Value>(&output.stdout).ok());
        status.is_some_and(|status| status.get("ready") == Some(&Value::Bool(true)))
    }

    fn kill_host(&mut self) -> Result<()> {
        if let Some(mut host) = self.host.take() {
            host.kill().context("kill the host")?;
            host.wait().context("wait for the killed host")?;
        }
        Ok(())
    }

    fn stop_host(&mut self) -> Result<()> {
        if let Some(mut host) = self.host.take() {
            support::world::signal(host.id(), "TERM")?;
            let status = host.wait().context("wait for the host")?;
            ensure!(
                status.success(),
                "the host exited with {status}:\n{}",
                self.host_log()
            );
        }
        Ok(())
    }

    fn host_log(&self) -> String {
        std::fs::read_to_string(self.folder.join("host.log")).unwrap_or_default()
    }

    fn nats_url(&self) -> Result<String> {
        let text =
            std::fs::read_to_string(self.data_dir().join("host.json")).context("read host.json")?;
        let file: Value = serde_json::from_str(&text).context("read host.json")?;
        Ok(file
            .get("nats")
            .and_then(Value::as_str)
            .context("find NATS in host.json")?
            .to_owned())
    }

    async fn number(&self, sql: &'static str) -> Result<i64> {
        let path = self.data_dir().join("oncely.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(path)
            .read_only(true);
        let mut connection = SqliteConnection::connect_with(&options)
            .await
            .context("open the database")?;
        Ok(sqlx::query_scalar(sql).fetch_one(&mut connection).await?)
    }

    /// Messages with a final state in the inbox.
    async fn settled(&self) -> Result<i64> {
        self.number("select count(*) from oncely_inbox").await
    }

    async fn until_settled(&self, count: i64) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.settled().await? < count {
            ensure!(Instant::now() < end, "nothing moves:\n{}", self.host_log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Waits until every message is acknowledged and every output is published.
    async fn until_quiet(&self, published: i64) -> Result<()> {
        let context = jetstream::new(async_nats::connect(self.nats_url()?).await?);
        let stream = context.get_stream("PAYMENTS").await?;
        let end = Instant::now() + PATIENCE;
        let mut shown = -1;
        loop {
            let info = stream.consumer_info("oncely-settle").await?;
            let left = info.num_pending as i64 + info.num_ack_pending as i64;
            let unpublished = self
                .number("select count(*) from oncely_outbox where published_at is null")
                .await?;
            let handled = (published - left).max(0);
            if handled != shown {
                progress("handled", handled as usize, published as usize);
                shown = handled;
            }
            if left == 0 && unpublished == 0 {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "{left} messages and {unpublished} outputs remain:\n{}",
                self.host_log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Reads all figures from the database and from the streams themselves.
    async fn books(&self, sent: &Sent, dropped: i64) -> Result<Books> {
        let published = sent.messages;
        let nats = self.nats_url()?;
        let requested = read_ids(&nats, "payments.requested").await?;
        ensure!(
            requested.len() as i64 == published,
            "the stream holds {} of {published} messages",
            requested.len()
        );
        let settled = read_ids(&nats, "payments.settled").await?;
        let declined = read_ids(&nats, "payments.declined").await?;
        let outputs: Vec<&String> = settled.iter().chain(&declined).map(|(id, _)| id).collect();
        let unique: BTreeSet<&String> = requested.iter().map(|(_, event)| event).collect();
        let moved = self
            .number("select count(*) from (select payment from entry where payment like 'p-%' group by payment having count(*) = 2)")
            .await?;
        Ok(Books {
            published,
            tries: sent.tries,
            dropped,
            replayed: sent.replayed,
            unique: unique.len() as i64,
            effects: moved + declined.len() as i64,
            outputs: outputs.len() as i64,
            outputs_unique: outputs.iter().collect::<BTreeSet<_>>().len() as i64,
            // The whole stream is handled: messages without an inbox row were skipped as
            // duplicates.
            duplicates_skipped: published - self.settled().await?,
            dead_letters: self
                .number("select count(*) from oncely_dead_letter")
                .await?,
            ledger_sum: self.number("select sum(cents) from entry").await?,
        })
    }

    fn write(&self, books: &Books) -> Result<()> {
        let json = json!({
            "published": books.published,
            "tries": books.tries,
            "dropped": books.dropped,
            "replayed": books.replayed,
            "unique": books.unique,
            "effects": books.effects,
            "outputs": books.outputs,
            "outputs_unique": books.outputs_unique,
            "duplicates_skipped": books.duplicates_skipped,
            "dead_letters": books.dead_letters,
            "ledger_sum": books.ledger_sum,
        });
        let text = serde_json::to_string_pretty(&json).context("write the books")?;
        std::fs::write(self.folder.join("books.json"), text + "\n").context("write books.json")
    }

    fn print_check_commands(&self) {
        let shown = |path: PathBuf| {
            let here = std::env::current_dir().unwrap_or_default();
            path.strip_prefix(&here)
                .map(Path::to_owned)
                .unwrap_or(path)
                .display()
                .to_string()
        };
        let database = shown(self.data_dir().join("oncely.db"));
        let data_dir = shown(self.data_dir());
        let oncely = shown(self.oncely.clone());
        println!(
            "\nTo check the figures, which are also in {}:",
            shown(self.folder.join("books.json"))
        );
        println!("  sqlite3 {database} 'select state, count(*) from oncely_inbox group by state'");
        println!("  sqlite3 {database} 'select sum(cents), count(*) from entry'");

        // The shell's PATH may lack a nats-server that `make` installed.
        let tools = repository().join("target/tools/bin");
        let path = if tools.exists() {
            format!("PATH={}:$PATH ", shown(tools))
        } else {
            String::new()
        };
        println!(
            "  {path}{oncely} dev --data-dir {data_dir} examples/payments    # then, in another terminal:"
        );
        println!(
            "  (cd {} && {} dlq list)",
            shown(self.folder.clone()),
            self.oncely.display()
        );
        println!(
            "  nats stream view PAYMENTS --server URL    # the URL that `oncely dev` prints; any NATS client works"
        );
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.kill_host();
    }
}

/// Message id and event id of all messages to a subject, raw from the stream.
async fn read_ids(nats: &str, subject: &str) -> Result<Vec<(String, String)>> {
    let context = jetstream::new(async_nats::connect(nats).await?);
    let stream = context.get_stream("PAYMENTS").await?;
    let config = consumer::pull::OrderedConfig {
        filter_subject: subject.to_owned(),
        ..Default::default()
    };
    let consumer = stream.create_consumer(config).await?;
    let mut left = consumer.cached_info().num_pending;
    let mut messages = consumer.messages().await?;
    let mut ids = Vec::new();
    while left > 0 {
        let message = messages.next().await.context("read the stream")??;
        let header = |name: &str| {
            let headers = message.headers.as_ref();
            headers
                .and_then(|headers| headers.get(name))
                .map(ToString::to_string)
                .unwrap_or_default()
        };
        ids.push((header("Nats-Msg-Id"), header("ce-id")));
        left -= 1;
    }
    Ok(ids)
}

fn show(books: &Books) {
    println!("\nThe books");
    for (what, figure) in [
        ("messages published", books.published),
        ("requests over HTTP, counting each try", books.tries),
        ("responses the network dropped", books.dropped),
        (
            "responses lost with the killed host",
            books.replayed - books.dropped,
        ),
        ("retries that got the stored response", books.replayed),
        ("distinct event ids", books.unique),
        ("payments that took effect", books.effects),
        ("outputs on the stream", books.outputs),
        ("distinct outputs on the stream", books.outputs_unique),
        ("duplicates skipped", books.duplicates_skipped),
        ("dead letters", books.dead_letters),
        ("sum of the ledger", books.ledger_sum),
    ] {
        println!("{what:>42}: {figure:>5}");
    }
}

/// Checks the figures.
fn check(books: &Books) -> Result<()> {
    let (payments, malformed) = (PAYMENTS as i64, MALFORMED as i64);
    ensure!(
        books.unique == payments + malformed,
        "{} event ids were published",
        books.unique
    );
    ensure!(
        books.effects == payments,
        "{} of {payments} payments took effect",
        books.effects
    );
    ensure!(
        books.outputs == payments && books.outputs_unique == payments,
        "the outputs do not match the payments"
    );
    ensure!(
        books.duplicates_skipped == books.published - books.unique,
        "duplicates were not skipped"
    );
    ensure!(
        books.dead_letters == malformed,
        "{} dead letters",
        books.dead_letters
    );
    ensure!(
        books.dropped == DROPPED,
        "{} responses were dropped instead of {DROPPED}",
        books.dropped
    );

    // A request that was carried out and whose response was lost is answered once from its stored
    // response.
    ensure!(
        books.replayed >= DROPPED,
        "{} retries got the stored response, expected at least {DROPPED}",
        books.replayed
    );
    ensure!(
        books.ledger_sum == 0,
        "the ledger sums to {}",
        books.ledger_sum
    );
    println!("\nEvery payment took effect once, and every output is on the stream once.");
    Ok(())
}

fn say(sentence: &str) {
    clear_line();
    println!("{sentence}");
}

/// Shows progress: one line that is overwritten on a terminal, a line per quarter elsewhere.
fn progress(what: &str, done: usize, total: usize) {
    use std::io::IsTerminal;
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K  {what} {done} of {total}");
        let _ = std::io::stdout().flush();
        if done == total {
            println!();
        }
    } else if done > 0 && (done == total || done.is_multiple_of((total / 4).max(1))) {
        println!("  {what} {done} of {total}");
    }
}

fn clear_line() {
    use std::io::IsTerminal;
    if std::io::stdout().is_terminal() {
        print!("\r\x1b[K");
    }
}
