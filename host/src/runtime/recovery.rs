//! After a restore: what is acknowledged and not known is taken again, and what stands on streams is not published again.
//!
//! Each step can be taken twice. The last one is a new mark; until that is written every host waits, and a recovery that was
//! cut off is begun again.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Host;
use super::agreement::{Hold, LOOK_EVERY, outputs_since};
use crate::bus::{From, MARK_STREAM, Passed, StreamInfo};
use crate::config::manifest::Worker;
use crate::consumer;
use crate::model::alarm::ALARM_STREAM;
use crate::model::hint::WithHint;
use crate::model::invalidation::CACHE_STREAM;
use crate::model::message::header;
use crate::model::output_ids::OUTPUT_ID;
use crate::model::redrive::REDRIVE_STREAM;
use crate::store::{By, LetterFilter, LetterState, RecoveredOutput, Redrive, Seen, all_letters};

/// Until when every other host has noticed, too.
const NOTICED_WITHIN: Duration = LOOK_EVERY.saturating_mul(3);

/// How many messages of a stream are looked at, and outputs among them written down, at a time.
const LOOKED_AT_A_TIME: usize = 5_000;

/// How often the new mark is tried: another host may write one at the same moment.
const MARK_TRIES: u32 = 5;

/// What a recovery does, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// What was found; nothing when there is nothing to recover from.
    pub reasons: Vec<String>,
    /// When database and broker last agreed, as far as the database knows.
    pub agreed_at: Option<Timestamp>,
    pub consumers: Vec<Rewound>,
    pub streams: Vec<LookedThrough>,
    /// Dead letters that were put back and are sent to their workers once more.
    pub letters: u64,
    /// Whether it was done, not only planned.
    pub done: bool,
}

/// The place of a worker on its stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewound {
    pub worker: String,
    pub stream: String,
    /// Everything up to here was acknowledged.
    pub acknowledged: u64,
    /// From here on messages come again; those that took effect are skipped. None where nothing can come again.
    pub from: Option<u64>,
    /// Where the stream ends.
    pub last: u64,
    /// What cannot be had again, for a person.
    pub note: Option<String>,
}

/// A stream that outputs go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookedThrough {
    pub stream: String,
    /// Outputs stored since shortly before database and broker last agreed.
    pub outputs: u64,
    /// Why it was not looked through, for a person.
    pub note: Option<String>,
}

impl Host {
    /// Brings database and broker together again after one of them was restored; with `dry_run`, says what that would do.
    pub async fn recover(&self, dry_run: bool, by: &By) -> Result<Recovery> {
        let _turn = self.recovering.lock().await;
        let look = self.compare().await.context("compare database and broker")?;
        let reasons = match look.hold.clone() {
            None => Vec::new(),
            Some(Hold::Restored(why)) => why,
            Some(Hold::TakenOver(why)) => {
                return Err(anyhow!(why)).hint("to take it back: oncely run --take-over ID, with the other one's id");
            }
        };
        let agreed = look.marks.last.as_ref().map(|mark| (mark.written_at, mark.seen.clone()));
        let (agreed_at, before) = agreed.map_or((None, Seen::default()), |(at, seen)| (Some(at), seen));
        let mut recovery =
            Recovery { reasons, agreed_at, consumers: Vec::new(), streams: Vec::new(), letters: 0, done: false };
        if recovery.reasons.is_empty() {
            return Ok(recovery);
        }
        if !dry_run {
            self.set_hold(look.hold).await;
            tracing::warn!(reasons = recovery.reasons.join("; "), "recovering");
            tokio::time::sleep(NOTICED_WITHIN).await;
        }

        let workers = self.services.deployed_workers().await?;
        for worker in &workers {
            recovery.consumers.extend(self.place_of(worker, &before).await?);
        }
        let under_way = self.letters_under_way().await?;
        recovery.letters = under_way.len() as u64;
        let since = agreed_at.map_or(Timestamp::UNIX_EPOCH, outputs_since);
        let streams = self.services.bus.streams(Duration::ZERO).await?;
        for stream in streams.iter().filter(|stream| may_hold_outputs(stream)) {
            recovery.streams.push(self.look_through(stream, since, !dry_run).await?);
        }
        if dry_run {
            return Ok(recovery);
        }

        self.services.relay_state.look_up_recovered(true);
        for place in &recovery.consumers {
            let worker = workers.iter().find(|worker| worker.name == place.worker);
            if let (Some(worker), Some(from)) = (worker, place.from) {
                self.services.bus.rewind(&consumer::subscription(worker, &place.stream), from).await?;
            }
        }
        self.forget_strays(&workers, &streams).await?;
        if !under_way.is_empty() {
            // Their messages wait in the outbox like all others.
            self.services.store.redrive(&under_way, by).await.context("put dead letters back once more")?;
        }
        self.agree_anew(&workers).await?;
        self.set_hold(None).await;
        recovery.done = true;
        Ok(recovery)
    }

    /// From where on a worker takes its messages again.
    async fn place_of(&self, worker: &Worker, before: &Seen) -> Result<Option<Rewound>> {
        let Some(name) = &worker.stream else { return Ok(None) };
        let probe = self.services.bus.probe(name, &worker.subjects, &worker.durable());
        let mut place = Rewound {
            worker: worker.name.clone(),
            stream: name.clone(),
            acknowledged: probe.acknowledged().await?.map_or(0, |acknowledged| acknowledged.sequence),
            from: None,
            last: 0,
            note: None,
        };
        let Some(stream) = self.services.bus.stream(name).await? else {
            place.note = Some("the stream is gone".to_owned());
            return Ok(Some(place));
        };
        place.last = stream.last_sequence;
        if stream.is_queue {
            // What is still there was never acknowledged. Without its consumer a stream kept by interest would lose it.
            let note = "what is acknowledged leaves this stream at once: what the database does not know of it is gone";
            place.note = Some(note.to_owned());
            return Ok(Some(place));
        }
        let is_as_it_was = match before.streams.get(name) {
            Some(end) if end.created != stream.created || end.last_sequence > stream.last_sequence => false,
            Some(end) => {
                let found = self.services.bus.stored_at(name, end.last_sequence).await?;
                end.stored_at.is_none() || found.is_none() || found == end.stored_at
            }
            None => false,
        };
        let floor = before.consumers.get(&worker.name).filter(|floor| floor.stream == *name && is_as_it_was);
        // What is below was settled in the database before it was noted there.
        let from = floor.map_or(1, |floor| floor.sequence.min(place.acknowledged) + 1);
        place.from = Some(from.max(stream.first_sequence).max(1));
        Ok(Some(place))
    }

    /// Removes consumers of workers that this database does not have deployed: should one be, its messages come again from the
    /// beginning. What the other life of the database acknowledged for it is not known here.
    async fn forget_strays(&self, workers: &[Worker], streams: &[StreamInfo]) -> Result<()> {
        for stream in streams.iter().filter(|stream| !stream.is_queue) {
            let is_deployed = |durable: &String| {
                workers.iter().any(|worker| {
                    worker.durable() == *durable && worker.stream.as_deref() == Some(stream.name.as_str())
                })
            };
            for stray in
                self.services.bus.own_consumers(&stream.name).await?.iter().filter(|durable| !is_deployed(durable))
            {
                tracing::warn!(
                    consumer = stray,
                    stream = stream.name,
                    "removing the consumer of a worker not deployed"
                );
                self.services.bus.remove_consumer(&stream.name, stray).await?;
            }
        }
        Ok(())
    }

    async fn letters_under_way(&self) -> Result<Vec<Redrive>> {
        let filter = LetterFilter { limit: u32::MAX, ..LetterFilter::default() };
        let letters = all_letters(self.services.store.as_ref(), &filter).await?;
        let under_way = letters.into_iter().filter(|letter| letter.state == LetterState::Redriven);
        Ok(under_way.map(|letter| Redrive { id: letter.id, generation: None, again: true }).collect())
    }

    /// Looks for outputs on a stream, among what was stored since; remembers where they are if they are to be kept.
    async fn look_through(&self, stream: &StreamInfo, since: Timestamp, keeps: bool) -> Result<LookedThrough> {
        let name = stream.name.clone();
        if stream.is_queue {
            let note =
                "what is acknowledged leaves this stream at once: outputs on it may be published twice".to_owned();
            return Ok(LookedThrough { stream: name, outputs: 0, note: Some(note) });
        }
        let (mut outputs, mut from) = (0, From::Time(since));
        // Page by page: there may be millions.
        loop {
            let (mut found, mut last) = (Vec::new(), 0);
            let each = |passed: Passed| {
                last = passed.sequence;
                let is_output = header(&passed.headers, OUTPUT_ID).is_some();
                if let Some(id) = header(&passed.headers, "Nats-Msg-Id").filter(|_| is_output) {
                    let (id, stream, stream_sequence) = (id.to_owned(), stream.name.clone(), passed.sequence);
                    found.push(RecoveredOutput { id, stream, stream_sequence });
                }
            };
            let has_more = self.services.bus.passed(&name, from, &[], LOOKED_AT_A_TIME, each).await?;
            outputs += found.len() as u64;
            if keeps {
                self.services.store.keep_recovered(&found).await?;
            }
            if !has_more {
                return Ok(LookedThrough { stream: name, outputs, note: None });
            }
            from = From::Sequence(last + 1);
        }
    }

    /// Writes the mark with which every host goes on.
    async fn agree_anew(&self, workers: &[Worker]) -> Result<()> {
        for _ in 0..MARK_TRIES {
            let after = self.last_mark().await?;
            let seen = self.see(workers, None).await?;
            if self.write_mark(&seen, after.map_or(0, |mark| mark.sequence)).await? {
                return Ok(());
            }
        }
        Err(anyhow!("write a mark: other hosts write marks of their own all the time")).hint("oncely recover")
    }
}

/// Whether outputs may stand on a stream that must not be published twice. Invalidations may; an alarm that is raised again
/// after a restore is another one. What stands on a copy of a stream says nothing of the stream itself.
fn may_hold_outputs(stream: &StreamInfo) -> bool {
    !stream.is_copy && ![ALARM_STREAM, CACHE_STREAM, MARK_STREAM, REDRIVE_STREAM].contains(&stream.name.as_str())
}
