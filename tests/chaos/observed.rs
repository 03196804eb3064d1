//! Facts that can be read from outside after a run: table rows and stream messages.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use oncely::model::message::output_id;
use support::database::Database;
use support::nats::{NatsServer, Stored};

use crate::stranger::is_from_stranger;

/// A row of `effect`.
#[derive(Debug, Clone)]
pub struct Effect {
    pub account: String,
    pub delta: i64,
    pub nonce: String,
}

/// A row of `dead_letter`.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub event_id: String,
    pub payload: String,
    pub reason: String,
    pub attempts: i64,
    /// Whether it was redriven and is not open again.
    pub is_redriven: bool,
}

/// Maximum delay of an alarm notice on its stream.
const PUBLISHED_WITHIN: Duration = Duration::from_secs(10);

/// All facts read after a run.
#[derive(Debug, Default)]
pub struct Observed {
    /// The input stream, raw.
    pub inputs: Vec<Stored>,
    /// The output stream, raw.
    pub outputs: Vec<Stored>,
    /// The dead-letter stream, raw.
    pub notices: Vec<Stored>,
    /// The alarm stream: the count of each id.
    pub alarms_published: BTreeMap<String, usize>,
    /// Alarms before that stream was read: identity, number of times raised, whether raised now.
    pub alarms: Vec<(String, u64, bool)>,
    /// By event id.
    pub effects: BTreeMap<String, Vec<Effect>>,
    /// By account.
    pub balances: BTreeMap<String, i64>,
    /// State and payload (hex) by event id.
    pub inbox: BTreeMap<String, (String, String)>,
    pub dead_letters: Vec<DeadLetter>,
    /// The ids of redriven dead letters.
    pub redriven: Vec<String>,
    /// The codes of counted attempts by event id.
    pub attempts: BTreeMap<String, Vec<String>>,
    /// The number in the keyed state by key.
    pub counters: BTreeMap<String, i64>,
    /// The count of the worker's output rows by id.
    pub outbox: BTreeMap<String, i64>,
    /// Descriptions of the remaining work.
    pub unsettled: Vec<String>,
    /// Acknowledged inputs: body by stream sequence.
    pub acked: BTreeMap<u64, Vec<u8>>,
    /// Number of host deaths, and the host's lanes.
    pub deaths: u64,
    pub lanes: u64,
    /// Outputs seen before their effects, and inconsistent snapshots, during the run.
    pub too_early: Vec<String>,
}

impl Observed {
    /// Reads all facts.
    pub async fn read(database: &Database, nats: &NatsServer) -> Result<Observed> {
        let alarms = read_alarms(database).await.context("read the alarms")?;
        let mut observed = Observed {
            alarms,
            alarms_published: published_alarms(database, nats)
                .await
                .context("read the published alarms")?,
            inputs: nats.read_stream("IN").await.context("read the inputs")?,
            outputs: nats.read_stream("OUT").await.context("read the outputs")?,
            notices: nats
                .read_stream("ONCELY_DLQ")
                .await
                .context("read the dead letters")?,
            ..Observed::default()
        };
        observed
            .outputs
            .retain(|stored| !is_from_stranger(&stored.subject));
        observed
            .notices
            .retain(|stored| !is_from_stranger(&stored.subject));
        observed
            .read_rows(database)
            .await
            .context("read the tables")?;
        observed.unsettled = unsettled(database, nats).await?;
        Ok(observed)
    }

    /// The number of inputs of a nature.
    pub fn published_as(&self, nature: &str) -> u64 {
        let is_one = |stored: &&Stored| {
            stored
                .headers
                .get("nature")
                .is_some_and(|own| own == nature)
        };
        self.inputs.iter().filter(is_one).count() as u64
    }

    /// The number of ids used for more than one body.
    pub fn id_reuses(&self) -> u64 {
        let mut bodies: BTreeMap<&str, BTreeSet<&[u8]>> = BTreeMap::new();
        for stored in &self.inputs {
            if let Some(id) = stored.headers.get("ce-id") {
                bodies.entry(id).or_default().insert(&stored.body);
            }
        }
        bodies.values().filter(|bodies| bodies.len() > 1).count() as u64
    }

    async fn read_rows(&mut self, database: &Database) -> Result<()> {
        // The worker's tables
        for [event_id, account, delta, nonce] in columns(
            database,
            "select event_id, account, delta, attempt_nonce from app.effect",
        )
        .await?
        {
            let effect = Effect {
                account,
                delta: delta.parse()?,
                nonce,
            };
            self.effects.entry(event_id).or_default().push(effect);
        }
        for [account, amount] in
            columns(database, "select account, amount from app.balance").await?
        {
            self.balances.insert(account, amount.parse()?);
        }

        // The inbox and dead letters
        let (hex, text) = match database {
            Database::Sqlite(_) => ("lower(hex(payload_sha256))", "cast(value as text)"),
            Database::Postgres { .. } => (
                "encode(payload_sha256, 'hex')",
                "convert_from(value, 'UTF8')",
            ),
        };
        for [event_id, state, payload] in columns(
            database,
            &format!("select event_id, state, {hex} from oncely.inbox"),
        )
        .await?
        {
            self.inbox.insert(event_id, (state, payload));
        }
        let dead_letters =
            format!("select event_id, {hex}, reason, attempts, state from oncely.dead_letter");
        for [event_id, payload, reason, attempts, state] in columns(database, &dead_letters).await?
        {
            let is_redriven = state == "redriven" || state == "done";
            self.dead_letters.push(DeadLetter {
                event_id,
                payload,
                reason,
                attempts: attempts.parse()?,
                is_redriven,
            });
        }
        for [id] in columns(
            database,
            "select id from oncely.dead_letter where generation > 0",
        )
        .await?
        {
            self.redriven.push(id);
        }

        // Attempts, keyed state and outputs
        for [event_id, code] in columns(
            database,
            "select event_id, coalesce(code, error) from oncely.attempt",
        )
        .await?
        {
            self.attempts.entry(event_id).or_default().push(code);
        }
        for [key, count] in
            columns(database, &format!("select key, {text} from oncely.state")).await?
        {
            self.counters.insert(key, count.parse()?);
        }
        let outbox =
            "select worker, event_id, ordinal from oncely.outbox where subject not like 'oncely%'";
        for [worker, event_id, ordinal] in columns(database, outbox).await? {
            *self
                .outbox
                .entry(output_id(&worker, &event_id, ordinal.parse()?))
                .or_default() += 1;
        }
        Ok(())
    }
}

async fn read_alarms(database: &Database) -> Result<Vec<(String, u64, bool)>> {
    let sql = "select worker || ':' || kind || case when group_id = '' then '' else ':' || group_id end, times,
        case when cleared_at is null then 'raised' else 'cleared' end from oncely.alarm";
    let rows = columns(database, sql).await?;
    rows.into_iter()
        .map(|[id, times, state]| Ok((id, times.parse()?, state == "raised")))
        .collect()
}

/// The ids on the alarm stream, once all due notices are published.
async fn published_alarms(
    database: &Database,
    nats: &NatsServer,
) -> Result<BTreeMap<String, usize>> {
    let is_alarm = "subject like 'oncely.alarm.%'";
    let alarms = format!("select count(*) from oncely.outbox where {is_alarm}");
    let published = database.published(is_alarm);
    let end = Instant::now() + PUBLISHED_WITHIN;
    while database.number(&published).await? < database.number(&alarms).await?
        && Instant::now() < end
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut published = BTreeMap::new();
    let all = nats.read_stream("ONCELY_ALARM").await?;
    for stored in all
        .into_iter()
        .filter(|stored| !is_from_stranger(&stored.subject))
    {
        *published
            .entry(
                stored
                    .headers
                    .get("Oncely-Output-Id")
                    .cloned()
                    .unwrap_or_default(),
            )
            .or_default() += 1;
    }
    Ok(published)
}

async fn columns<const N: usize>(database: &Database, sql: &str) -> Result<Vec<[String; N]>> {
    let rows = database.rows(sql).await.with_context(|| sql.to_owned())?;
    rows.into_iter()
        .map(|row| {
            row.try_into()
                .map_err(|row| anyhow::anyhow!("unexpected row {row:?}"))
        })
        .collect()
}

/// Describes the remaining work: pending, held or open.
pub async fn unsettled(database: &Database, nats: &NatsServer) -> Result<Vec<String>> {
    let mut unsettled = Vec::new();

    // Messages of the worker
    let context = async_nats::jetstream::new(nats.client().await?);
    let stream = context
        .get_stream_no_info("IN")
        .await
        .context("open the stream of inputs")?;
    let consumer = stream
        .consumer_info("oncely-test")
        .await
        .context("read the consumer")?;
    for (what, count) in [
        ("to come", consumer.num_pending),
        ("unacknowledged", consumer.num_ack_pending as u64),
    ] {
        if count > 0 {
            unsettled.push(format!("{count} messages are {what}"));
        }
    }

    // Redriven dead letters
    let queue = context
        .get_stream_no_info("ONCELY_REDRIVE")
        .await
        .context("open the redrive stream")?;
    let consumer = queue
        .consumer_info("oncely-test")
        .await
        .context("read the redrive consumer")?;
    let under_way = consumer.num_pending + consumer.num_ack_pending as u64;
    if under_way > 0 {
        unsettled.push(format!("{under_way} dead letters are under way"));
    }

    // Outputs, without alarms, which are still raised and cleared after all other work
    let unpublished = database
        .number(database.unpublished_except_alarms())
        .await?;
    if unpublished > 0 {
        unsettled.push(format!("{unpublished} outputs are not published"));
    }

    // Transactions and locks
    if let Database::Postgres { .. } = database {
        let open = "select count(*) from pg_stat_activity where state like 'idle in transaction%' \
                    and datname = current_database() and state_change < now() - interval '2 seconds'";
        let locks = "select count(*) from pg_locks where locktype = 'advisory'";
        for (what, sql) in [
            ("transactions are open", open),
            ("advisory locks are held", locks),
        ] {
            let count = database.number(sql).await?;
            if count > 0 {
                unsettled.push(format!("{count} {what}"));
            }
        }
    }
    Ok(unsettled)
}
