//! Checks that effects happen once: each event has one effect, and each effect its outputs once.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};

use crate::world::World;

/// Counts of a consistent world.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Events with effects.
    pub effects: BTreeSet<String>,
    /// Events with a dead letter.
    pub dead: BTreeSet<String>,
    /// Messages on the stream OUT.
    pub outputs: usize,
}

/// Reads the effects, dead letters and outputs, and checks the invariants. Each event has two rows
/// with one nonce, and all rows sum to zero. No event has both an effect and a dead letter. Every
/// output is on the stream once by id, and every committed effect has its output.
pub async fn check(world: &World) -> Result<Books> {
    let mut books = Books::default();
    ensure!(
        world
            .database
            .number("select coalesce(sum(delta), 0) from app.effect")
            .await?
            == 0,
        "the effects do not sum to zero"
    );
    let effects = world
        .database
        .rows("select event_id, count(*), count(distinct attempt_nonce), min(attempt_nonce) from app.effect group by event_id")
        .await?;
    let mut nonces = BTreeMap::new();
    for row in effects {
        let [event, rows, distinct, nonce] = row.as_slice() else {
            anyhow::bail!("unexpected row {row:?}")
        };
        ensure!(
            rows == "2" && distinct == "1",
            "event {event} has {rows} rows of {distinct} attempts"
        );
        nonces.insert(event.clone(), nonce.clone());
        books.effects.insert(event.clone());
    }

    // The event of a dead letter that is `redriven` or `done` may have an effect.
    let dead = "select event_id from oncely.dead_letter where reason <> 'id-reuse' and state not in ('redriven', 'done')";
    for row in world.database.rows(dead).await? {
        books.dead.extend(row);
    }
    if let Some(both) = books.effects.intersection(&books.dead).next() {
        anyhow::bail!("event {both} took effect and is a dead letter");
    }
    check_outputs(world, &nonces, &mut books).await?;
    Ok(books)
}

async fn check_outputs(
    world: &World,
    nonces: &BTreeMap<String, String>,
    books: &mut Books,
) -> Result<()> {
    let stored = world.nats.read_stream("OUT").await?;
    let mut ids = BTreeSet::new();
    for message in &stored {
        let id = message
            .headers
            .get("Nats-Msg-Id")
            .cloned()
            .unwrap_or_default();
        ensure!(
            !id.is_empty(),
            "output at sequence {} has no id",
            message.sequence
        );
        ensure!(ids.insert(id.clone()), "output {id} is on the stream twice");
        let Ok(body) = serde_json::from_slice::<serde_json::Value>(&message.body) else {
            continue;
        };
        if let (Some(event), Some(nonce)) = (body.get("event_id"), body.get("attempt_nonce")) {
            let committed = nonces.get(event.as_str().unwrap_or_default());
            ensure!(
                committed.map(String::as_str) == nonce.as_str(),
                "output {id} comes from an attempt that did not commit"
            );
        }
    }
    books.outputs = stored.len();
    let committed = world
        .database
        .number("select count(*) from oncely.outbox where worker = 'test' and subject not like 'oncely%'")
        .await?;
    ensure!(
        committed == stored.len() as i64,
        "{committed} outputs were committed, but {} are on the stream",
        stored.len()
    );
    Ok(())
}
