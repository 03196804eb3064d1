//! The judgement of NATS: the server, the streams of the workers, and their consumers.

use std::time::Duration;

use super::checks::{
    CONSUMER_SETTINGS, NATS_STORAGE, NATS_VERSION, STREAM_DEDUPE_WINDOW, STREAM_EXISTS,
    STREAM_LIMITS, STREAM_REPLICAS, STREAM_RETENTION, STREAM_STORAGE, STREAM_SYNC,
};
use super::{Finding, failed};
use crate::bus::{ConsumerFacts, ServerFacts, StreamFacts};
use crate::config::manifest::Worker;
use crate::model::hint::shell_word;
use crate::model::subject;
use crate::model::units::{format_duration, format_size};
use crate::relay::DUPLICATE_WINDOW_MIN;
use crate::runtime::Retention;

/// The oldest supported version.
const VERSION_MIN: (u32, u32) = (2, 11);

/// The percentage of a limit from which on it is reported as advice, and as a problem.
const FILL_ADVICE: u64 = 80;
const FILL_PROBLEM: u64 = 95;

/// The dedupe window that an output stream without a search needs: it should outlast an outage.
const QUEUE_WINDOW_MIN: Duration = Duration::from_secs(120);

/// The streams and the workers of an installation.
#[derive(Debug, Clone, Default)]
pub struct Deployed<'f> {
    /// All streams of the account.
    pub streams: &'f [StreamFacts],
    /// The deployed workers.
    pub workers: &'f [Worker],
    /// The names of the platform's own streams.
    pub own: &'f [String],
}

/// A consumer with the worker and the stream that it belongs to.
#[derive(Debug, Clone, Default)]
pub struct WorkerConsumer {
    /// The name of the durable consumer.
    pub durable: String,
    /// The stream that it reads.
    pub stream: String,
    /// Its state.
    pub facts: ConsumerFacts,
}

/// Judges the server and its account.
pub fn judge_server(facts: &ServerFacts) -> Vec<Finding> {
    vec![version(facts), storage(facts)]
}

fn version(facts: &ServerFacts) -> Finding {
    let mut numbers = facts
        .version
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("nats-server {}", facts.version);
    if version < VERSION_MIN {
        return NATS_VERSION.problem(found, "install nats-server 2.11 or newer");
    }
    NATS_VERSION.ok(found)
}

fn storage(facts: &ServerFacts) -> Finding {
    let share = |used: u64, most: Option<u64>| most.map(|most| percent(used, most));
    let shares = [
        ("file storage", share(facts.storage, facts.storage_max)),
        ("consumers", share(facts.consumers, facts.consumers_max)),
    ];
    for (what, used) in shares {
        let Some(used) = used.filter(|used| *used >= FILL_ADVICE) else {
            continue;
        };
        let found = format!("the account uses {used} % of its limit on {what}");
        let fix = "raise the limit of the account, or delete unused streams: nats stream ls";
        return if used >= FILL_PROBLEM {
            NATS_STORAGE.problem(found, fix)
        } else {
            NATS_STORAGE.advice(found, fix)
        };
    }
    NATS_STORAGE.ok("the JetStream account is below its limits")
}

fn percent(used: u64, most: u64) -> u64 {
    used.saturating_mul(100).checked_div(most).unwrap_or(100)
}

/// Judges the streams that the workers consume, those that they publish to, and the platform's own.
pub fn judge_streams(deployed: &Deployed<'_>, retention: &Retention) -> Vec<Finding> {
    let mut findings = existing(deployed);
    let used = deployed.used();
    for (check, judge) in [
        (
            STREAM_REPLICAS,
            replicas as fn(&StreamFacts) -> Option<Finding>,
        ),
        (STREAM_STORAGE, stored),
    ] {
        let found: Vec<Finding> = used.iter().filter_map(|stream| judge(stream)).collect();
        let is_fine = found.is_empty();
        findings.extend(found);
        if is_fine {
            findings.push(check.ok(format!("{} streams checked", used.len())));
        }
    }
    findings.push(sync(&used));
    findings.extend(windows(deployed));
    findings.extend(ages(deployed, retention));
    findings.extend(limits(deployed));
    findings
}

impl<'f> Deployed<'f> {
    fn find(&self, name: &str) -> Option<&'f StreamFacts> {
        self.streams.iter().find(|facts| facts.stream.name == name)
    }

    fn is_consumed(&self, stream: &StreamFacts) -> bool {
        let name = Some(&stream.stream.name);
        self.workers
            .iter()
            .any(|worker| worker.stream.as_ref() == name)
    }

    fn is_produced(&self, stream: &StreamFacts) -> bool {
        let mut outputs = self.workers.iter().flat_map(|worker| &worker.outputs);
        outputs.any(|output| accepts(stream, output))
    }

    /// The streams that the installation uses.
    fn used(&self) -> Vec<&'f StreamFacts> {
        let is_own = |stream: &StreamFacts| self.own.contains(&stream.stream.name);
        let is_used = |stream: &&StreamFacts| {
            is_own(stream) || self.is_consumed(stream) || self.is_produced(stream)
        };
        self.streams.iter().filter(is_used).collect()
    }
}

/// Whether a stream accepts some subjects of a pattern.
fn accepts(stream: &StreamFacts, pattern: &str) -> bool {
    let mut subjects = stream.stream.subjects.iter();
    subjects.any(|subject| subject::overlaps(subject, pattern))
}

fn existing(deployed: &Deployed<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for worker in deployed.workers {
        let name = &worker.name;
        if let Some(stream) = worker
            .stream
            .as_ref()
            .filter(|stream| deployed.find(stream).is_none())
        {
            findings.push(STREAM_EXISTS.problem(
                format!("the stream {stream} of the worker {name} does not exist"),
                format!(
                    "nats stream add {}, or deploy with a [[stream]] of that name",
                    shell_word(stream)
                ),
            ));
        }
        for output in &worker.outputs {
            if deployed
                .streams
                .iter()
                .any(|stream| accepts(stream, output))
            {
                continue;
            }
            findings.push(STREAM_EXISTS.problem(
                format!("no stream accepts `{output}`, to which the worker {name} may publish"),
                format!("nats stream add NAME --subjects {}", shell_word(output)),
            ));
        }
    }
    if findings.is_empty() {
        let count = deployed.workers.len();
        findings.push(STREAM_EXISTS.ok(format!("the streams of {count} workers exist")));
    }
    findings
}

fn replicas(facts: &StreamFacts) -> Option<Finding> {
    let (name, word) = (&facts.stream.name, shell_word(&facts.stream.name));
    if !facts.has_leader {
        return Some(STREAM_REPLICAS.problem(
            format!("the stream {name} has no leader"),
            format!(
                "start the missing servers: nats server report jetstream; nats stream info {word}"
            ),
        ));
    }
    if facts.is_clustered && facts.replicas < 2 {
        return Some(STREAM_REPLICAS.problem(
            format!("the stream {name} has one replica, although the server belongs to a cluster"),
            format!("nats stream edit {word} --replicas 3"),
        ));
    }
    let outdated = &facts.outdated_replicas;
    (!outdated.is_empty()).then(|| {
        STREAM_REPLICAS.advice(
            format!(
                "replicas of the stream {name} are offline or behind: {}",
                outdated.join(", ")
            ),
            format!("check these servers: nats stream info {word}"),
        )
    })
}

fn stored(facts: &StreamFacts) -> Option<Finding> {
    let (name, word) = (&facts.stream.name, shell_word(&facts.stream.name));
    let again = format!(
        "it cannot be changed: nats stream backup {word} FOLDER, delete it, and add it with --storage file"
    );
    if facts.is_in_memory {
        return Some(
            STREAM_STORAGE.problem(format!("the stream {name} is stored in memory"), again),
        );
    }
    facts.is_async.then(|| {
        STREAM_STORAGE.problem(
            format!(
                "the stream {name} acknowledges messages before it writes them (persist_mode async)"
            ),
            again,
        )
    })
}

fn sync(used: &[&StreamFacts]) -> Finding {
    let single = used.iter().filter(|facts| facts.replicas < 2).count();
    if single == 0 {
        return STREAM_SYNC.ok("all streams have several replicas");
    }
    STREAM_SYNC.advice(
        format!("{single} streams are on a single server, whose sync_interval is not visible here"),
        "set `sync_interval: always` in the `jetstream` block of nats-server.conf, \
         or use three servers",
    )
}

fn windows(deployed: &Deployed<'_>) -> Vec<Finding> {
    let produced = deployed.used();
    let produced = produced
        .iter()
        .filter(|facts| deployed.is_produced(facts) || deployed.own.contains(&facts.stream.name));
    let mut findings = Vec::new();
    for facts in produced {
        let (name, window) = (&facts.stream.name, facts.stream.duplicate_window);
        let found = format!(
            "the stream {name} has a dedupe window of {}",
            format_duration(window)
        );
        let needed = if facts.stream.is_queue {
            QUEUE_WINDOW_MIN
        } else {
            DUPLICATE_WINDOW_MIN
        };
        let fix = format!(
            "nats stream edit {} --dupe-window {}s",
            shell_word(name),
            QUEUE_WINDOW_MIN.as_secs()
        );
        if window < DUPLICATE_WINDOW_MIN {
            findings.push(STREAM_DEDUPE_WINDOW.problem(
                format!("{found}, and the relay needs {}", format_duration(needed)),
                fix,
            ));
        } else if window < needed {
            findings.push(STREAM_DEDUPE_WINDOW.advice(
                format!("{found}, and its retention allows no search for published outputs"),
                fix,
            ));
        }
    }
    if findings.is_empty() {
        findings.push(STREAM_DEDUPE_WINDOW.ok("the windows are long enough for the relay"));
    }
    findings
}

/// The check that a host makes when it starts a worker, for all workers.
fn ages(deployed: &Deployed<'_>, retention: &Retention) -> Vec<Finding> {
    let refused = deployed.workers.iter().filter_map(|worker| {
        let facts = deployed.find(worker.stream.as_ref()?)?;
        retention.check(worker, facts.stream.max_age).err()
    });
    let fix = "set keep_inbox = \"auto\"";
    let mut findings: Vec<Finding> = refused
        .map(|error| failed(STREAM_RETENTION, &error, fix))
        .collect();
    if findings.is_empty() {
        findings.push(STREAM_RETENTION.ok("inbox records outlast the messages of all streams"));
    }
    findings
}

fn limits(deployed: &Deployed<'_>) -> Vec<Finding> {
    let used = deployed.used();
    let mut findings: Vec<Finding> = used
        .iter()
        .filter_map(|facts| limit_of(facts, deployed.is_consumed(facts)))
        .collect();
    if findings.is_empty() {
        findings.push(STREAM_LIMITS.ok(format!("{} streams are below their limits", used.len())));
    }
    findings
}

fn limit_of(facts: &StreamFacts, is_consumed: bool) -> Option<Finding> {
    let (name, word) = (&facts.stream.name, shell_word(&facts.stream.name));
    let shares = [
        facts
            .bytes_max
            .map(|most| (percent(facts.bytes, most), format_size(most))),
        facts.messages_max.map(|most| {
            (
                percent(facts.stream.messages, most),
                format!("{most} messages"),
            )
        }),
    ];
    let (used, limit) = shares.into_iter().flatten().max()?;
    let raise = format!("nats stream edit {word} --max-bytes -1 --max-msgs -1, or a higher limit");
    let found = format!("the stream {name} is {used} % full, of {limit}");
    if facts.discards_old {
        if !is_consumed {
            return None;
        }
        let found = format!("{found}, and then drops its oldest messages, handled or not");
        let fix = format!("nats stream edit {word} --discard new, or: {raise}");
        return Some(if used >= FILL_ADVICE {
            STREAM_LIMITS.problem(found, fix)
        } else {
            STREAM_LIMITS.advice(found, fix)
        });
    }
    if used >= FILL_PROBLEM {
        return Some(STREAM_LIMITS.problem(format!("{found}, and then refuses messages"), raise));
    }
    (used >= FILL_ADVICE)
        .then(|| STREAM_LIMITS.advice(format!("{found}, and then refuses messages"), raise))
}

/// Judges the consumers of the workers.
pub fn judge_consumers(consumers: &[WorkerConsumer]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = consumers.iter().filter_map(consumer).collect();
    if findings.is_empty() {
        findings.push(CONSUMER_SETTINGS.ok(format!("{} consumers are unchanged", consumers.len())));
    }
    findings
}

fn consumer(one: &WorkerConsumer) -> Option<Finding> {
    let WorkerConsumer {
        durable,
        stream,
        facts,
    } = one;
    if !facts.exists {
        return Some(CONSUMER_SETTINGS.advice(
            format!("the stream {stream} has no consumer {durable}"),
            "start a host, which creates it",
        ));
    }
    if !facts.changed.is_empty() {
        let changes = facts.changed.iter().map(|change| {
            let (name, expected, found) = (change.name, &change.expected, &change.found);
            format!("{name} is {found} instead of {expected}")
        });
        let changes: Vec<String> = changes.collect();
        return Some(CONSUMER_SETTINGS.problem(
            format!(
                "the consumer {durable} of {stream} was changed: {}",
                changes.join(", ")
            ),
            "restart a host, which sets them again",
        ));
    }
    facts.is_paused.then(|| {
        CONSUMER_SETTINGS.advice(
            format!("the consumer {durable} of {stream} is paused"),
            format!("nats consumer resume {} {durable}", shell_word(stream)),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{ChangedSetting, StreamInfo};
    use crate::config::KeepInbox;
    use crate::doctor::Level;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn stream(name: &str, subject: &str) -> StreamFacts {
        StreamFacts {
            stream: StreamInfo {
                name: name.to_owned(),
                created: jiff::Timestamp::UNIX_EPOCH,
                subjects: vec![subject.to_owned()],
                messages: 0,
                first_sequence: 0,
                last_sequence: 0,
                duplicate_window: Duration::from_secs(120),
                max_age: Some(HOUR),
                has_subject_transform: false,
                is_copy: false,
                is_queue: false,
            },
            replicas: 3,
            is_clustered: true,
            has_leader: true,
            outdated_replicas: Vec::new(),
            is_in_memory: false,
            is_async: false,
            discards_old: false,
            bytes: 0,
            bytes_max: None,
            messages_max: None,
        }
    }

    fn worker() -> Worker {
        serde_json::from_value(serde_json::json!({
            "name": "test", "stream": "IN", "outputs": ["out.>"], "concurrency": 1, "batch": 1,
            "ack_wait": "30s"
        }))
        .unwrap()
    }

    /// The checks with the level of each finding that is not ok.
    fn trouble(findings: Vec<Finding>) -> Vec<(String, Level)> {
        let findings = findings.into_iter();
        let findings = findings.filter(|finding| finding.level != Level::Ok);
        findings
            .map(|finding| {
                assert!(finding.fix.is_some(), "{finding:?}");
                (finding.check, finding.level)
            })
            .collect()
    }

    fn judged(streams: &[StreamFacts], keep: Duration) -> Vec<(String, Level)> {
        let (workers, own) = ([worker()], ["ONCELY_DLQ".to_owned()]);
        let deployed = Deployed {
            streams,
            workers: &workers,
            own: &own,
        };
        let retention = Retention {
            outputs: HOUR,
            inbox: KeepInbox::For(keep),
            archive: None,
        };
        trouble(judge_streams(&deployed, &retention))
    }

    #[test]
    fn each_fault_of_a_stream_is_found() {
        let healthy = || [stream("IN", "in.>"), stream("OUT", "out.>")];
        assert_eq!(judged(&healthy(), 2 * HOUR), []);
        assert_eq!(
            judged(&healthy(), HOUR / 2),
            [("stream-retention".to_owned(), Level::Problem)]
        );
        type Fault = fn(&mut StreamFacts);
        let faults: [(&str, Level, Fault); 10] = [
            ("stream-replicas", Level::Problem, |facts| {
                facts.has_leader = false
            }),
            ("stream-replicas", Level::Advice, |facts| {
                facts.outdated_replicas.push("n2".to_owned());
            }),
            ("stream-storage", Level::Problem, |facts| {
                facts.is_in_memory = true
            }),
            ("stream-storage", Level::Problem, |facts| {
                facts.is_async = true
            }),
            ("stream-dedupe-window", Level::Problem, |facts| {
                facts.stream.duplicate_window = Duration::from_secs(1);
            }),
            ("stream-dedupe-window", Level::Advice, |facts| {
                facts.stream.is_queue = true;
                facts.stream.duplicate_window = Duration::from_secs(100);
            }),
            ("stream-limits", Level::Advice, |facts| {
                (facts.bytes, facts.bytes_max) = (85, Some(100));
            }),
            ("stream-limits", Level::Problem, |facts| {
                (facts.bytes, facts.bytes_max) = (96, Some(100));
            }),
            ("stream-limits", Level::Problem, |facts| {
                (facts.stream.messages, facts.messages_max) = (100, Some(100));
            }),
            ("stream-sync", Level::Advice, |facts| {
                (facts.is_clustered, facts.replicas) = (false, 1);
            }),
        ];
        for (check, level, plant) in faults {
            let [input, mut output] = healthy();
            plant(&mut output);
            assert_eq!(
                judged(&[input, output], 2 * HOUR),
                [(check.to_owned(), level)],
                "{check}"
            );
        }
    }

    #[test]
    fn a_single_replica_in_a_cluster_is_a_problem() {
        let mut input = stream("IN", "in.>");
        input.replicas = 1;
        assert_eq!(
            judged(&[input, stream("OUT", "out.>")], 2 * HOUR),
            [
                ("stream-replicas".to_owned(), Level::Problem),
                ("stream-sync".to_owned(), Level::Advice)
            ]
        );
    }

    #[test]
    fn a_consumed_stream_that_drops_old_messages_is_reported() {
        let mut input = stream("IN", "in.>");
        (input.discards_old, input.messages_max) = (true, Some(1000));
        let streams = [input, stream("OUT", "out.>")];
        assert_eq!(
            judged(&streams, 2 * HOUR),
            [("stream-limits".to_owned(), Level::Advice)]
        );
    }

    #[test]
    fn missing_streams_of_a_worker_are_problems() {
        let problem = ("stream-exists".to_owned(), Level::Problem);
        assert_eq!(judged(&[], 2 * HOUR), [problem.clone(), problem.clone()]);
        // A stream of another installation is not judged.
        let mut other = stream("OTHER", "other.>");
        other.is_in_memory = true;
        assert_eq!(judged(&[other], 2 * HOUR), [problem.clone(), problem]);
    }

    #[test]
    fn versions_and_limits_of_a_server_are_judged() {
        let facts = |version: &str, storage: u64| ServerFacts {
            version: version.to_owned(),
            storage,
            storage_max: Some(100),
            ..ServerFacts::default()
        };
        assert_eq!(trouble(judge_server(&facts("2.11.0", 10))), []);
        assert_eq!(trouble(judge_server(&facts("2.12.0-RC.1", 10))), []);
        assert_eq!(
            trouble(judge_server(&facts("2.10.29", 96))),
            [
                ("nats-version".to_owned(), Level::Problem),
                ("nats-storage".to_owned(), Level::Problem)
            ]
        );
        assert_eq!(
            trouble(judge_server(&facts("3.0.0", 80))),
            [("nats-storage".to_owned(), Level::Advice)]
        );
    }

    #[test]
    fn changed_paused_and_missing_consumers_are_reported() {
        let level = |facts: ConsumerFacts| {
            let one = WorkerConsumer {
                facts,
                ..WorkerConsumer::default()
            };
            judge_consumers(&[one])[0].level
        };
        let exists = ConsumerFacts {
            exists: true,
            ..ConsumerFacts::default()
        };
        assert_eq!(level(exists.clone()), Level::Ok);
        assert_eq!(level(ConsumerFacts::default()), Level::Advice);
        let paused = ConsumerFacts {
            is_paused: true,
            ..exists.clone()
        };
        assert_eq!(level(paused), Level::Advice);
        let changed = ConsumerFacts {
            changed: vec![ChangedSetting {
                name: "max_deliver",
                expected: "unlimited".to_owned(),
                found: "5".to_owned(),
            }],
            ..exists
        };
        assert_eq!(level(changed), Level::Problem);
    }
}
