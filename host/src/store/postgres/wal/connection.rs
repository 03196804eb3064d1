//! Where and as whom the log is read: a connection to the server itself, as a pooler passes no replication on.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use percent_encoding::percent_decode_str;
use pgwire_replication::{Lsn as WireLsn, PgWireError, ReplicationClient, ReplicationConfig};
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::slot::PUBLICATION;
use crate::model::hint::WithHint;
use crate::store::Lsn;
use crate::store::instance::Instance;

/// How the server's answer ends when the slot has a reader already; the client library gives nothing but the text.
const IN_USE: &str = "(SQLSTATE 55006)";

/// How long the server may take to let the reader in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the server is told what it may remove of its log, when that has moved.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// How many messages of the server wait in memory; each may hold an output of the greatest size.
const BUFFERED_MAX: usize = 256;

/// What is needed to connect.
#[derive(Clone)]
pub(in crate::store::postgres) struct Replication {
    config: ReplicationConfig,
    requires_tls: bool,
}

/// Why there is no stream.
pub(super) enum StartError {
    /// Another host reads.
    SlotInUse,
    Failed(anyhow::Error),
}

impl Replication {
    /// From the URL of the server itself.
    pub(in crate::store::postgres) fn new(url: &str, instance: Instance) -> Result<Self> {
        let options =
            PgConnectOptions::from_str(url).context("read the PostgreSQL URL of the relay")?;
        let requires_tls = matches!(
            options.get_ssl_mode(),
            PgSslMode::Require | PgSslMode::VerifyCa | PgSslMode::VerifyFull
        );
        let whole = options.to_url_lossy();
        let password = percent_decode_str(whole.password().unwrap_or_default())
            .decode_utf8_lossy()
            .into_owned();
        let user = options.get_username();
        let host = options
            .get_socket()
            .map_or(options.get_host().to_owned(), |socket| {
                socket.display().to_string()
            });
        let database = options.get_database().unwrap_or(user);
        let config = ReplicationConfig::new(host, user, password, database, "", PUBLICATION)
            .with_port(options.get_port())
            .with_binary(true)
            .with_buffer_size(BUFFERED_MAX)
            .with_status_interval(STATUS_INTERVAL)
            .with_application_name(instance.name("oncely relay"));
        Ok(Replication {
            config,
            requires_tls,
        })
    }

    /// Whether the server lets a reader in.
    pub(super) async fn check(&self) -> Result<()> {
        self.check_tls()?;
        let asked = async {
            let mut client = ReplicationClient::connect_gated(self.config.clone()).await?;
            client.identify_system().await
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(anyhow::Error::new(error)),
            Err(_) => Err(anyhow!("no answer after {CONNECT_TIMEOUT:?}")),
        }
        .with_context(|| format!("connect to {}:{} for replication", self.config.host, self.config.port))
        .hint(
            "the server must let the role in (pg_hba.conf), and a pooler passes no replication on: name the server itself in \
             `relay_database`; or relay = \"poll\"",
        )
    }

    fn check_tls(&self) -> Result<()> {
        if !self.requires_tls {
            return Ok(());
        }
        Err(anyhow!("relay = \"wal\" cannot be used: the replication connection does not speak TLS").hint(
            "name the server's socket, or an address that is safe to reach without TLS, in `relay_database`; \
             or relay = \"poll\"",
        ))
    }

    /// Begins to read a slot from a place on.
    pub(super) async fn start(
        &self,
        slot: String,
        from: Lsn,
    ) -> std::result::Result<ReplicationClient, StartError> {
        self.check_tls().map_err(StartError::Failed)?;
        let mut config = self.config.clone().with_start_lsn(WireLsn::from_u64(from));
        config.slot = slot;
        let started = async {
            let mut client = ReplicationClient::connect(config).await?;
            client.wait_started().await?;
            Ok(client)
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, started).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(PgWireError::Server(why))) if why.ends_with(IN_USE) => {
                Err(StartError::SlotInUse)
            }
            Ok(Err(error)) => Err(StartError::Failed(
                anyhow::Error::new(error).context("read the database's log"),
            )),
            Err(_) => Err(StartError::Failed(anyhow!(
                "reading the database's log does not begin in {CONNECT_TIMEOUT:?}"
            ))),
        }
    }
}
