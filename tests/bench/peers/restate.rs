//! The work of the contender `state` on Restate: a virtual object called with idempotency keys.

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use reqwest::Client;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::eventually::eventually;
use support::server::{Server, free_port};

use super::{KEYS, expected_counters, wait_for};
use crate::cpu;
use crate::stage::Measured;

/// How the messages arrive, and the settings of the server that change the rate.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    arrival: Arrival,
    /// Requests in flight.
    clients: usize,
    partitions: usize,
    /// How long the server keeps the journals of completed invocations. The default is a day.
    journal_retention: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// All are accepted before the clock starts, as the messages of the other contenders.
    Before,
    /// They arrive while the first ones are handled.
    During,
}

pub const SETTINGS: &[Setting] = &[
    setting(Arrival::Before, 256, 24, "1d"),
    setting(Arrival::Before, 256, 4, "1d"),
    setting(Arrival::Before, 256, 2, "1d"),
    setting(Arrival::Before, 256, 4, "0s"),
    setting(Arrival::Before, 256, 2, "0s"),
    setting(Arrival::During, 64, 4, "0s"),
    setting(Arrival::During, 256, 4, "0s"),
    setting(Arrival::During, 1_000, 4, "0s"),
];

const fn setting(
    arrival: Arrival,
    clients: usize,
    partitions: usize,
    journal_retention: &'static str,
) -> Setting {
    Setting {
        arrival,
        clients,
        partitions,
        journal_retention,
    }
}

impl Setting {
    pub fn json(&self) -> Value {
        json!({
            "arrival": format!("{:?}", self.arrival).to_lowercase(),
            "clients": self.clients, "partitions": self.partitions,
            "journal_retention": self.journal_retention,
        })
    }
}

/// At its start the server asks for its latest release, which no setting prevents. This keeps the
/// request on this machine.
const HOSTS: &str = "127.0.0.1 localhost api.github.com\n";

/// Measures the rate from the first output to the last.
pub async fn measure(target: &Path, setting: &Setting, messages: usize) -> Result<Measured> {
    let restate = Restate::start(target, setting).await?;
    let cpu_before = match setting.arrival {
        Arrival::Before => {
            restate.send(messages, setting.clients).await?;
            let before = cpu::seconds();
            restate.open()?;
            before
        }
        Arrival::During => {
            restate.open()?;
            let before = cpu::seconds();
            restate.send(messages, setting.clients).await?;
            before
        }
    };
    wait_for(messages, async || Ok(restate.report().await?.outputs)).await?;
    let cpu_micros = cpu::micros_since(&cpu_before, messages);
    restate.verify(messages).await?;
    let report = restate.report().await?;
    let micros = report.last_micros - report.first_micros;
    Ok(Measured {
        rate: messages as f64 / (micros as f64 / 1e6),
        cpu_micros,
        wal_bytes: None,
        transactions: None,
        memory_mib: None,
    })
}

/// A server with a deployment. Both stop when this is dropped, the server first.
struct Restate {
    client: Client,
    ingress: String,
    admin: String,
    /// The handlers wait until this file exists.
    start_file: PathBuf,
    _server: Server,
    _services: Server,
}

/// The outputs so far.
#[derive(Deserialize)]
struct Report {
    events: usize,
    outputs: usize,
    first_micros: u64,
    last_micros: u64,
}

impl Restate {
    async fn start(target: &Path, setting: &Setting) -> Result<Self> {
        let [server_folder, services_folder] = [folder()?, folder()?];
        let [fabric, ingress, admin, services] = ports()?;

        // Services
        let program = target.join("peers/release/peer-restate");
        let start_file = services_folder.join("open");
        let command = format!(
            "'{}' 127.0.0.1:{services} '{}'",
            program.display(),
            start_file.display()
        );
        let services_server = Server::start(&command, &services_folder)?;

        // Server. The other settings are the defaults, which fsync each write of the log.
        let config = format!(
            "disable-telemetry = true\n\
             listen-mode = \"tcp\"\n\
             bind-ip = \"127.0.0.1\"\n\
             advertised-host = \"127.0.0.1\"\n\
             bind-port = {fabric}\n\
             node-name = \"bench\"\n\
             auto-provision = true\n\
             default-num-partitions = {}\n\
             default-journal-retention = \"{}\"\n\
             log-filter = \"warn\"\n\
             base-dir = \"{}\"\n\
             [ingress]\n\
             bind-port = {ingress}\n\
             [admin]\n\
             bind-port = {admin}\n\
             disable-web-ui = true\n",
            setting.partitions,
            setting.journal_retention,
            server_folder.join("data").display()
        );
        let file = server_folder.join("restate.toml");
        std::fs::write(&file, config).context("write the configuration of Restate")?;
        let hosts = server_folder.join("hosts");
        std::fs::write(&hosts, HOSTS).context("write the hosts of Restate")?;
        let program = target.join("tools/peers/bin/restate-server");
        let command = format!(
            "unshare --user --map-root-user --mount sh -c 'mount --bind {} /etc/hosts && \
             exec \"{}\" --production --no-logo --config-file {}'",
            hosts.display(),
            program.display(),
            file.display()
        );
        let restate = Restate {
            client: Client::new(),
            ingress: format!("http://127.0.0.1:{ingress}"),
            admin: format!("http://127.0.0.1:{admin}"),
            start_file,
            _server: Server::start(&command, &server_folder)?,
            _services: services_server,
        };

        // Deployment
        let body = json!({ "uri": format!("http://127.0.0.1:{services}") });
        eventually("Restate accepts the deployment", async || {
            let url = format!("{}/deployments", restate.admin);
            let answer = restate.client.post(url).json(&body).send().await?;
            answer.error_for_status()?;
            Ok(Some(()))
        })
        .await?;
        eventually("the services answer", async || {
            restate.report().await.map(Some)
        })
        .await?;
        Ok(restate)
    }

    /// Lets the handlers run.
    fn open(&self) -> Result<()> {
        std::fs::write(&self.start_file, "").context("open the services")
    }

    async fn send(&self, messages: usize, clients: usize) -> Result<()> {
        futures::stream::iter((0..messages).map(|n| self.send_one(n)))
            .buffer_unordered(clients)
            .try_for_each(async |_| Ok(()))
            .await
    }

    /// Sends a message and returns its status, such as `Accepted`.
    async fn send_one(&self, n: usize) -> Result<String> {
        let url = format!("{}/Counter/k{}/add/send", self.ingress, n % KEYS);
        let event_id = format!("e{n}");
        let request = self
            .client
            .post(url)
            .header("idempotency-key", &event_id)
            .json(&event_id);
        let response = request.send().await.context("send a message")?;
        let answer: Value = response.error_for_status()?.json().await?;
        let status = answer["status"].as_str().context("find the status")?;
        Ok(status.to_owned())
    }

    async fn report(&self) -> Result<Report> {
        let url = format!("{}/Outputs/report", self.ingress);
        let response = self.client.post(url).send().await?.error_for_status()?;
        Ok(response.json().await?)
    }

    /// Checks that each message was handled once, and that its idempotency key still holds.
    async fn verify(&self, messages: usize) -> Result<()> {
        let status = self.send_one(0).await?;
        ensure!(status == "PreviouslyAccepted", "a duplicate was {status}");
        let report = self.report().await?;
        ensure!(
            report.outputs == messages && report.events == messages,
            "{} outputs of {} events, expected {messages}",
            report.outputs,
            report.events
        );
        let query = "select service_key, value_utf8 from state where service_name = 'Counter'";
        let request = self
            .client
            .post(format!("{}/query", self.admin))
            .header("accept", "application/json")
            .json(&json!({ "query": query }));
        let answer: Value = request.send().await?.error_for_status()?.json().await?;
        let rows = answer["rows"].as_array().context("find the counters")?;
        let counter = |row: &Value| -> Option<(String, i64)> {
            let key = row["service_key"].as_str()?.to_owned();
            Some((key, row["value_utf8"].as_str()?.parse().ok()?))
        };
        let counters: BTreeMap<String, i64> = rows.iter().filter_map(counter).collect();
        ensure!(counters == expected_counters(messages), "wrong counters");
        Ok(())
    }
}

/// A folder that its server removes.
fn folder() -> Result<PathBuf> {
    let folder = tempfile::Builder::new().prefix("oncely-restate-").tempdir();
    Ok(folder.context("create a folder")?.keep())
}

fn ports() -> Result<[u16; 4]> {
    Ok([free_port()?, free_port()?, free_port()?, free_port()?])
}
