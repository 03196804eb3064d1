//! The checker: rules that hold after every fault of the host, its database and its broker.
//!
//! The published messages are read from the input stream itself. The nature of each stored message
//! determines the expected result of its event. Where two bodies share an event id, the inbox shows
//! which one came first.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use oncely::model::message::{Headers, Message, event_id, output_id};
use serde_json::Value;
use support::nats::Stored;

use crate::observed::{Effect, Observed};
use crate::workload::Nature;

/// A violation of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    pub rule: &'static str,
    pub what: String,
}

/// Counts made during the checks.
#[derive(Debug, Default, serde::Serialize)]
pub struct Counted {
    /// Messages on the input stream.
    pub inputs: usize,
    /// Distinct event ids among them.
    pub events: usize,
    pub effects: usize,
    pub dead_letters: usize,
    /// Redriven dead letters with an effect.
    pub redriven: usize,
    pub id_reuses: usize,
    pub outputs: usize,
    /// Copies beyond the first of each event id and body.
    pub copies: usize,
    pub counted_attempts: usize,
    /// Timed-out attempts of messages that never fail.
    pub timeouts_of_plain_messages: usize,
    /// Events dead-lettered because hosts died while handling them alone.
    pub crashed_host: usize,
    /// Events dead-lettered because they trapped twice in exactly the same way.
    pub deterministic_failures: usize,
    /// Alarm changes on their stream.
    pub alarms_published: usize,
    /// Outputs of a key with a lower sequence than an earlier output of the key on the stream.
    pub out_of_order: usize,
}

/// The dead-letter reason for messages that crashed hosts.
const CRASHED_HOST: &str = "crashed-host";

/// The dead-letter reason for a handler that trapped twice after identical host calls and results.
const DETERMINISTIC_FAILURE: &str = "deterministic-failure";

/// The name of the worker.
const WORKER: &str = "test";

/// The attempts that its manifest allows.
pub const ATTEMPTS: i64 = 4;

/// Checks all rules.
pub fn check(observed: &Observed) -> (Counted, Vec<Violation>) {
    let mut checker = Checker {
        observed,
        counted: Counted::default(),
        violations: Vec::new(),
    };
    let events = checker.events();
    checker.ledger();
    checker.acked();
    for (id, event) in &events {
        checker.event(id, event);
    }
    checker.only_published_events(&events);
    checker.dead_letters(&events);
    checker.outputs(&events);
    checker.order();
    checker.state(&events);
    checker.alarms();
    checker.settled_and_visible();
    checker.count(&events);
    (checker.counted, checker.violations)
}

/// All messages published under one event id.
#[derive(Debug, Default)]
struct Event {
    /// By payload (hex).
    bodies: BTreeMap<String, Body>,
}

#[derive(Debug)]
struct Body {
    nature: Nature,
    bytes: Vec<u8>,
    options: Value,
    copies: usize,
}

impl Body {
    fn number(&self, name: &str) -> i64 {
        self.options
            .get(name)
            .and_then(Value::as_i64)
            .unwrap_or_default()
    }

    fn text(&self, name: &str) -> &str {
        self.options
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }
}

struct Checker<'o> {
    observed: &'o Observed,
    counted: Counted,
    violations: Vec<Violation>,
}

impl Checker<'_> {
    fn fail(&mut self, rule: &'static str, what: String) {
        self.violations.push(Violation { rule, what });
    }

    /// The messages of the input stream, by event id.
    fn events(&mut self) -> BTreeMap<String, Event> {
        let mut events: BTreeMap<String, Event> = BTreeMap::new();
        for stored in &self.observed.inputs {
            let headers: Headers = stored
                .headers
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
            let id = event_id(&headers, None, "IN", stored.stored_at, stored.sequence);
            let id = id.unwrap_or_else(|invalid| invalid.fallback_id);
            let Some(nature) = stored
                .headers
                .get("nature")
                .and_then(|nature| Nature::from_header(nature))
            else {
                self.fail("inputs", format!("input {} has no nature", stored.sequence));
                continue;
            };
            let body = Body {
                nature,
                bytes: stored.body.clone(),
                options: serde_json::from_slice(&stored.body).unwrap_or_default(),
                copies: 0,
            };
            events
                .entry(id)
                .or_default()
                .bodies
                .entry(payload(stored))
                .or_insert(body)
                .copies += 1;
        }
        events
    }

    /// Every transfer sums to zero, and balances match the transfers.
    fn ledger(&mut self) {
        let mut balances: BTreeMap<&str, i64> = BTreeMap::new();
        let mut sum = 0;
        for effect in self.observed.effects.values().flatten() {
            *balances.entry(&effect.account).or_default() += effect.delta;
            sum += effect.delta;
        }
        if sum != 0 {
            self.fail("ledger", format!("all effects sum to {sum}"));
        }
        for (account, amount) in &self.observed.balances {
            let moved = balances.remove(account.as_str()).unwrap_or_default();
            if moved != *amount {
                self.fail(
                    "ledger",
                    format!("account {account} has {amount}, its effects sum to {moved}"),
                );
            }
        }
        for (account, moved) in balances {
            self.fail(
                "ledger",
                format!("account {account} has no balance, its effects sum to {moved}"),
            );
        }
    }

    /// Every input that the broker acknowledged is on the stream.
    fn acked(&mut self) {
        let stored: HashMap<u64, &Stored> = self
            .observed
            .inputs
            .iter()
            .map(|stored| (stored.sequence, stored))
            .collect();
        for (sequence, body) in &self.observed.acked {
            if stored
                .get(sequence)
                .is_none_or(|stored| stored.body != *body)
            {
                self.fail(
                    "inputs",
                    format!("input {sequence} was acknowledged but is not on the stream"),
                );
            }
        }
    }

    /// Each event has its effect exactly once, or is dead: never both, never neither.
    fn event(&mut self, id: &str, event: &Event) {
        let Some((state, payload)) = self.observed.inbox.get(id) else {
            return self.fail(
                "effect once",
                format!("event {id} has neither an effect nor a dead letter"),
            );
        };

        // The substitute id of an event without a usable id is unique to one body.
        let Some(first) = event.bodies.get(payload) else {
            return self.fail(
                "effect once",
                format!("the inbox holds event {id} for a body that was never published"),
            );
        };
        let effects = self
            .observed
            .effects
            .get(id)
            .map(Vec::as_slice)
            .unwrap_or_default();
        match (first.nature.death(), state.as_str()) {
            (None, "done") => self.effect(id, first, effects),
            (Some(_), "dead") => {
                if !effects.is_empty() {
                    self.fail(
                        "effect once",
                        format!("event {id} is dead and has {} rows", effects.len()),
                    );
                }
            }
            // A message that is in flight during enough host deaths is suspected of causing them.
            (None, "dead") if effects.is_empty() && self.died_of(CRASHED_HOST, id, payload) => {}
            (_, state) => self.fail(
                "effect once",
                format!("event {id} ({:?}) is {state}", first.nature),
            ),
        }
        self.attempts(id, event, first, state == "done");
    }

    fn died_of(&self, reason: &str, id: &str, payload: &str) -> bool {
        let dead_letters = &self.observed.dead_letters;
        dead_letters.iter().any(|dead_letter| {
            dead_letter.event_id == id
                && dead_letter.payload == payload
                && dead_letter.reason == reason
        })
    }

    fn effect(&mut self, id: &str, first: &Body, effects: &[Effect]) {
        let nonces: BTreeSet<&str> = effects.iter().map(|effect| effect.nonce.as_str()).collect();
        if effects.len() != 2 || nonces.len() != 1 {
            let (rows, attempts) = (effects.len(), nonces.len());
            return self.fail(
                "effect once",
                format!("event {id} has {rows} rows of {attempts} attempts"),
            );
        }
        let mut found: Vec<(&str, i64)> = effects
            .iter()
            .map(|effect| (effect.account.as_str(), effect.delta))
            .collect();
        let delta = first.number("delta");
        let mut wanted = vec![(first.text("from"), -delta), (first.text("to"), delta)];
        found.sort_unstable();
        wanted.sort_unstable();
        if found != wanted {
            self.fail(
                "effect once",
                format!("event {id} moved {found:?} rather than {wanted:?}"),
            );
        }
    }

    /// Only failing messages have failed attempts: neighbours and outages never cost an attempt.
    /// A message that died because hosts crashed may never have come to its failure.
    fn attempts(&mut self, id: &str, event: &Event, first: &Body, is_done: bool) {
        let codes = self
            .observed
            .attempts
            .get(id)
            .map(Vec::as_slice)
            .unwrap_or_default();
        if event.bodies.values().all(|body| body.nature.never_fails()) {
            // On a busy or paused machine a guest may exceed its time limit.
            let (timeouts, others): (Vec<_>, Vec<_>) =
                codes.iter().partition(|code| is_timeout(code));
            self.counted.timeouts_of_plain_messages += timeouts.len();
            if let Some(code) = others.first() {
                self.fail(
                    "attempts",
                    format!("event {id} never fails, but was charged with `{code}`"),
                );
            }
        }
        let fails_once = matches!(first.nature, Nature::FailsOnce | Nature::FailsOnceLate);
        if is_done && fails_once && event.bodies.len() == 1 && codes.is_empty() {
            self.fail(
                "attempts",
                format!("event {id} failed once, but has no counted attempt"),
            );
        }
    }

    /// Only published events have an effect or a dead letter.
    fn only_published_events(&mut self, events: &BTreeMap<String, Event>) {
        let observed = self.observed;
        for id in observed
            .effects
            .keys()
            .filter(|id| !events.contains_key(*id))
        {
            self.fail(
                "effect once",
                format!("event {id} took effect but was never published"),
            );
        }
        for id in observed.inbox.keys().filter(|id| !events.contains_key(*id)) {
            self.fail(
                "quiet",
                format!("the inbox holds event {id}, but it was never published"),
            );
        }
    }

    /// One dead letter for each body that must die, one notice for each dead letter, with the
    /// original bytes.
    fn dead_letters(&mut self, events: &BTreeMap<String, Event>) {
        // Expected dead letters
        let mut wanted: BTreeMap<(&str, &str, &str), &Body> = BTreeMap::new();
        for (id, event) in events {
            let Some((_, held)) = self.observed.inbox.get(id) else {
                continue;
            };
            for (payload, body) in &event.bodies {
                match (payload == held, body.nature.death()) {
                    (true, _) if self.died_of(CRASHED_HOST, id, payload) => {
                        wanted.insert((id, payload, CRASHED_HOST), body)
                    }
                    (true, None) => continue,
                    // Two consecutive attempts may belong to different versions, depending on
                    // deployments.
                    (true, _)
                        if body.nature == Nature::OutOfMemory
                            && self.died_of(DETERMINISTIC_FAILURE, id, payload) =>
                    {
                        wanted.insert((id, payload, DETERMINISTIC_FAILURE), body)
                    }
                    (true, Some(reason)) => wanted.insert((id, payload, reason), body),
                    (false, _) => wanted.insert((id, payload, "id-reuse"), body),
                };
            }
        }

        // Actual dead letters
        let mut found: BTreeSet<(&str, &str, &str)> = BTreeSet::new();
        for dead_letter in &self.observed.dead_letters {
            let is_done = || {
                self.observed
                    .inbox
                    .get(&dead_letter.event_id)
                    .is_some_and(|(state, _)| state == "done")
            };
            if dead_letter.is_redriven && is_done() {
                self.counted.redriven += 1;
                continue;
            }
            let key = (
                dead_letter.event_id.as_str(),
                dead_letter.payload.as_str(),
                dead_letter.reason.as_str(),
            );
            if !wanted.contains_key(&key) || !found.insert(key) {
                self.fail(
                    "dead letters",
                    format!("event {} has an unexpected dead letter `{}`", key.0, key.2),
                );
            }
            if dead_letter.reason == DETERMINISTIC_FAILURE && dead_letter.attempts < 2 {
                self.fail(
                    "dead letters",
                    format!(
                        "event {} failed deterministically after a single attempt",
                        dead_letter.event_id
                    ),
                );
            }
            if dead_letter.reason == "attempts-exhausted" && dead_letter.attempts < ATTEMPTS {
                let (id, attempts) = (&dead_letter.event_id, dead_letter.attempts);
                self.fail(
                    "dead letters",
                    format!("event {id} died after {attempts} of {ATTEMPTS} attempts"),
                );
            }
        }
        self.counted.deterministic_failures = found
            .iter()
            .filter(|(_, _, reason)| *reason == DETERMINISTIC_FAILURE)
            .count();

        // Missing dead letters
        for key in wanted.keys().filter(|key| !found.contains(*key)) {
            self.fail(
                "dead letters",
                format!("event {} has no dead letter `{}`", key.0, key.2),
            );
        }
        self.counted.crashed_host = found
            .iter()
            .filter(|(_, _, reason)| *reason == CRASHED_HOST)
            .count();

        // One such dead letter takes two deaths. A host handles one message alone in each lane.
        let most =
            usize::try_from(self.observed.deaths * self.observed.lanes / 2).unwrap_or_default();
        if self.counted.crashed_host > most {
            let (count, deaths) = (self.counted.crashed_host, self.observed.deaths);
            self.fail(
                "dead letters",
                format!("{count} events are dead-lettered for crashed hosts, but only {deaths} hosts died"),
            );
        }
        self.notices(&wanted);
    }

    fn notices(&mut self, wanted: &BTreeMap<(&str, &str, &str), &Body>) {
        let mut missing: BTreeMap<(&str, &str), Vec<&Body>> = BTreeMap::new();
        for ((id, _, reason), body) in wanted {
            missing.entry((id, reason)).or_default().push(body);
        }

        // A redriven dead letter has a notice for each death. Only the last one has its last
        // reason.
        let redriven: BTreeSet<&str> = self.observed.redriven.iter().map(String::as_str).collect();
        let mut ids = BTreeSet::new();
        for notice in &self.observed.notices {
            let header = |name: &str| {
                notice
                    .headers
                    .get(name)
                    .map(String::as_str)
                    .unwrap_or_default()
            };
            if !ids.insert(header("Nats-Msg-Id")) {
                self.fail(
                    "dead letters",
                    format!(
                        "the notice {} is on the stream twice",
                        header("Nats-Msg-Id")
                    ),
                );
            }
            let key = (header("Oncely-Event-Id"), header("Oncely-Reason"));
            let bodies = missing.entry(key).or_default();
            match bodies.iter().position(|body| body.bytes == notice.body) {
                Some(place) => drop(bodies.remove(place)),
                None if redriven.contains(header("Oncely-Dead-Letter")) => {}
                None => self.fail(
                    "dead letters",
                    format!("the DLQ stream has an unexpected notice of event {}", key.0),
                ),
            }
        }
        for ((id, reason), bodies) in missing {
            if !bodies.is_empty() {
                self.fail(
                    "dead letters",
                    format!("the DLQ stream has no notice of event {id} (`{reason}`)"),
                );
            }
        }
    }

    /// Every output of every effect is on the stream, once by id, and comes from the committed
    /// attempt.
    fn outputs(&mut self, events: &BTreeMap<String, Event>) {
        let mut wanted: BTreeMap<String, &str> = BTreeMap::new();
        for (id, event) in events {
            let Some((state, payload)) = self.observed.inbox.get(id) else {
                continue;
            };
            if let (Some(body), "done") = (event.bodies.get(payload), state.as_str()) {
                let count = usize::try_from(body.number("n")).unwrap_or_default();
                wanted.extend(
                    (0..count).map(|ordinal| (output_id(WORKER, id, ordinal), id.as_str())),
                );
            }
        }
        let mut found = BTreeSet::new();
        for stored in &self.observed.outputs {
            let id = stored
                .headers
                .get("Oncely-Output-Id")
                .cloned()
                .unwrap_or_default();
            if !wanted.contains_key(&id) {
                self.fail(
                    "outputs",
                    format!("output {id} is on the stream, but has no effect"),
                );
            } else if !found.insert(id.clone()) {
                self.fail("outputs", format!("output {id} is on the stream twice"));
            }
            self.output(&id, stored);
        }
        for (id, event) in &wanted {
            if !found.contains(id) {
                self.fail(
                    "outputs",
                    format!("output {id} of event {event} is not on the stream"),
                );
            }
        }
        let observed = self.observed;
        for (id, count) in observed
            .outbox
            .iter()
            .filter(|(id, count)| **count != 1 || !wanted.contains_key(*id))
        {
            self.fail(
                "outputs",
                format!("output {id} was committed {count} times"),
            );
        }
    }

    /// The outputs of a key are on the stream in the order of their effects, as counted in keyed
    /// state.
    fn order(&mut self) {
        let mut highest: HashMap<String, (u64, u64)> = HashMap::new();
        for stored in &self.observed.outputs {
            let body: Value = serde_json::from_slice(&stored.body).unwrap_or_default();
            let number = |name: &str| body.get(name).and_then(Value::as_u64).unwrap_or_default();
            // A delayed output takes its place when it is due.
            if body
                .get("delayed")
                .and_then(Value::as_bool)
                .unwrap_or_default()
            {
                continue;
            }
            let key = body
                .get("key")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned();
            let place = (number("count"), number("ordinal"));
            let before = highest.insert(key.clone(), place).unwrap_or_default();
            if before > place && before.0 > 0 {
                let (sequence, before, place) = (stored.sequence, before.0, place.0);
                self.fail(
                    "order",
                    format!(
                        "output {sequence} has effect {place} of `{key}` after effect {before}"
                    ),
                );
            }
        }
    }

    fn output(&mut self, id: &str, stored: &Stored) {
        let body: Value = serde_json::from_slice(&stored.body).unwrap_or_default();
        let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
        let ordinal = body
            .get("ordinal")
            .and_then(Value::as_u64)
            .unwrap_or_default();
        let summed = format!(
            "{}/{ordinal}/{}/{}",
            text("event_id"),
            text("attempt_nonce"),
            text("padding")
        );
        if text("checksum") != format!("{:016x}", fnv(&summed)) {
            return self.fail("outputs", format!("output {id} has a wrong checksum"));
        }
        let effects = self
            .observed
            .effects
            .get(text("event_id"))
            .map(Vec::as_slice)
            .unwrap_or_default();
        if effects
            .iter()
            .any(|effect| effect.nonce != text("attempt_nonce"))
            || effects.is_empty()
        {
            self.fail(
                "outputs",
                format!("output {id} comes from an attempt that did not commit"),
            );
        }
    }

    /// Keyed state counted each effect of its key once.
    fn state(&mut self, events: &BTreeMap<String, Event>) {
        let mut wanted: BTreeMap<&str, i64> = BTreeMap::new();
        for (id, event) in events {
            if let Some((state, payload)) = self.observed.inbox.get(id)
                && state == "done"
                && let Some(body) = event.bodies.get(payload)
            {
                *wanted.entry(body.text("key")).or_default() += 1;
            }
        }
        let keys: BTreeSet<&str> = wanted
            .keys()
            .copied()
            .chain(self.observed.counters.keys().map(String::as_str))
            .collect();
        for key in keys {
            let counted = self.observed.counters.get(key).copied().unwrap_or_default();
            let effects = wanted.get(key).copied().unwrap_or_default();
            if counted != effects {
                self.fail(
                    "state",
                    format!("state `{key}` counted {counted} of {effects} effects"),
                );
            }
        }
    }

    /// Each change of an alarm is published once, and no other alarm is published.
    fn alarms(&mut self) {
        let observed = self.observed;
        for (alarm, times, is_raised) in &observed.alarms {
            for time in 1..=*times {
                let is_over = time < *times || !is_raised;
                for state in if is_over {
                    &["raised", "cleared"][..]
                } else {
                    &["raised"]
                } {
                    let id = format!("alarm:{alarm}:{time}:{state}");
                    if !observed.alarms_published.contains_key(&id) {
                        self.fail("alarms", format!("{id} was not published"));
                    }
                }
            }
        }
        for (id, count) in observed
            .alarms_published
            .iter()
            .filter(|(_, count)| **count > 1)
        {
            self.fail("alarms", format!("{id} was published {count} times"));
        }
        self.counted.alarms_published = observed.alarms_published.len();
    }

    fn settled_and_visible(&mut self) {
        let observed = self.observed;
        observed
            .unsettled
            .iter()
            .for_each(|what| self.fail("quiet", what.clone()));
        observed
            .too_early
            .iter()
            .for_each(|what| self.fail("no early visibility", what.clone()));
    }

    fn count(&mut self, events: &BTreeMap<String, Event>) {
        let observed = self.observed;
        let bodies = || events.values().flat_map(|event| event.bodies.values());
        self.counted.inputs = observed.inputs.len();
        self.counted.events = events.len();
        self.counted.effects = observed.effects.len();
        self.counted.dead_letters = observed.dead_letters.len();
        self.counted.id_reuses = observed
            .dead_letters
            .iter()
            .filter(|dead_letter| dead_letter.reason == "id-reuse")
            .count();
        self.counted.outputs = observed.outputs.len();
        self.counted.copies = bodies().map(|body| body.copies - 1).sum();
        self.counted.counted_attempts = observed.attempts.values().map(Vec::len).sum();
        let mut highest: HashMap<String, u64> = HashMap::new();
        for stored in &observed.outputs {
            let body: Value = serde_json::from_slice(&stored.body).unwrap_or_default();
            let key = body
                .get("key")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned();
            let sequence = body.get("seq").and_then(Value::as_u64).unwrap_or_default();
            let highest = highest.entry(key).or_default();
            self.counted.out_of_order += usize::from(sequence < *highest);
            *highest = sequence.max(*highest);
        }
    }
}

/// The payload hash, computed from the stored message by the inbox's rule.
fn payload(stored: &Stored) -> String {
    let message = Message {
        event_id: String::new(),
        subject: stored.subject.clone(),
        headers: Headers::new(),
        body: stored.body.clone().into(),
        origin: None,
        redriven: None,
    };
    hex::encode(message.payload_sha256())
}

fn is_timeout(code: &str) -> bool {
    code.contains("time") || code.contains("deadline")
}

fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
