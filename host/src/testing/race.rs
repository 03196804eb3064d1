//! Pairs of messages in both orders. Where the effects differ, an ordering key is missing.

use anyhow::Result;
use serde_json::Value;

use super::case::{Case, Delivered, Input};
use super::effects::Effects;
use super::runner::{Fault, Runner};
use crate::config::manifest::Worker;
use crate::model::message::Message;
use crate::model::subject;

/// A message of a case.
#[derive(Clone, Copy)]
pub struct Racer<'c> {
    pub case: &'c Case,
    pub delivery: &'c Delivered,
}

impl Racer<'_> {
    fn name(&self) -> String {
        let id = &self.delivery.message.event_id;
        format!("message {id} of `{}`", self.case.name)
    }
}

/// A pair of messages whose effects depend on their order.
#[derive(Debug)]
pub struct Race {
    /// Their names: the case and the event id.
    pub messages: [String; 2],
    /// The lines that differ between the two orders.
    pub text: String,
    /// What to do.
    pub hint: String,
}

/// The outcome of all pairs.
#[derive(Debug, Default)]
pub struct Raced {
    /// The number of pairs that ran in both orders.
    pub pairs: usize,
    /// The number of pairs that the ordering key of the worker keeps in order.
    pub ordered: usize,
    pub races: Vec<Race>,
}

/// Runs each pair of messages in both orders.
///
/// # Errors
/// The database fails.
pub async fn race(runner: &Runner, racers: &[Racer<'_>]) -> Result<Raced> {
    let mut raced = Raced::default();
    for (at, one) in racers.iter().enumerate() {
        for other in racers.iter().skip(at + 1) {
            if have_common_key(&runner.worker, one, other) {
                raced.ordered += 1;
                continue;
            }
            let Some((forward, backward)) = run_both(runner, one, other).await else {
                continue;
            };
            raced.pairs += 1;
            if let Some(text) = forward.difference(&backward) {
                raced.races.push(Race {
                    messages: [one.name(), other.name()],
                    text,
                    hint: hint(
                        &runner.worker,
                        &one.delivery.message,
                        &other.delivery.message,
                    ),
                });
            }
        }
    }
    Ok(raced)
}

fn have_common_key(worker: &Worker, one: &Racer<'_>, other: &Racer<'_>) -> bool {
    let key = |racer: &Racer<'_>| {
        worker
            .ordering_key
            .as_ref()?
            .key_of(&racer.delivery.message)
    };
    key(one).is_some_and(|one| key(other) == Some(one))
}

/// The effects in both orders; none if the two cases cannot be given together.
async fn run_both(
    runner: &Runner,
    one: &Racer<'_>,
    other: &Racer<'_>,
) -> Option<(Effects, Effects)> {
    let given = [&one.case.given, &other.case.given];
    let given = if std::ptr::eq(one.case, other.case) {
        &given[..1]
    } else {
        &given[..]
    };
    let now = one.case.now.or(other.case.now);
    let (first, second) = (with_id(one.delivery, "a"), with_id(other.delivery, "b"));
    let run = async |pair: [&Delivered; 2]| {
        let pair = pair.map(|delivery| Input::Message(delivery.clone()));
        let run = runner.run(given, now, &pair, Fault::None).await.ok()?;
        Some(run.effects)
    };
    let mut forward = run([&first, &second]).await?;
    // Values that differ between equal runs, such as times, do not depend on the order.
    forward.generalize(&run([&first, &second]).await?);
    let mut backward = run([&second, &first]).await?;
    if let Some(results) = &mut backward.results {
        results.reverse();
    }
    for effects in [&mut forward, &mut backward] {
        if let Some(outputs) = &mut effects.outputs {
            outputs.sort_by_key(Value::to_string);
        }
    }
    Some((forward, backward))
}

/// Two cases often use the same event id.
fn with_id(delivery: &Delivered, prefix: &str) -> Delivered {
    let mut message = Message::clone(&delivery.message);
    message.event_id = format!("{prefix}-{}", message.event_id);
    Delivered {
        message: message.into(),
        attempt: delivery.attempt,
    }
}

/// Names the ordering key that is missing: a value that both messages have.
fn hint(worker: &Worker, one: &Message, other: &Message) -> String {
    let name = &worker.name;
    let is_common = |(name, value): &&(String, String)| other.header(name) == Some(value);
    if let Some((header, _)) = one.headers.iter().find(is_common) {
        return format!("set ordering_key = \"header:{header}\" for worker {name}");
    }
    if let Some(token) = common_token(worker, one, other) {
        return format!("set ordering_key = \"subject:{token}\" for worker {name}");
    }
    match common_field(one, other) {
        Some((field, value)) => format!(
            "both bodies have {field} = {value}: publish it in a header, for example Key, and set \
             ordering_key = \"header:Key\" for worker {name}"
        ),
        None => format!(
            "publish both messages with a header that names their row, for example Key, and set \
             ordering_key = \"header:Key\" for worker {name}"
        ),
    }
}

/// The last token that both subjects have in place of a wildcard, counted from 1.
fn common_token(worker: &Worker, one: &Message, other: &Message) -> Option<usize> {
    let pattern = worker
        .subjects
        .iter()
        .find(|pattern| subject::matches(pattern, &one.subject))?;
    let mut wildcards = pattern.split('.').map(|token| token == "*" || token == ">");
    let mut is_after_last = false;
    let tokens = one.subject.split('.').zip(other.subject.split('.'));
    let common = tokens.zip(1..).filter(|((one, other), _)| {
        let is_wildcard = wildcards.next().unwrap_or(is_after_last);
        is_after_last = is_wildcard;
        is_wildcard && one == other
    });
    common.last().map(|(_, token)| token)
}

/// A field of both bodies with the same text or number.
fn common_field(one: &Message, other: &Message) -> Option<(String, Value)> {
    let body = |message: &Message| serde_json::from_slice::<Value>(&message.body).ok();
    let (one, other) = (body(one)?, body(other)?);
    let fields = one.as_object()?.iter();
    fields
        .filter(|(_, value)| value.is_string() || value.is_number())
        .find(|(name, value)| other.get(name.as_str()) == Some(value))
        .map(|(name, value)| (name.clone(), value.clone()))
}
