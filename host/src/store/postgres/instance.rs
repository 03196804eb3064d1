//! This host's instance: renews its lease, and takes over from instances with an expired lease.
//!
//! A frozen or disconnected host keeps its transactions open. To the server it is an idle client.
//! The manifest decides how long guests may compute, so no server timeout can detect such a host.
//! Therefore instances renew a lease. The sessions of an instance with an expired lease are
//! terminated.

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row, raw_sql};
use tokio::sync::Mutex;

use crate::store::error::Doing as _;
use crate::store::instance::{HOST_LEASE, Instance, RENEW_TIMEOUT, TakenOver};
use crate::store::{Result, shared};

/// The maximum duration of an output's lease.
const OUTPUT_LEASE_MAX: &str = "1 minute";

/// The lease of this host's instance. It has a connection of its own, so that no other work delays
/// it.
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

    /// Renews the lease, and takes over from instances with an expired lease. If this future is
    /// dropped, its connection is closed.
    pub(super) async fn renew(&self) -> Result<Vec<TakenOver>> {
        let mut cached = self.connection.lock().await;
        let mut connection = match cached.take() {
            Some(connection) => connection,
            None => self
                .options
                .connect()
                .await
                .doing("connect to PostgreSQL")?,
        };
        let taken_over = renew_and_take_over(&mut connection, self.instance.id()).await?;
        *cached = Some(connection);
        Ok(taken_over)
    }

    /// Releases the lease and all leased outputs of the instance.
    pub(super) async fn release(&self) {
        let Some(mut connection) = self.connection.lock().await.take() else {
            return;
        };
        let ended = async {
            remove_instance(&mut connection, self.instance.id()).await?;
            connection.close().await.doing("close a connection")
        };
        match tokio::time::timeout(RENEW_TIMEOUT, ended).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "releasing the host's lease failed, left to expire"
            ),
            Err(_) => tracing::debug!(
                timeout = ?RENEW_TIMEOUT,
                "releasing the host's lease timed out, left to expire"
            ),
        }
    }
}

async fn renew_and_take_over(connection: &mut PgConnection, id: i64) -> Result<Vec<TakenOver>> {
    renew(connection, id).await?;
    let gone = end_sessions(connection, id).await?;
    let mut taken_over = Vec::with_capacity(gone.len());
    for (gone, sessions) in gone {
        // A session may lease more outputs until it has ended, so they are released after that.
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

/// One explicit transaction in one message, without settings beyond its end.
fn transaction(statements: &str) -> String {
    let within = RENEW_TIMEOUT.as_millis();
    format!(
        "begin isolation level read committed read write; \
         set local search_path = pg_catalog, pg_temp; \
         set local statement_timeout = {within}; set local lock_timeout = {}; \
         set local idle_in_transaction_session_timeout = {within}; \
         set local synchronous_commit = off; {statements}; commit",
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
    renewed.map(|_| ()).doing("renew the host's lease")
}

/// Terminates sessions of instances with an expired lease, if they are in a transaction or read the
/// WAL. Returns all such instances, each with its number of terminated sessions.
async fn end_sessions(connection: &mut PgConnection, id: i64) -> Result<Vec<(i64, u64)>> {
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
        .doing("terminate the sessions of expired hosts")?;
    let read =
        |row: &sqlx::postgres::PgRow| Ok((row.try_get(0)?, shared::unsigned(row.try_get(1)?)));
    rows.iter()
        .map(read)
        .collect::<sqlx::Result<_>>()
        .doing("terminate the sessions of expired hosts")
}

/// Releases the leased outputs of an instance and deletes it. `None` if another host did so first.
async fn remove_instance(connection: &mut PgConnection, id: i64) -> Result<Option<u64>> {
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
         ), groups as (
             update oncely.outbox_group set leased_until = now()
             where leased_until > now() and leased_by in (select id from gone) returning seqs
         )
         select (select count(*) from gone),
             (select count(*) from released) + (select count(*) from groups cross join unnest(seqs))"
    ));
    let row = raw_sql(AssertSqlSafe(forget))
        .fetch_one(connection)
        .await
        .doing("release the leases of an expired host")?;
    let (was_there, released): (i64, i64) = (
        row.try_get(0)
            .doing("release the leases of an expired host")?,
        row.try_get(1)
            .doing("release the leases of an expired host")?,
    );
    Ok((was_there > 0).then(|| shared::unsigned(released)))
}
