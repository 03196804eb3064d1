//! A world whose host dies on command, and whose database is reached through a proxy that cuts.

use anyhow::{Context, Result, ensure};
use support::database::{Database, Kind};
use support::guests;
use support::postgres::Cluster;
use support::proxy::Proxy;
use support::world::World;

/// PostgreSQL of its own, and what stands before it; none of both on SQLite.
pub struct ProxiedDatabase {
    pub cluster: Option<Cluster>,
    pub to_database: Option<Proxy>,
}

impl ProxiedDatabase {
    /// Gives a world its database, and the build of the host that has points to die at. A PostgreSQL with a late writer
    /// loses what is not waited for with the server.
    pub async fn install(world: &mut World, kind: Kind, late_writer: bool) -> Result<Self> {
        let program = guests::target_dir()?
            .parent()
            .context("find the target folder")?
            .join("chaos/oncely");
        ensure!(
            program.exists(),
            "{} is not there; `make chaos` builds it",
            program.display()
        );
        world.program = Some(program);
        if kind != Kind::Postgres {
            return Ok(ProxiedDatabase {
                cluster: None,
                to_database: None,
            });
        }
        let start = if late_writer {
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
        world.database = Database::Postgres { host, direct };
        Ok(ProxiedDatabase {
            cluster: Some(cluster),
            to_database: Some(proxy),
        })
    }
}
