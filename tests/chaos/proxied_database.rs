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

impl ProxiedDatabase {
    /// Equips a world with its database and the host build with fault points. With a late writer, a
    /// stop of PostgreSQL loses asynchronous commits.
    pub async fn install(world: &mut World, kind: Kind, late_writer: bool) -> Result<Self> {
        let program = guests::target_dir()?
            .parent()
            .context("find the target folder")?
            .join("chaos/oncely");
        ensure!(
            program.exists(),
            "{} does not exist; `make chaos` builds it",
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
