//! A PgBouncer per test process, in transaction pooling mode.

use std::net::TcpStream;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::postgres::{self, as_postgres};
use crate::server::{Server, free_port};

/// Server connections per database; few, so that clients really share them.
const SERVER_CONNECTIONS: u32 = 4;

pub struct Bouncer {
    port: u16,
    _server: Server,
}

/// Each test has its own database: idle connections of finished tests would exhaust the cluster.
const KEPT_IDLE_SECONDS: u32 = 5;

impl Bouncer {
    /// Starts a pooler in front of the shared cluster.
    fn start() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-pgbouncer-")
            .tempdir()
            .context("create a folder")?
            .keep();
        let (port, upstream) = (free_port()?, postgres::shared().port());
        let settings = folder.join("pgbouncer.ini");
        let (users, rules) = (folder.join("users.txt"), folder.join("hba.conf"));

        // PgBouncer knows the platform's role. It looks up the apps' roles, which a host creates.
        std::fs::write(&users, "\"postgres\" \"\"\n").context("write the PgBouncer user list")?;
        std::fs::write(&rules, postgres::RULES).context("write the PgBouncer access rules")?;
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={upstream}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = hba\nauth_hba_file = {}\nauth_file = {}\n\
             auth_user = postgres\npool_mode = transaction\n\
             max_client_conn = 500\ndefault_pool_size = {SERVER_CONNECTIONS}\n\
             server_idle_timeout = {KEPT_IDLE_SECONDS}\n",
            rules.display(),
            users.display(),
        );
        std::fs::write(&settings, text).context("write the PgBouncer settings")?;
        let readable = Command::new("chmod")
            .arg("-R")
            .arg("a+rX")
            .arg(&folder)
            .status();
        ensure!(
            readable.is_ok_and(|status| status.success()),
            "failed to make {} readable",
            folder.display()
        );
        let command = format!(
            "{} {} {}",
            as_postgres().join(" "),
            program()?,
            settings.display()
        );
        let server = Server::start(&command, &folder)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(Instant::now() < deadline, "PgBouncer did not start in time");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Bouncer {
            port,
            _server: server,
        })
    }

    /// The URL of a database behind the pooler.
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://postgres@127.0.0.1:{}/{database}?statement-cache-capacity=0",
            self.port
        )
    }
}

/// The pooler that the tests share.
pub fn shared() -> &'static Bouncer {
    static SHARED: OnceLock<Bouncer> = OnceLock::new();
    SHARED.get_or_init(|| Bouncer::start().expect("start PgBouncer"))
}

fn program() -> anyhow::Result<&'static str> {
    let places = [
        "/usr/sbin/pgbouncer",
        "/usr/bin/pgbouncer",
        "/usr/local/bin/pgbouncer",
    ];
    places
        .into_iter()
        .find(|place| std::path::Path::new(place).exists())
        .context("find PgBouncer (`apt-get install pgbouncer`)")
}
