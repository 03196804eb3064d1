//! The contenders of the benchmark and their work.

/// The work of each message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Adds one to a counter under one of a thousand keys and sends a message.
    State,
    /// Like `State`, with outputs in order of their key; hand-written loops rarely offer this.
    StateInOrder,
    /// Writes two rows with one statement and sends a message.
    Sql,
    /// Like `Sql`, with a deferred statement.
    DeferredSql,
    /// Like `Sql`, with one statement for a batch of messages.
    BulkSql,
}

/// The implementation that does the work.
#[derive(Debug, Clone, Copy)]
pub enum Implementation {
    /// A hand-written loop: one transaction per message, 32 at a time.
    HandWritten,
    /// Native code that does a host's work for the happy path.
    Native,
    /// A host with these worker settings.
    Host { settings: &'static str },
    /// A host with these worker settings, on a database without output groups.
    HostWithoutGroups { settings: &'static str },
    /// A host in WAL mode with these worker settings.
    HostInWalMode { settings: &'static str },
    /// A host on SQLite with these worker settings.
    HostOnSqlite { settings: &'static str },
}

/// The peculiarity of the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    Clean,
    /// This percentage is rejected.
    Poison(usize),
    /// This percentage is rejected after its statement.
    PoisonAfterSql(usize),
    /// This percentage has the id of an earlier message.
    Duplicates(usize),
}

/// The size of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub keys: usize,
    /// Bytes of padding in each message, and in its output.
    pub padding: usize,
    /// Statements beside the work of the contender.
    pub statements: usize,
    /// Hosts on one database.
    pub hosts: usize,
    /// Rows that are in the inbox before.
    pub inbox: usize,
}

impl Size {
    pub const USUAL: Size = Size {
        keys: 1_000,
        padding: 0,
        statements: 0,
        hosts: 1,
        inbox: 0,
    };
}

#[derive(Debug, Clone, Copy)]
pub struct Contender {
    pub name: &'static str,
    pub description: &'static str,
    pub implementation: Implementation,
    pub work: Work,
    pub mix: Mix,
    pub size: Size,
    /// The contender for comparison.
    pub baseline: Option<&'static str>,
}

/// The contender of this name.
pub fn by_name(name: &str) -> Option<&'static Contender> {
    CONTENDERS.iter().find(|contender| contender.name == name)
}

const SQL: &str = "[worker.retry]\nattempts = 1";
const SQL_BATCH: &str = "isolation = \"batch\"\n[worker.retry]\nattempts = 1";
/// Messages of a key share one lane: two lanes that change the same state would conflict.
pub const STATE: &str =
    "ordering_key = \"header:Key\"\nstate_keys = [\"{header:Key}\"]\n[worker.retry]\nattempts = 1";
const STATE_BATCH: &str = "isolation = \"batch\"\nordering_key = \"header:Key\"\nstate_keys = [\"{header:Key}\"]\n[worker.retry]\nattempts = 1";
const STATE_SMALL: &str = "batch = 32\nordering_key = \"header:Key\"\nstate_keys = [\"{header:Key}\"]\n[worker.retry]\nattempts = 1";
const STATE_KEY_BY_KEY: &str = "ordering_key = \"header:Key\"\n[worker.retry]\nattempts = 1";

/// The file is made by [`crate::stage`].
const STATE_SCHEMA: &str = "ordering_key = \"header:Key\"\nstate_keys = [\"{header:Key}\"]\n[worker.retry]\nattempts = 1\n[[worker.schema]]\nsubject = \"in.>\"\nfile = \"schema.json\"";

const fn host(
    name: &'static str,
    description: &'static str,
    settings: &'static str,
    work: Work,
) -> Contender {
    let baseline = Some(match work {
        Work::State | Work::StateInOrder => "state, by hand",
        Work::Sql | Work::DeferredSql | Work::BulkSql => "sql, by hand",
    });
    Contender {
        name,
        description,
        implementation: Implementation::Host { settings },
        work,
        mix: Mix::Clean,
        size: Size::USUAL,
        baseline,
    }
}

const fn by_hand(name: &'static str, work: Work) -> Contender {
    let description = "async-nats and sqlx: one transaction per message, 32 at a time, and a relay";
    Contender {
        name,
        description,
        implementation: Implementation::HandWritten,
        work,
        mix: Mix::Clean,
        size: Size::USUAL,
        baseline: None,
    }
}

const fn native(name: &'static str, work: Work) -> Contender {
    let description = "batches with bulk statements, no sandbox and no failures";
    Contender {
        description,
        implementation: Implementation::Native,
        ..host(name, description, "", work)
    }
}

pub const CONTENDERS: &[Contender] = &[
    by_hand("state, by hand", Work::State),
    native("state, native", Work::State),
    host(
        "state",
        "keyed state, a fresh instance per message, state_keys",
        STATE,
        Work::State,
    ),
    host(
        "state, key by key",
        "the same without state_keys",
        STATE_KEY_BY_KEY,
        Work::State,
    ),
    host(
        "state, batch = 32",
        "at most 32 messages in a transaction",
        STATE_SMALL,
        Work::State,
    ),
    host(
        "state, outputs in order",
        "outputs of a key are published in order",
        STATE,
        Work::StateInOrder,
    ),
    host(
        "state, isolation = batch",
        "one instance per batch",
        STATE_BATCH,
        Work::State,
    ),
    Contender {
        implementation: Implementation::HostWithoutGroups { settings: STATE },
        baseline: Some("state"),
        ..host(
            "state, no output groups",
            "each output has a lease and a record of its own",
            STATE,
            Work::State,
        )
    },
    Contender {
        implementation: Implementation::HostInWalMode { settings: STATE },
        baseline: Some("state"),
        ..host(
            "state, relay = wal",
            "outputs are published from the WAL",
            STATE,
            Work::State,
        )
    },
    Contender {
        baseline: Some("state"),
        ..host(
            "state, schema",
            "the body of each message is checked against a JSON Schema",
            STATE_SCHEMA,
            Work::State,
        )
    },
    Contender {
        implementation: Implementation::HostOnSqlite { settings: STATE },
        baseline: Some("state"),
        ..host("state, sqlite", "on SQLite", STATE, Work::State)
    },
    by_hand("sql, by hand", Work::Sql),
    native("sql, native", Work::Sql),
    host(
        "sql",
        "one statement and a fresh instance per message",
        SQL,
        Work::Sql,
    ),
    host(
        "sql, deferred",
        "the statement is deferred",
        SQL,
        Work::DeferredSql,
    ),
    host(
        "sql, isolation = batch",
        "one instance per batch",
        SQL_BATCH,
        Work::Sql,
    ),
    host(
        "sql, batch handler",
        "one statement for the messages of a batch",
        SQL,
        Work::BulkSql,
    ),
    Contender {
        mix: Mix::Poison(1),
        baseline: Some("state"),
        ..host(
            "state, 1 % poison",
            "one in a hundred is rejected",
            STATE,
            Work::State,
        )
    },
    Contender {
        mix: Mix::Duplicates(10),
        baseline: Some("state"),
        ..host(
            "state, 10 % duplicates",
            "one in ten has the id of an earlier message",
            STATE,
            Work::State,
        )
    },
    Contender {
        mix: Mix::Poison(10),
        baseline: Some("state"),
        ..host(
            "state, 10 % poison",
            "one in ten is rejected",
            STATE,
            Work::State,
        )
    },
    Contender {
        mix: Mix::PoisonAfterSql(10),
        baseline: Some("sql"),
        ..host(
            "sql, 10 % poison after sql",
            "one in ten is rejected after its statement",
            SQL,
            Work::Sql,
        )
    },
];
