//! The workload: transfers between accounts, mixed with every kind of faulty message.

use oncely::fault;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use support::nats::NewMessage;

use crate::checker::ATTEMPTS;

/// Ordering keys; accounts belong to one key, so that lanes rarely conflict.
const KEYS: u32 = 256;
const ACCOUNTS_OF_KEY: u32 = 4;

/// Number of recent messages that may be sent again.
const REMEMBERED: usize = 400;

/// The expected result of a message; its header `nature` is for the checker only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Nature {
    Plain,
    /// Runs statements in the database for a while.
    Slow,
    /// Has no id except its stream sequence.
    NoId,
    /// Fails once, before any effect or after its rows were written.
    FailsOnce,
    FailsOnceLate,
    /// Dies, and takes effect after its redrive.
    Redriven,
    Poison,
    PoisonLate,
    Trap,
    TimesOut,
    OutOfMemory,
    /// Ignores a failed statement.
    Swallows,
    /// Sends an output with a platform header.
    ReservedHeader,
    /// Has a body that is not JSON, or not UTF-8.
    Malformed,
    /// Has an id that is too long.
    LongId,
}

impl Nature {
    pub const ALL: [Nature; 15] = [
        Nature::Plain,
        Nature::Slow,
        Nature::NoId,
        Nature::FailsOnce,
        Nature::FailsOnceLate,
        Nature::Redriven,
        Nature::Poison,
        Nature::PoisonLate,
        Nature::Trap,
        Nature::TimesOut,
        Nature::OutOfMemory,
        Nature::Swallows,
        Nature::ReservedHeader,
        Nature::Malformed,
        Nature::LongId,
    ];

    pub fn from_header(text: &str) -> Option<Nature> {
        Nature::ALL
            .into_iter()
            .find(|nature| format!("{nature:?}") == text)
    }

    /// The reason of its dead letter; none when it takes effect in the end.
    pub fn death(self) -> Option<&'static str> {
        match self {
            Nature::Plain | Nature::Slow | Nature::NoId => None,
            Nature::FailsOnce | Nature::FailsOnceLate | Nature::Redriven => None,
            Nature::Malformed => Some("rejected"),
            Nature::LongId => Some("invalid-id"),
            Nature::ReservedHeader => Some("output-refused"),
            _ => Some("attempts-exhausted"),
        }
    }

    /// Whether no attempt at it may ever be counted.
    pub fn never_fails(self) -> bool {
        matches!(
            self,
            Nature::Plain | Nature::Slow | Nature::NoId | Nature::LongId
        )
    }

    fn behaviour(self) -> &'static str {
        match self {
            Nature::Plain
            | Nature::NoId
            | Nature::ReservedHeader
            | Nature::Malformed
            | Nature::LongId => "ledger",
            Nature::Slow => "ledger,slow",
            Nature::FailsOnce => "fail_once,ledger",
            Nature::FailsOnceLate => "ledger,fail_once",
            Nature::Redriven => "fail_until,ledger",
            Nature::Poison => "fail",
            Nature::PoisonLate => "ledger,fail",
            Nature::Trap => "ledger,trap",
            Nature::TimesOut => "ledger,spin",
            Nature::OutOfMemory => "eat_memory",
            Nature::Swallows => "swallow_error",
        }
    }

    /// Frequency per ten thousand messages.
    fn rate(self) -> u32 {
        match self {
            Nature::Plain => 0,
            Nature::Slow => 300,
            Nature::NoId => 50,
            Nature::FailsOnce | Nature::FailsOnceLate | Nature::Redriven => 100,
            Nature::Poison | Nature::PoisonLate => 50,
            Nature::Trap => 20,
            Nature::TimesOut => 10,
            Nature::OutOfMemory => 5,
            Nature::Swallows | Nature::ReservedHeader => 20,
            Nature::Malformed => 70,
            Nature::LongId => 30,
        }
    }
}

/// Generates messages, the same ones for the same seed.
pub struct Workload {
    random: StdRng,
    made: u64,
    recent: Vec<NewMessage>,
    sequence_of_key: Vec<u64>,
    pub duplicates: u64,
    pub id_reuses: u64,
    often: Option<Often>,
}

/// A kind of message published far more often than usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Often {
    Nature(Nature),
    /// An earlier id with another body.
    IdReuse,
}

/// Its frequency per ten thousand messages.
const OFTEN: u32 = 300;

impl Workload {
    pub fn new(seed: u64, often: Option<Often>) -> Self {
        Workload {
            random: StdRng::seed_from_u64(seed),
            made: 0,
            recent: Vec::new(),
            sequence_of_key: vec![0; KEYS as usize],
            duplicates: 0,
            id_reuses: 0,
            often,
        }
    }

    /// The next message: mostly a new event, sometimes an earlier message or its id with another
    /// body.
    pub fn next_message(&mut self) -> NewMessage {
        self.made += 1;
        let draw = self.random.random_range(0..10_000);
        let reuses = if self.often == Some(Often::IdReuse) {
            OFTEN
        } else {
            50
        };
        let message = match draw {
            0..1_000 if !self.recent.is_empty() => {
                self.duplicates += 1;
                // A third of the copies follow at once, so that both copies meet in one batch.
                let back = if draw % 3 == 0 {
                    1
                } else {
                    self.random.random_range(1..=self.recent.len())
                };
                let message = self.recent[self.recent.len() - back].clone();
                with_new_broker_id(message)
            }
            1_000.. if draw < 1_000 + reuses && !self.recent.is_empty() => {
                self.id_reuses += 1;
                let earlier = &self.recent[self.random.random_range(0..self.recent.len())];
                let event_id = header(earlier, "ce-id").to_owned();
                self.event(Nature::Plain, &event_id)
            }
            _ => {
                let nature = self.nature();
                let event_id = format!("e{}", self.made);
                self.event(nature, &event_id)
            }
        };
        self.remember(&message);
        message
    }

    fn nature(&mut self) -> Nature {
        let mut draw = self.random.random_range(0..10_000);
        for nature in Nature::ALL {
            let rate = if self.often == Some(Often::Nature(nature)) {
                OFTEN.max(nature.rate())
            } else {
                nature.rate()
            };
            if draw < rate {
                return nature;
            }
            draw -= rate;
        }
        Nature::Plain
    }

    fn event(&mut self, nature: Nature, event_id: &str) -> NewMessage {
        // A few keys get most messages.
        let key = (f64::from(KEYS) * self.random.random::<f64>().powi(3)) as u32 % KEYS;
        let sequence = &mut self.sequence_of_key[key as usize];
        *sequence += 1;
        let sequence = *sequence;
        let account = |key: u32, number: u32| format!("k{key}-{number}");
        let from = self.random.random_range(0..ACCOUNTS_OF_KEY);
        let other_key = if self.random.random_bool(0.01) {
            self.random.random_range(0..KEYS)
        } else {
            key
        };

        // The ledger operation
        let options = json!({
            "from": account(key, from),
            "to": account(other_key, (from + 1) % ACCOUNTS_OF_KEY),
            "delta": self.random.random_range(1..1_000),
            "n": self.random.random_range(0..4),
            "key": format!("k{key}"),
            "seq": sequence,
            "delay_ms": if self.random.random_bool(0.03) { 300 } else { 0 },
            "header": (nature == Nature::ReservedHeader).then_some("Nats-Expected-Stream"),
            "what": "unique", "ms": 10, "sql": true, "attempt": ATTEMPTS + 1,
        });
        let mut options = options;
        if nature == Nature::ReservedHeader {
            options["n"] = json!(1);
        }
        let mut message = NewMessage::new(
            "in.ledger",
            event_id,
            nature.behaviour(),
            &options.to_string(),
        );

        // The fault
        match nature {
            Nature::Malformed if sequence.is_multiple_of(2) => {
                message.body = vec![0xff, 0xfe, 0, b'{']
            }
            Nature::Malformed => message.body.truncate(10),
            Nature::LongId => set_header(
                &mut message,
                "ce-id",
                &format!("{event_id}-{}", "x".repeat(300)),
            ),
            Nature::NoId => message
                .headers
                .retain(|(name, _)| name != "ce-id" && name != "Nats-Msg-Id"),
            _ => {}
        }
        message
            .headers
            .push(("nature".to_owned(), format!("{nature:?}")));
        message.headers.push(("key".to_owned(), format!("k{key}")));
        message
    }

    fn remember(&mut self, message: &NewMessage) {
        // Without its own id, a copy would be another event.
        let natures = ["NoId", "LongId"];
        if natures.contains(&header(message, "nature")) {
            return;
        }
        if self.recent.len() == REMEMBERED {
            self.recent.remove(0);
        }
        self.recent.push(message.clone());
    }
}

/// A new id for the broker: only the inbox can recognise the repeated event.
fn with_new_broker_id(mut message: NewMessage) -> NewMessage {
    set_header(
        &mut message,
        "Nats-Msg-Id",
        &uuid::Uuid::new_v4().to_string(),
    );
    message
}

fn set_header(message: &mut NewMessage, name: &str, value: &str) {
    message.headers.retain(|(other, _)| other != name);
    message.headers.push((name.to_owned(), value.to_owned()));
}

fn header<'m>(message: &'m NewMessage, name: &str) -> &'m str {
    message
        .headers
        .iter()
        .find(|(other, _)| other == name)
        .map_or("", |(_, value)| value)
}

/// Maximum passes of a point before a host dies there, so that it does not always die at the first.
pub fn passes_until_death(point: &str) -> u64 {
    match point {
        fault::MIGRATING | fault::STARTED | fault::AFTER_PRUNE | fault::DEPLOY_SWAP => 1,
        fault::AFTER_FETCH | fault::MID_GUEST | fault::AFTER_ACK => 60,
        fault::BEFORE_REDRIVE | fault::AFTER_REDRIVE | fault::REPUBLISH => 1,
        fault::SLOT_CREATED | fault::WAL_LEFT | fault::WAL_OUTPUTS_MOVED => 1,
        fault::BEFORE_RERUN
        | fault::AFTER_COUNT
        | fault::AFTER_DEAD_LETTER
        | fault::RELAY_LEASED
        | fault::REDRIVE_READ => 2,
        _ => 12,
    }
}
