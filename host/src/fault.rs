//! Fault injection for tests: named points where the host aborts, and mutants, each of which breaks
//! one guarantee.
//!
//! They exist only in a build with the feature `faults`; in any other build the calls compile to
//! nothing. The settings are:
//!
//! - `ONCELY_FAULT=name:3`: abort when the point `name` is passed for the third time;
//! - `ONCELY_MUTANT=name`: behave like that mutant;
//! - `ONCELY_FAULT_LOG=file`: append a line for each pass (`pass name`) and each abort (`abort
//!   name`). Appended lines survive the process.

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

/// Messages are acknowledged as they arrive.
pub const ACK_BEFORE_COMMIT: &str = "ack_before_commit";
/// The inbox record of an event is ignored.
pub const SKIP_CLAIM: &str = "skip_claim";
/// The inbox is committed before the guests run.
pub const INBOX_IN_OWN_TX: &str = "inbox_in_own_tx";
/// Failed items keep their claim.
pub const SKIP_RELEASE: &str = "skip_release";
/// Failed statements are not recorded, and a commit without its fence counts as committed, whatever
/// its tag says (PostgreSQL).
pub const IGNORE_COMMIT_TAG: &str = "ignore_commit_tag";
/// A commit whose answer was lost is sent again on another connection, where it succeeds without
/// effect (PostgreSQL).
pub const RESEND_COMMIT: &str = "resend_commit";
/// An unclear commit is looked up. If it is not found, the batch runs again regardless of the inbox
/// (PostgreSQL).
pub const RESOLVE_BY_SELECT: &str = "resolve_by_select";
/// The instance of a handler that trapped handles the next message.
pub const REUSE_AFTER_TRAP: &str = "reuse_after_trap";
/// The database answers before a commit is on disk (PostgreSQL).
pub const SYNCHRONOUS_COMMIT_OFF: &str = "synchronous_commit_off";
/// The poller reads only beyond the highest sequence it has read.
pub const CURSOR_BY_SEQ: &str = "cursor_by_seq";
/// Outputs are marked as published before the broker has them.
pub const MARK_BEFORE_PUBACK: &str = "mark_before_puback";
/// Recording one output as published records all of them.
pub const MARK_WITHOUT_FILTER: &str = "mark_without_filter";
/// Dead messages are settled without a dead letter.
pub const SKIP_DEAD_LETTER: &str = "skip_dead_letter";
/// A failure is counted for every item of its batch.
pub const CHARGE_WHOLE_BATCH: &str = "charge_whole_batch";
/// Two payloads under one event id count as equal.
pub const DROP_PAYLOAD_HASH: &str = "drop_payload_hash";
/// Guests may set the platform's headers.
pub const ALLOW_RESERVED_HEADERS: &str = "allow_reserved_headers";
/// A stream that reports a duplicate id is assumed to hold that output.
pub const TRUST_DUPLICATE: &str = "trust_duplicate";
/// A worker handles the dead letter that a pointer names, whichever worker it belongs to.
pub const POINTER_WITHOUT_WORKER: &str = "pointer_without_worker";
/// A transaction begins with the session state that the previous one left (PostgreSQL).
pub const NO_SESSION_RESET: &str = "no_session_reset";
/// Leases of outputs and sessions do not name their host instance, so none is taken over before it
/// expires.
pub const LEASES_WITHOUT_INSTANCE: &str = "leases_without_instance";

/// Every mutant.
pub const MUTANTS: &[&str] = &[
    ACK_BEFORE_COMMIT,
    SKIP_CLAIM,
    INBOX_IN_OWN_TX,
    SKIP_RELEASE,
    IGNORE_COMMIT_TAG,
    RESEND_COMMIT,
    RESOLVE_BY_SELECT,
    REUSE_AFTER_TRAP,
    SYNCHRONOUS_COMMIT_OFF,
    CURSOR_BY_SEQ,
    MARK_BEFORE_PUBACK,
    MARK_WITHOUT_FILTER,
    SKIP_DEAD_LETTER,
    CHARGE_WHOLE_BATCH,
    DROP_PAYLOAD_HASH,
    ALLOW_RESERVED_HEADERS,
    TRUST_DUPLICATE,
    POINTER_WITHOUT_WORKER,
    NO_SESSION_RESET,
    LEASES_WITHOUT_INSTANCE,
];

#[cfg(feature = "faults")]
pub use armed::{ignore_inbox, ignores_inbox, is_past_cursor, mutant, point, witness};

/// Passes a fault point, and aborts there if the test requires it.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_name: &str) {}

/// Records an observation that a test requires.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn witness(_name: &str) {}

/// Whether this host runs as the mutant `name`.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn mutant(_name: &str) -> bool {
    false
}

/// Whether a cursor over the outbox would already be past `seq`.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn is_past_cursor(_seq: i64) -> bool {
    false
}

/// Ignores the inbox record of an event from now on.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn ignore_inbox(_event_id: &str) {}

/// Whether the inbox record of an event is ignored.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn ignores_inbox(_event_id: &str) -> bool {
    false
}

#[cfg(feature = "faults")]
mod armed {
    use std::collections::{HashMap, HashSet};
    use std::fs::File;
    use std::io::Write;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::sync::{LazyLock, Mutex, PoisonError};

    static ARMED: LazyLock<Armed> = LazyLock::new(Armed::from_environment);

    struct Armed {
        /// The point at which to abort, and at which pass.
        fault: Option<(String, u64)>,
        mutant: Option<String>,
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
                mutant: std::env::var("ONCELY_MUTANT").ok(),
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

    /// Whether this host runs as the mutant `name`.
    pub fn mutant(name: &str) -> bool {
        ARMED.mutant.as_deref() == Some(name)
    }

    static DISTRUSTED: Mutex<Option<HashSet<String>>> = Mutex::new(None);

    /// Ignores the inbox record of an event from now on.
    pub fn ignore_inbox(event_id: &str) {
        let mut distrusted = DISTRUSTED.lock().unwrap_or_else(PoisonError::into_inner);
        distrusted
            .get_or_insert_default()
            .insert(event_id.to_owned());
    }

    /// Whether the inbox record of an event is ignored.
    pub fn ignores_inbox(event_id: &str) -> bool {
        let distrusted = DISTRUSTED.lock().unwrap_or_else(PoisonError::into_inner);
        distrusted
            .as_ref()
            .is_some_and(|distrusted| distrusted.contains(event_id))
    }

    /// Whether a cursor over the outbox would already be past `seq`.
    pub fn is_past_cursor(seq: i64) -> bool {
        static HIGHEST: AtomicI64 = AtomicI64::new(i64::MIN);
        HIGHEST.fetch_max(seq, Ordering::Relaxed) > seq
    }
}
