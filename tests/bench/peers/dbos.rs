//! The work of the contender `state` on DBOS: a workflow with a transaction and a message.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sqlx::PgPool;
use support::eventually::eventually;
use support::postgres::Cluster;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use super::{KEYS, expected_counters, wait_for};
use crate::cpu;
use crate::stage::Measured;

/// The settings that change the rate.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    processes: usize,
    /// Workflows at a time in each process.
    threads: usize,
    polling_seconds: f64,
    /// How the output is sent: `send` or `transaction`; see `tests/peers/dbos/app.py`.
    output: &'static str,
    /// Whether receivers are notified by PostgreSQL, or poll.
    is_listening: bool,
}

pub const SETTINGS: &[Setting] = &[
    setting(2, 8, 0.02, "send", true),
    setting(2, 8, 0.02, "send", false),
    setting(2, 8, 0.02, "transaction", false),
    setting(3, 8, 0.02, "transaction", false),
    setting(4, 4, 0.02, "transaction", false),
    setting(2, 32, 0.1, "transaction", false),
];

const fn setting(
    processes: usize,
    threads: usize,
    polling_seconds: f64,
    output: &'static str,
    is_listening: bool,
) -> Setting {
    Setting {
        processes,
        threads,
        polling_seconds,
        output,
        is_listening,
    }
}

impl Setting {
    pub fn json(&self) -> Value {
        json!({
            "processes": self.processes, "threads": self.threads,
            "polling_seconds": self.polling_seconds, "output": self.output,
            "use_listen_notify": self.is_listening,
        })
    }

    fn arguments(&self) -> [String; 4] {
        let listening = if self.is_listening { "listen" } else { "poll" };
        let (threads, polling) = (self.threads, self.polling_seconds);
        [
            threads.to_string(),
            polling.to_string(),
            self.output.to_owned(),
            listening.to_owned(),
        ]
    }
}

/// Measures the rate from the first output to the last.
pub async fn measure(
    target: &Path,
    cluster: &Cluster,
    setting: &Setting,
    messages: usize,
) -> Result<Measured> {
    let url = cluster.url(&cluster.create_database().await?);
    let app = App {
        python: target.join("tools/peers/dbos/bin/python"),
        url: url.replace("postgres:", "postgresql:"),
        setting: *setting,
    };
    app.prepare(messages).await?;
    let mut workers = Vec::new();
    for _ in 0..setting.processes {
        workers.push(app.worker().await?);
    }

    // Measurement
    let pool = PgPool::connect(&url).await?;
    let cpu_before = cpu::seconds();
    for worker in &mut workers {
        let input = worker.stdin.as_mut().context("find the input")?;
        input
            .write_all(b"start\n")
            .await
            .context("start a worker")?;
    }
    let outputs = "select count(*) from dbos.notifications";
    wait_for(messages, async || {
        Ok(usize::try_from(number(&pool, outputs).await?)?)
    })
    .await?;
    let cpu_micros = cpu::micros_since(&cpu_before, messages);
    verify(&pool, messages).await?;
    for mut worker in workers {
        drop(worker.stdin.take());
        worker.wait().await.context("stop a worker")?;
    }
    let span = "select max(created_at_epoch_ms) - min(created_at_epoch_ms) from dbos.notifications";
    let millis = number(&pool, span).await?;
    Ok(Measured {
        rate: messages as f64 / (millis as f64 / 1e3),
        cpu_micros,
        wal_bytes: None,
        transactions: None,
        memory_mib: None,
    })
}

/// The processes of the application.
struct App {
    python: PathBuf,
    url: String,
    setting: Setting,
}

impl App {
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.python);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/dbos/app.py");
        command.arg(script).args([name, &self.url]);
        command.args(self.setting.arguments());
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command.kill_on_drop(true);
        command
    }

    /// Creates the tables and enqueues the messages.
    async fn prepare(&self, messages: usize) -> Result<()> {
        let mut command = self.command("prepare");
        command.args([messages.to_string(), KEYS.to_string()]);
        let output = command.output().await.context("run app.py")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "app.py failed:\n{errors}");
        Ok(())
    }

    /// Starts a worker that waits for a line on its standard input.
    async fn worker(&self) -> Result<Child> {
        let mut command = self.command("work");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut worker = command.spawn().context("run app.py")?;
        let output = worker.stdout.take().context("find the output")?;
        let line = BufReader::new(output).lines().next_line().await?;
        ensure!(
            line.as_deref() == Some("ready"),
            "the worker printed {line:?}"
        );
        Ok(worker)
    }
}

/// Checks that all workflows end, and that each message was handled once.
async fn verify(pool: &PgPool, messages: usize) -> Result<()> {
    let succeeded = "select count(*) from dbos.workflow_status \
        where queue_name = 'inputs' and status = 'SUCCESS'";
    let all = i64::try_from(messages)?;
    eventually("all workflows succeed", async || {
        Ok((number(pool, succeeded).await? == all).then_some(()))
    })
    .await?;
    let outputs = number(pool, "select count(*) from dbos.notifications").await?;
    let distinct = "select count(distinct message) from dbos.notifications";
    let events = number(pool, distinct).await?;
    ensure!(
        outputs == all && events == all,
        "{outputs} outputs of {events} events, expected {messages}"
    );
    let sums = [
        "select key, value from counters",
        "select substr(destination_uuid, 9), count(*) from dbos.notifications group by 1",
    ];
    for sum in sums {
        let rows: Vec<(String, i64)> = sqlx::query_as(sum).fetch_all(pool).await?;
        let rows: BTreeMap<String, i64> = rows.into_iter().collect();
        ensure!(
            rows == expected_counters(messages),
            "wrong result of: {sum}"
        );
    }
    Ok(())
}

async fn number(pool: &PgPool, query: &'static str) -> Result<i64> {
    let number = sqlx::query_scalar(query).fetch_one(pool);
    number.await.with_context(|| format!("run {query}"))
}
