//! The instance that this host is: says that it is alive, and takes over from those that no longer do.
//!
//! A frozen host, or one that is cut off, keeps its transactions open: the server sees nothing but a client that thinks. How
//! long guests may think is a matter of their manifest, so no timeout of the server can tell. An instance that renews its
//! lease is alive; one that does not has its sessions ended.

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row, raw_sql};
use tokio::sync::Mutex;

use super::errors;
use crate::store::instance::{HOST_LEASE, Instance, RENEW_TIMEOUT, TakenOver};
use crate::store::{Result, shared};

/// No lease of an output is longer.
const OUTPUT_LEASE_MAX: &str = "1 minute";

/// The lease of this host's instance, on a connection of its own: no work of the host can hold it up.
pub(super) struct HostLease {
    instance: Instance,
    options: PgConnectOptions,
    connection: Mutex<Option<PgConnection>>,
}

impl HostLease {
    pub(super) fn new(instance: Instance, options: PgConnectOptions) -> Self {
        HostLease {
            instance,
            options,
            connection: Mutex::new(None),
        }
    }

    /// Renews the lease, and takes over from instances whose lease ran out. Dropped half-way, it closes its connection.
    pub(super) async fn renew(&self) -> Result<Vec<TakenOver>> {
        let mut cached = self.connection.lock().await;
        let mut connection = match cached.take() {
            Some(connection) => connection,
            None => self
                .options
                .connect()
                .await
                .map_err(|error| errors::from_statement(error, "connect to PostgreSQL"))?,
        };
        let taken_over = renew_and_take_over(&mut connection, self.instance.id()).await?;
        *cached = Some(connection);
        Ok(taken_over)
    }

    /// Gives the lease up, and what the instance still has leased.
    pub(super) async fn release(&self) {
        let Some(mut connection) = self.connection.lock().await.take() else {
            return;
        };
        let ended = async {
            remove_instance(&mut connection, self.instance.id()).await?;
            connection
                .close()
                .await
                .map_err(|error| errors::from_statement(error, "close a connection"))
        };
        match tokio::time::timeout(RENEW_TIMEOUT, ended).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(
                "the host's lease runs out: {:#}",
                anyhow::Error::from(error)
            ),
            Err(_) => {
                tracing::debug!("the host's lease runs out: no answer after {RENEW_TIMEOUT:?}")
            }
        }
    }
}

async fn renew_and_take_over(connection: &mut PgConnection, id: i64) -> Result<Vec<TakenOver>> {
    renew(connection, id).await?;
    let gone = end_sessions(connection, id).await?;
    let mut taken_over = Vec::with_capacity(gone.len());
    for (gone, sessions) in gone {
        // What a session of it commits until it has ended is leased by it, too.
        let outputs = if sessions == 0 {
            remove_instance(connection, gone).await?
        } else {
            None
        };
        let has_effect = sessions > 0 || outputs.is_some();
        if has_effect {
            taken_over.push(TakenOver {
                instance: format!("{gone:016x}"),
                sessions,
                outputs,
            });
        }
    }
    Ok(taken_over)
}

/// One explicit transaction in one message; nothing is set beyond its end.
fn transaction(statements: &str) -> String {
    let within = RENEW_TIMEOUT.as_millis();
    format!(
        "begin isolation level read committed read write; set local search_path = pg_catalog, pg_temp; \
         set local statement_timeout = {within}; set local lock_timeout = {}; \
         set local idle_in_transaction_session_timeout = {within}; set local synchronous_commit = off; {statements}; commit",
        within / 2
    )
}

async fn renew(connection: &mut PgConnection, id: i64) -> Result<()> {
    let lease = shared::micros(HOST_LEASE);
    let renew = transaction(&format!(
        "insert into oncely.host_instance (id, lease_until)
         values ({id}, clock_timestamp() + {lease} * interval '1 microsecond')
         on conflict (id) do update set lease_until = excluded.lease_until"
    ));
    let renewed = raw_sql(AssertSqlSafe(renew)).execute(connection).await;
    renewed
        .map(|_| ())
        .map_err(|error| errors::from_statement(error, "renew the host's lease"))
}

/// Ends the sessions of instances whose lease ran out, as far as they are in a transaction or read the log. Returns all such
/// instances, each with how many sessions of it there were.
async fn end_sessions(connection: &mut PgConnection, id: i64) -> Result<Vec<(i64, u64)>> {
    let context = |error| errors::from_statement(error, "end the sessions of hosts that are gone");
    let end = transaction(&format!(
        "with gone as materialized (
             select id, lpad(to_hex(id), 16, '0') as name from oncely.host_instance
             where lease_until < clock_timestamp() and id <> {id}
         ), session as materialized (
             select gone.id, pid from gone join pg_stat_activity as activity
                 on activity.application_name like 'oncely%' || gone.name || '%'
             where pg_has_role(activity.usesysid, 'usage')
                 and (activity.xact_start is not null or activity.backend_type = 'walsender')
         ), ended as materialized (
             select id, pg_terminate_backend(pid) as was_there from session
         )
         select gone.id, count(ended.id) filter (where was_there) as sessions
         from gone left join ended on ended.id = gone.id group by gone.id order by gone.id"
    ));
    let rows = raw_sql(AssertSqlSafe(end))
        .fetch_all(connection)
        .await
        .map_err(context)?;
    let read =
        |row: &sqlx::postgres::PgRow| Ok((row.try_get(0)?, shared::unsigned(row.try_get(1)?)));
    rows.iter()
        .map(read)
        .collect::<sqlx::Result<_>>()
        .map_err(context)
}

/// Releases what an instance has leased, and forgets it. None when another host was faster.
async fn remove_instance(connection: &mut PgConnection, id: i64) -> Result<Option<u64>> {
    let context =
        |error| errors::from_statement(error, "release the leases of a host that is gone");
    let forget = transaction(&format!(
        "with gone as (
             delete from oncely.host_instance where id = {id} returning id
         ), reported as (
             delete from oncely.host_report where instance = {id}
         ), leased as materialized (
             select seq from oncely.outbox
             where published_at is null and via = 'poll' and leased_until > now()
                 and leased_until <= now() + interval '{OUTPUT_LEASE_MAX}' and leased_by in (select id from gone)
                 and due_at <= now() and blocked_by is null and parked_at is null
             order by seq for update skip locked
         ), released as (
             update oncely.outbox set leased_until = now(), leased_by = null
             from leased where outbox.seq = leased.seq returning outbox.seq
         )
         select (select count(*) from gone), (select count(*) from released)"
    ));
    let row = raw_sql(AssertSqlSafe(forget))
        .fetch_one(connection)
        .await
        .map_err(context)?;
    let (was_there, released): (i64, i64) = (
        row.try_get(0).map_err(context)?,
        row.try_get(1).map_err(context)?,
    );
    Ok((was_there > 0).then(|| shared::unsigned(released)))
}
