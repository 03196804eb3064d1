//! Outputs: each published output is on its stream once, at its recorded position.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::difference::Kind;
use super::{Findings, PAGE};
use crate::bus::{StartPosition, StreamInfo};
use crate::model::hint::shell_word;
use crate::model::message::header;
use crate::model::output_ids::OUTPUT_ID_HEADER;
use crate::relay::is_lost;
use crate::services::Services;
use crate::store::{Cursor, PublishedOutput};

/// The most outputs of one audit; each takes about 100 bytes.
const OUTPUTS_MAX: usize = 5_000_000;

/// Maximum clock difference between the database and NATS.
const CLOCK_SKEW_MAX: SignedDuration = SignedDuration::from_mins(2);

/// The outputs of an audit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OutputCounts {
    /// Outputs that were recorded as published in the window.
    pub published: u64,
    /// Those that are on their stream, at the recorded position.
    pub found: u64,
    /// Those whose message has left the stream: by age, by a limit, by an operator, or by the
    /// acknowledgement of a queue.
    pub removed: u64,
}

/// An output as it is recorded. Its id is kept as a hash.
struct Recorded {
    sequence: u64,
    number: i64,
    id: u64,
    published_at: Timestamp,
}

/// Checks the outputs that were published since a time.
pub(super) async fn check(
    services: &Services,
    since: Timestamp,
    findings: &mut Findings,
) -> Result<(OutputCounts, Vec<PublishedOutput>)> {
    let hasher = RandomState::new();
    let (recorded, is_cut) = recorded(services, since, &hasher).await?;
    if is_cut {
        findings.note(format!(
            "only the first {OUTPUTS_MAX} outputs of the window are checked; use a shorter --since"
        ));
    }
    let (mut counts, mut lost) = (OutputCounts::default(), Vec::new());
    for (stream, mut outputs) in recorded {
        counts.published += outputs.len() as u64;
        let Some(info) = services.bus.stream(&stream).await? else {
            findings.add(Kind::OutputStreamMissing.found(format!(
                "{} outputs are recorded on the stream {stream}, which does not exist",
                outputs.len()
            )));
            continue;
        };
        outputs.sort_unstable_by_key(|output| output.sequence);
        if info.is_queue {
            // A scan would take its messages away.
            counts.removed += outputs.len() as u64;
            continue;
        }
        let absent = scan(services, &info, &outputs, &hasher, findings).await?;
        counts.found += (outputs.len() - absent.len()) as u64;
        let judged = judge(services, &stream, absent, findings).await?;
        counts.removed += judged.removed;
        lost.extend(judged.lost);
    }
    Ok((counts, lost))
}

/// The recorded outputs by stream. True if there are more.
async fn recorded(
    services: &Services,
    since: Timestamp,
    hasher: &RandomState,
) -> Result<(BTreeMap<String, Vec<Recorded>>, bool)> {
    let mut by_stream: BTreeMap<String, Vec<Recorded>> = BTreeMap::new();
    let mut count = 0;
    for from_wal in [false, true] {
        let mut cursor = Some(Cursor::at(since));
        while let Some(after) = cursor {
            let (page, next) = services
                .store
                .published_by_age(after, PAGE as u32, from_wal)
                .await?;
            count += page.len();
            for output in page {
                let recorded = Recorded {
                    sequence: output.stream_sequence,
                    number: output.seq,
                    id: hasher.hash_one(&output.id),
                    published_at: output.published_at,
                };
                by_stream.entry(output.stream).or_default().push(recorded);
            }
            cursor = next;
            if count >= OUTPUTS_MAX {
                return Ok((by_stream, true));
            }
        }
    }
    Ok((by_stream, false))
}

/// Reads a stream from the first of these outputs on, in one pass. Both are sorted by sequence.
/// Reports outputs that are there twice, and returns those that are not at their position.
async fn scan<'o>(
    services: &Services,
    stream: &StreamInfo,
    outputs: &'o [Recorded],
    hasher: &RandomState,
    findings: &mut Findings,
) -> Result<Vec<&'o Recorded>> {
    let ids: HashMap<u64, &Recorded> = outputs.iter().map(|output| (output.id, output)).collect();
    let mut found: BTreeSet<i64> = BTreeSet::new();
    let mut copies: Vec<(u64, String, i64)> = Vec::new();

    // An earlier copy may precede the recorded position.
    let first = outputs.first().map_or(0, |output| output.sequence);
    let since = outputs.iter().map(|output| output.published_at).min();
    let mut from = match since {
        Some(since) => StartPosition::Time(since - CLOCK_SKEW_MAX),
        None => StartPosition::Sequence(first),
    };
    loop {
        let mut last = None;
        let mut visit = |message: crate::bus::ScannedMessage| {
            last = Some(message.sequence);
            let Some(id) = header(&message.headers, "Nats-Msg-Id") else {
                return;
            };
            let Some(output) = ids.get(&hasher.hash_one(id)) else {
                return;
            };
            if output.sequence == message.sequence {
                found.insert(output.number);
            } else {
                let readable = header(&message.headers, OUTPUT_ID_HEADER).unwrap_or(id);
                copies.push((message.sequence, readable.to_owned(), output.number));
            }
        };
        let has_more = services
            .bus
            .scan_messages(&stream.name, from, &[], PAGE, &mut visit)
            .await?;
        match last {
            Some(last) if has_more => from = StartPosition::Sequence(last + 1),
            _ => break,
        }
    }

    // A copy alone is the output at another place; with the recorded one, it is there twice.
    for (sequence, id, number) in copies {
        if found.contains(&number) {
            let mut difference = Kind::OutputTwice
                .found(format!(
                    "output {number} ({id}) is on the stream {} again at {sequence}",
                    stream.name
                ))
                .at(&stream.name, sequence);
            difference.output = Some(number);
            difference.action = format!(
                "consumers that deduplicate by id are not affected; to delete the copy: \
                 nats stream rmm {} {sequence}",
                shell_word(&stream.name)
            );
            findings.add(difference);
        }
    }
    Ok(outputs
        .iter()
        .filter(|output| !found.contains(&output.number))
        .collect())
}

#[derive(Default)]
struct Judged {
    removed: u64,
    lost: Vec<PublishedOutput>,
}

/// Judges outputs that a scan did not find at their position. A host may have published one again
/// meanwhile, at another position.
async fn judge(
    services: &Services,
    stream: &str,
    absent: Vec<&Recorded>,
    findings: &mut Findings,
) -> Result<Judged> {
    let mut judged = Judged::default();
    if absent.is_empty() {
        return Ok(judged);
    }
    let Some(info) = services.bus.stream(stream).await? else {
        return Ok(judged);
    };
    for chunk in absent.chunks(PAGE) {
        let numbers: Vec<i64> = chunk.iter().map(|output| output.number).collect();
        let current = services.store.recorded_outputs(stream, &numbers).await?;
        let unchanged = chunk.iter().filter_map(|output| {
            let now = current.get(&output.number)?;
            (now.stream_sequence == output.sequence).then_some(now)
        });
        for output in unchanged {
            if !is_lost(&services.bus, &info, output).await? {
                judged.removed += 1;
                continue;
            }
            let (number, sequence) = (output.seq, output.stream_sequence);
            let mut difference = Kind::OutputLost
                .found(format!(
                    "output {number} is recorded at {sequence} of {stream}, and is not there"
                ))
                .at(stream, sequence);
            difference.output = Some(number);
            findings.add(difference);
            judged.lost.push(output.clone());
        }
    }
    Ok(judged)
}
