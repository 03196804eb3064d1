//! Crash points for tests: named points where the host aborts.
//!
//! They exist only in a build with the feature `faults`; in any other build the calls compile to
//! nothing. The settings are:
//!
//! - `ONCELY_FAULT=name:3`: abort when the point `name` is passed for the third time;
//! - `ONCELY_FAULT_LOG=file`: append a line for each pass (`pass name`) and each abort (`abort
//!   name`). Appended lines survive the process.
//!
//! Mutants, each of which breaks one guarantee, are patches in `tests/mutants`.

/// A message was received from the broker.
pub const AFTER_FETCH: &str = "after_fetch";
/// The transaction of a batch has begun.
pub const AFTER_BEGIN: &str = "after_begin";
/// The event ids of a batch are claimed.
pub const AFTER_CLAIM: &str = "after_claim";
/// A guest has just run a statement.
pub const MID_GUEST: &str = "mid_guest";
/// All guests of a batch have run; their outputs are not written yet.
pub const AFTER_GUEST: &str = "after_guest_before_outputs";
/// State and outputs are written; the commit is not sent.
pub const BEFORE_COMMIT: &str = "before_commit";
/// The commit is confirmed; nothing is acknowledged.
pub const AFTER_COMMIT: &str = "after_commit_before_ack";
/// One message is acknowledged, others of its batch may not be. The acknowledgement may still be in
/// the buffer.
pub const AFTER_ACK: &str = "batch_partly_acked";
/// The crash marker of a message that will be handled alone is set.
pub const CRASH_MARKER_SET: &str = "crash_marker_set";
/// A batch is about to run again without its failed item.
pub const BEFORE_RERUN: &str = "before_rerun";
/// Failed attempts are counted; the message is neither nacked nor dead-lettered.
pub const AFTER_COUNT: &str = "after_attempts_counted";
/// Dead letters are committed; their messages are not acknowledged.
pub const AFTER_DEAD_LETTER: &str = "dead_letter_committed_not_acked";
/// Dead letters are redriven, but not committed.
pub const BEFORE_REDRIVE: &str = "redrive_not_committed";
/// Dead letters are redriven; their pointer messages are not handed to the relay.
pub const AFTER_REDRIVE: &str = "redrive_committed";
/// A worker received a pointer to a dead letter and has read it.
pub const REDRIVE_READ: &str = "redrive_read";
/// The poller has leased unpublished outputs.
pub const RELAY_LEASED: &str = "relay_leased";
/// Outputs are about to be sent.
pub const BEFORE_PUBLISH: &str = "relay_before_publish";
/// Outputs are sent; no acknowledgement is read.
pub const PUBLISH_SENT: &str = "relay_sent_no_answer";
/// The broker acknowledged outputs; they are not marked as published.
pub const BEFORE_MARK: &str = "relay_acknowledged_not_marked";
/// Outputs are marked as published.
pub const AFTER_MARK: &str = "relay_marked";
/// Unpublished outputs are about to be released.
pub const BEFORE_RELEASE: &str = "relay_before_release";
/// Outputs that a stream has lost are no longer marked as published.
pub const REPUBLISH: &str = "relay_republish";
/// Outputs were read from the WAL and are about to be sent.
pub const WAL_READ: &str = "wal_outputs_read";
/// The results of outputs from the WAL are about to be recorded.
pub const BEFORE_WAL_RECORD: &str = "wal_before_record";
/// The results are recorded; the server may not have the confirmed position yet.
pub const AFTER_WAL_RECORD: &str = "wal_recorded";
/// The replication slot is created; outputs are still published by polling.
pub const SLOT_CREATED: &str = "wal_slot_created";
/// The relay mode is `poll` again; some outputs are still in the WAL.
pub const WAL_LEFT: &str = "wal_left";
/// Some outputs were moved from WAL mode to polling.
pub const WAL_OUTPUTS_MOVED: &str = "wal_outputs_moved";
/// Old rows were deleted.
pub const AFTER_PRUNE: &str = "after_prune";
/// The old version of a worker is drained, the new one is yet to start.
pub const DEPLOY_SWAP: &str = "deploy_swap";
/// The platform's migrations have run but are not committed.
pub const MIGRATING: &str = "start_migrating";
/// The deployed workers are started; the host has not announced that.
pub const STARTED: &str = "start_workers_started";

/// Every point where a host can be made to abort.
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

/// The points that only a host in WAL mode passes, or one that just left it (PostgreSQL).
pub const WAL_POINTS: &[&str] = &[
    WAL_READ,
    BEFORE_WAL_RECORD,
    AFTER_WAL_RECORD,
    SLOT_CREATED,
    WAL_LEFT,
    WAL_OUTPUTS_MOVED,
];

/// An observation, not a fault point: the inbox already had a message.
pub const DUPLICATE_SKIPPED: &str = "duplicate_skipped";
/// An observation, not a fault point: the broker already had an output.
pub const DUPLICATE_OUTPUT: &str = "duplicate_output";
/// An observation, not a fault point: a stream held another message under the id of an output.
pub const ID_TAKEN: &str = "id_taken";

/// An observation, not a fault point: a mutant had a harmful effect that it can detect.
pub const MUTANT_ACTED: &str = "mutant_acted";

#[cfg(feature = "faults")]
pub use armed::{point, witness};

/// Passes a fault point, and aborts there if the test requires it.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_name: &str) {}

/// Records an observation that a test requires.
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
        /// The point at which to abort, and at which pass.
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

        /// Appends a line in one write, so that lines of several hosts do not mix.
        fn append(&self, event: &str, name: &str) {
            if let Some(mut log) = self.log.as_ref() {
                let _ = log.write_all(format!("{event} {name}\n").as_bytes());
            }
        }

        fn pass(&self, name: &str) -> u64 {
            let mut passes = self.passes.lock().unwrap_or_else(PoisonError::into_inner);
            let count = passes.entry(name.to_owned()).or_default();
            *count += 1;
            *count
        }
    }

    /// Passes a fault point, and aborts there if the test requires it.
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

    /// Records an observation that a test requires.
    pub fn witness(name: &str) {
        ARMED.append("pass", name);
    }
}
