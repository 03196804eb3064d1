//! A world with a fault-injecting host build and a proxy in front of its database.

use anyhow::{Context, Result, ensure};
use support::database::{Database, Kind};
use support::guests;
use support::postgres::Cluster;
use support::proxy::Proxy;
use support::world::World;

/// A dedicated PostgreSQL and its proxy; both are none on SQLite.
pub struct ProxiedDatabase {
    pub cluster: Option<Cluster>,
    pub to_database: Option<Proxy>,
}

/// Which build of the host a campaign runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostBuild {
    /// The product with crash points.
    CrashPoints,
    /// The same with the patches of `tests/mutants`, on a PostgreSQL with a late writer:
    /// asynchronous commits are lost with the server.
    Mutants,
}

impl HostBuild {
    fn program(self) -> &'static str {
        match self {
            HostBuild::CrashPoints => "oncely",
            HostBuild::Mutants => "oncely-mutants",
        }
    }

    fn make_target(self) -> &'static str {
        match self {
            HostBuild::CrashPoints => "chaos",
            HostBuild::Mutants => "mutants",
        }
    }
}

impl ProxiedDatabase {
    /// Equips a world with its database and the host build with crash points.
    pub async fn install(world: &mut World, kind: Kind, build: HostBuild) -> Result<Self> {
        let program = guests::target_dir()?
            .parent()
            .context("find the target folder")?
            .join("chaos")
            .join(build.program());
        ensure!(
            program.exists(),
            "{} does not exist; `make {}` builds it",
            program.display(),
            build.make_target()
        );
        world.program = Some(program);
        if kind != Kind::Postgres {
            return Ok(ProxiedDatabase {
                cluster: None,
                to_database: None,
            });
        }
        let start = if build == HostBuild::Mutants {
            Cluster::start_with_late_writer
        } else {
            Cluster::start
        };
        let cluster = tokio::task::spawn_blocking(start).await??;
        let proxy = Proxy::start(cluster.port()).await?;
        let Database::Postgres { direct, .. } = Database::on(&cluster).await? else {
            unreachable!()
        };
        let host = direct.replace(
            &format!(":{}/", cluster.port()),
            &format!(":{}/", proxy.port()),
        );
        world.database = Database::postgres(host, direct);
        Ok(ProxiedDatabase {
            cluster: Some(cluster),
            to_database: Some(proxy),
        })
    }
}
