//! Skipped messages: settled by an operator, without an effect and without a dead letter.

use std::collections::{BTreeMap, HashSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::db::{Db, Param, Sql, read_rows};
use super::rows::Columns as _;
use super::{ActivityOutcome, Claim, Result, Store, activity};

/// The result of skipping some messages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Skipped {
    /// The sequences of the skipped messages, as ranges of the first and the last one.
    pub sequences: Vec<(u64, u64)>,
    /// Their number.
    pub skipped: u64,
    /// The number of messages that were handled, dead-lettered or skipped before.
    pub settled: u64,
}

impl Store {
    /// Settles messages of `stream` as skipped for `worker`, except those with a row in the inbox,
    /// and records their sequences as the outcome of an activity, in one transaction. Waits for
    /// deliveries that have claimed one of them.
    pub async fn skip(
        &self,
        activity: i64,
        worker: &str,
        stream: &str,
        messages: &[Claim],
    ) -> Result<Skipped> {
        let mut db = self.write().await?;
        let skipped = skip(&mut db, worker, stream, messages).await?;
        let outcome = ActivityOutcome::Done(json!(skipped));
        activity::end(&mut db, activity, &outcome).await?;
        db.commit().await?;
        Ok(skipped)
    }
}

async fn skip(db: &mut Db, worker: &str, stream: &str, messages: &[Claim]) -> Result<Skipped> {
    // Of several messages with one event id, the first is skipped. The others are its duplicates.
    let mut by_event: BTreeMap<&str, (&Claim, u64)> = BTreeMap::new();
    for message in messages {
        let sequence = message.origin.as_ref().map_or(0, |(_, sequence)| *sequence);
        by_event
            .entry(message.event_id.as_str())
            .or_insert((message, sequence));
    }
    let given = by_event.values().map(|(message, sequence)| {
        let payload = hex::encode(message.payload_sha256);
        json!({ "event_id": message.event_id, "payload": payload, "sequence": sequence })
    });
    let given = serde_json::Value::Array(given.collect()).to_string();

    let sql = Sql {
        postgres: "select event_id from oncely.settle_skipped($1, $2, $3)",
        sqlite: "insert into oncely_inbox (worker, event_id, state, payload_sha256, stream, stream_sequence)
         select $1, value ->> 'event_id', 'skipped', unhex(value ->> 'payload'), $2, value ->> 'sequence'
         from json_each($3) where true
         on conflict do nothing
         returning event_id",
        doing: "skip messages",
    };
    let params = [
        Param::Text(worker),
        Param::Text(stream),
        Param::Text(&given),
    ];
    let rows = db.fetch_all(sql, &params).await?;
    let new: HashSet<String> = read_rows(&rows, sql.doing, |row| row.text("event_id"))?
        .into_iter()
        .collect();
    let mut sequences: Vec<u64> = by_event
        .values()
        .filter(|(message, _)| new.contains(&message.event_id))
        .map(|(_, sequence)| *sequence)
        .collect();
    sequences.sort_unstable();
    Ok(Skipped {
        skipped: sequences.len() as u64,
        settled: (messages.len() - sequences.len()) as u64,
        sequences: ranges(&sequences),
    })
}

/// Sorted numbers as ranges of the first and the last one.
fn ranges(sorted: &[u64]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in sorted {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_recorded_as_ranges() {
        assert_eq!(ranges(&[]), []);
        assert_eq!(ranges(&[1, 2, 3, 7, 9, 10]), [(1, 3), (7, 7), (9, 10)]);
    }
}
