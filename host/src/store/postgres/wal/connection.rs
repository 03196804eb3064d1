//! The replication connection: directly to the server, as poolers do not support replication.

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

/// The end of the server's error if the slot is in use. The client library exposes only the text.
const IN_USE: &str = "(SQLSTATE 55006)";

/// How long the server may take to start the stream.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The interval of status updates, by which the server learns the WAL that it may remove.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// How many messages from the server are buffered; each may contain an output of the maximum size.
const BUFFERED_MAX: usize = 256;

/// The configuration of the replication connection.
#[derive(Clone)]
pub(in crate::store::postgres) struct Replication {
    config: ReplicationConfig,
    requires_tls: bool,
}

/// Why a stream did not start.
pub(super) enum StartError {
    /// Another host reads the slot.
    SlotInUse,
    Failed(anyhow::Error),
}

impl Replication {
    /// Creates a configuration from the URL of the server itself.
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

    /// Checks that the server accepts a replication connection.
    pub(super) async fn check(&self) -> Result<()> {
        self.check_tls()?;
        let asked = async {
            let mut client = ReplicationClient::connect_gated(self.config.clone()).await?;
            client.identify_system().await
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(anyhow::Error::new(error)),
            Err(_) => Err(anyhow!("no response within {CONNECT_TIMEOUT:?}")),
        }
        .with_context(|| {
            let (host, port) = (&self.config.host, self.config.port);
            format!("connect to {host}:{port} for replication")
        })
        .hint(
            "let the role log in (pg_hba.conf), and use the URL of the server itself in \
             `relay_database`, as poolers do not support replication; or relay = \"poll\"",
        )
    }

    fn check_tls(&self) -> Result<()> {
        if !self.requires_tls {
            return Ok(());
        }
        let error = "relay = \"wal\" cannot be used: \
                     the replication connection does not support TLS";
        Err(anyhow!(error).hint(
            "use the server's socket, or an address that is safe to reach without TLS, in \
             `relay_database`; or relay = \"poll\"",
        ))
    }

    /// Starts to stream a slot from a position.
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
                anyhow::Error::new(error).context("start the replication stream"),
            )),
            Err(_) => Err(StartError::Failed(anyhow!(
                "the replication stream did not start within {CONNECT_TIMEOUT:?}"
            ))),
        }
    }
}
