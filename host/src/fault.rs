//! Crash points, for tests only: named points where the host aborts.
//!
//! They exist in a build with the feature `faults`; in any other build the calls compile to nothing. Such a build reads
//!
//! - `ONCELY_FAULT=name:3`: abort when the point `name` is passed for the third time;
//! - `ONCELY_FAULT_LOG=file`: append a line for each pass (`pass name`) and each abort (`abort name`). The appended
//!   lines survive the process.
//!
//! Mutants, each with one promise broken on purpose, are patches in `tests/mutants`, which add `fault::mutant` to it.

/// A message was taken from the broker.
pub const AFTER_FETCH: &str = "after_fetch";
/// The transaction of a batch has begun.
pub const AFTER_BEGIN: &str = "after_begin";
/// The event ids of a batch are claimed.
pub const AFTER_CLAIM: &str = "after_claim";
/// A guest has just run a statement.
pub const MID_GUEST: &str = "mid_guest";
/// All guests of a batch have run; nothing they left is written.
pub const AFTER_GUEST: &str = "after_guest_before_outputs";
/// State and outputs are written, the commit is not sent.
pub const BEFORE_COMMIT: &str = "before_commit";
/// The commit is confirmed, nothing is acknowledged.
pub const AFTER_COMMIT: &str = "after_commit_before_ack";
/// One message is acknowledged, its neighbours may not be; the acknowledgement may not have left.
pub const AFTER_ACK: &str = "batch_partly_acked";
/// It is noted that a message is about to be handled alone.
pub const CRASH_MARKER_SET: &str = "crash_marker_set";
/// A batch is about to run again without the member that spoiled it.
pub const BEFORE_RERUN: &str = "before_rerun";
/// Failed attempts are counted; the message is neither given back nor buried.
pub const AFTER_COUNT: &str = "after_attempts_counted";
/// Dead letters are committed, their messages not acknowledged.
pub const AFTER_DEAD_LETTER: &str = "dead_letter_committed_not_acked";
/// Dead letters are put back, which is not committed.
pub const BEFORE_REDRIVE: &str = "redrive_not_committed";
/// Dead letters are put back, the messages that say so are not handed over.
pub const AFTER_REDRIVE: &str = "redrive_committed";
/// A worker was sent to a dead letter and has read it.
pub const REDRIVE_READ: &str = "redrive_read";
/// A sweep has leased what was left unpublished.
pub const RELAY_LEASED: &str = "relay_leased";
/// Outputs are about to be sent.
pub const BEFORE_PUBLISH: &str = "relay_before_publish";
/// Outputs are sent, no answer is read.
pub const PUBLISH_SENT: &str = "relay_sent_no_answer";
/// The broker acknowledged outputs; they are not marked.
pub const BEFORE_MARK: &str = "relay_acknowledged_not_marked";
/// Outputs are marked as published.
pub const AFTER_MARK: &str = "relay_marked";
/// Outputs that were not published are about to be put back.
pub const BEFORE_RELEASE: &str = "relay_before_release";
/// Outputs that a stream has lost are no longer marked as published.
pub const REPUBLISH: &str = "relay_republish";
/// Outputs were read from the log and are about to be sent.
pub const WAL_READ: &str = "wal_outputs_read";
/// What became of outputs from the log is about to be recorded.
pub const BEFORE_WAL_RECORD: &str = "wal_before_record";
/// It is recorded; the server may not know.
pub const AFTER_WAL_RECORD: &str = "wal_recorded";
/// The replication slot is made; outputs still go by polling.
pub const SLOT_CREATED: &str = "wal_slot_created";
/// Outputs go by polling again; some are in the log.
pub const WAL_LEFT: &str = "wal_left";
/// Some outputs were brought over from the log to polling.
pub const WAL_OUTPUTS_MOVED: &str = "wal_outputs_moved";
/// Old rows were removed.
pub const AFTER_PRUNE: &str = "after_prune";
/// The old version of a worker is drained, the new one is yet to start.
pub const DEPLOY_SWAP: &str = "deploy_swap";
/// The platform's migrations have run and are not committed.
pub const MIGRATING: &str = "start_migrating";
/// The deployed workers were started, the host has not told anybody.
pub const STARTED: &str = "start_workers_started";

/// Every point where a host can be made to die.
pub const POINTS: &[&str] = &[
    AFTER_FETCH,
    AFTER_BEGIN,
    AFTER_CLAIM,
    MID_GUEST,
    AFTER_GUEST,
    BEFORE_COMMIT,
    AFTER_COMMIT,
    AFTER_ACK,
    CRASH_MARKER_SET,
    BEFORE_RERUN,
    AFTER_COUNT,
    AFTER_DEAD_LETTER,
    BEFORE_REDRIVE,
    AFTER_REDRIVE,
    REDRIVE_READ,
    RELAY_LEASED,
    BEFORE_PUBLISH,
    PUBLISH_SENT,
    BEFORE_MARK,
    AFTER_MARK,
    BEFORE_RELEASE,
    REPUBLISH,
    AFTER_PRUNE,
    DEPLOY_SWAP,
    MIGRATING,
    STARTED,
];

/// The points that only a host passes whose outputs go by the log, or just did (PostgreSQL).
pub const WAL_POINTS: &[&str] = &[
    WAL_READ,
    BEFORE_WAL_RECORD,
    AFTER_WAL_RECORD,
    SLOT_CREATED,
    WAL_LEFT,
    WAL_OUTPUTS_MOVED,
];

/// Seen, not a place to die: the inbox knew a message already.
pub const DUPLICATE_SKIPPED: &str = "duplicate_skipped";
/// Seen, not a place to die: the broker knew an output already.
pub const DUPLICATE_OUTPUT: &str = "duplicate_output";
/// Seen, not a place to die: a stream held another message under the id of an output.
pub const ID_TAKEN: &str = "id_taken";

/// Seen, not a place to die: a mutant did harm that it can know of.
pub const MUTANT_ACTED: &str = "mutant_acted";

#[cfg(feature = "faults")]
pub use armed::{point, witness};

/// Passes a point, and dies there if that is what the test wants.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_name: &str) {}

/// Notes that something was seen that a test must not miss.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn witness(_name: &str) {}

#[cfg(feature = "faults")]
mod armed {
    use std::collections::HashMap;
    use std::fs::File;
    use std::io::Write;
    use std::sync::{LazyLock, Mutex, PoisonError};

    static ARMED: LazyLock<Armed> = LazyLock::new(Armed::from_environment);

    struct Armed {
        /// Where to die, and at which pass.
        fault: Option<(String, u64)>,
        log: Option<File>,
        passes: Mutex<HashMap<String, u64>>,
    }

    impl Armed {
        fn from_environment() -> Self {
            let fault = std::env::var("ONCELY_FAULT").ok();
            let log = std::env::var_os("ONCELY_FAULT_LOG");
            Armed {
                fault: fault.as_deref().and_then(|fault| {
                    let (name, nth) = fault.split_once(':')?;
                    Some((name.to_owned(), nth.parse().ok()?))
                }),
                log: log.and_then(|path| File::options().create(true).append(true).open(path).ok()),
                passes: Mutex::default(),
            }
        }

        /// One write for each line, so that lines of several hosts do not mix.
        fn append(&self, what: &str, name: &str) {
            if let Some(mut log) = self.log.as_ref() {
                let _ = log.write_all(format!("{what} {name}\n").as_bytes());
            }
        }

        fn pass(&self, name: &str) -> u64 {
            let mut passes = self.passes.lock().unwrap_or_else(PoisonError::into_inner);
            let count = passes.entry(name.to_owned()).or_default();
            *count += 1;
            *count
        }
    }

    /// Passes a point, and dies there if that is what the test wants.
    pub fn point(name: &str) {
        ARMED.append("pass", name);
        let pass = ARMED.pass(name);
        if ARMED
            .fault
            .as_ref()
            .is_some_and(|(wanted, nth)| wanted == name && *nth == pass)
        {
            ARMED.append("abort", name);
            std::process::abort();
        }
    }

    /// Notes that something was seen that a test must not miss.
    pub fn witness(name: &str) {
        ARMED.append("pass", name);
    }
}
