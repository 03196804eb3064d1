//! Alarms: thresholds, the steps of an alarm, and the notice of a raised or cleared one.

use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::explanation::Explanation;
use crate::model::failure_group::FailureGroup;
use crate::model::message::{Output, OutputKind};
use crate::model::schema::Time;
use crate::model::units;

/// The stream of all alarms.
pub const ALARM_STREAM: &str = "ONCELY_ALARM";

/// The subjects of [`ALARM_STREAM`].
pub const ALARM_SUBJECTS: &str = "oncely.alarm.>";

/// How long a newly created [`ALARM_STREAM`] keeps an alarm. An existing stream keeps its own
/// limit.
pub const ALARM_MAX_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A failure is new again if it returns after this long without a dead letter and with none open.
pub const NEW_FAILURE_RESET_AFTER: Duration = Duration::from_secs(60 * 60);

/// The window in which new failures count against [`Thresholds::new_failures`].
pub const NEW_FAILURES_WINDOW: Duration = Duration::from_secs(60 * 60);

/// The subject of an alarm. [`Kind::as_str`] is its public name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "AlarmKind")]
pub enum Kind {
    /// Too many dead letters are open.
    DeadLetters,
    /// A dead letter has been open for too long.
    DeadLetterAge,
    /// A message has waited on the stream for too long.
    UnhandledAge,
    /// A committed output has been unpublished for too long.
    UnpublishedAge,
    /// Outputs are parked until an operator decides.
    Parked,
    /// A stream already held other messages under the ids of outputs. The outputs were published
    /// under other ids.
    IdTaken,
    /// The database and NATS disagree: one of them was restored to an earlier time.
    Restored,
    /// A deployed worker does not run, or receives no messages.
    CannotRun,
    /// An operator paused the worker.
    Paused,
    /// The database accepts no writes. A host raises this alarm for itself, without the database.
    Database,
    /// Messages fail in a way that is new for their worker.
    NewFailure,
}

/// Stands for the worker's name in alarms of a host itself. No worker can have this name.
pub const HOST: &str = "_host";

/// `[worker.alarm]`: the thresholds of a worker's alarms. A threshold of zero disables its alarm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(rename = "AlarmThresholds")]
pub struct Thresholds {
    /// Open dead letters.
    pub dead_letters: u32,
    /// Age of the oldest open dead letter.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub dead_letter_age: Duration,
    /// Age of the oldest unsettled message on the stream.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub unhandled_age: Duration,
    /// Age of the oldest output that is due and unpublished.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub unpublished_age: Duration,
    /// Parked outputs.
    pub parked: u32,
    /// Outputs in the outbox whose ids were taken.
    pub id_taken: u32,
    /// The most new failures that raise an alarm within an hour. Further ones raise none.
    pub new_failures: u32,
    /// How long a value must stay at half of its threshold or below before the alarm is cleared.
    #[serde(with = "units::duration")]
    #[schemars(with = "String")]
    pub clear_after: Duration,
}

impl Default for Thresholds {
    fn default() -> Self {
        Thresholds {
            dead_letters: 100,
            dead_letter_age: Duration::from_secs(24 * 60 * 60),
            unhandled_age: Duration::from_secs(5 * 60),
            unpublished_age: Duration::from_secs(60),
            parked: 1,
            id_taken: 1,
            new_failures: 20,
            clear_after: Duration::from_secs(60),
        }
    }
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 11] = [
        Kind::DeadLetters,
        Kind::DeadLetterAge,
        Kind::UnhandledAge,
        Kind::UnpublishedAge,
        Kind::Parked,
        Kind::IdTaken,
        Kind::Restored,
        Kind::CannotRun,
        Kind::Paused,
        Kind::Database,
        Kind::NewFailure,
    ];

    /// The name in `oncely status`, in messages and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::DeadLetters => "dead-letters",
            Kind::DeadLetterAge => "dead-letter-age",
            Kind::UnhandledAge => "unhandled-age",
            Kind::UnpublishedAge => "unpublished-age",
            Kind::Parked => "parked",
            Kind::IdTaken => "id-taken",
            Kind::Restored => "restored",
            Kind::CannotRun => "cannot-run",
            Kind::Paused => "paused",
            Kind::Database => "database",
            Kind::NewFailure => "new-failure",
        }
    }

    /// The condition of the alarm, and the reaction to it.
    pub fn explanation(self) -> Explanation {
        let (meaning, action) = match self {
            Kind::DeadLetters => (
                "Too many dead letters of a worker are open.",
                "`oncely dlq list --groups` groups them; fix the largest group and redrive it.",
            ),
            Kind::DeadLetterAge => (
                "A dead letter has been open for too long.",
                "Redrive, resolve or drop it: `oncely dlq list`.",
            ),
            Kind::UnhandledAge => (
                "A message has waited on the stream for too long.",
                "Check `oncely status` for stopped hosts, slow handlers and retries.",
            ),
            Kind::UnpublishedAge => (
                "A committed output has been unpublished for too long.",
                "Check the NATS server and its streams: `oncely outbox list --unpublished`.",
            ),
            Kind::Parked => (
                "Outputs are parked until an operator decides. Each blocks its key.",
                "`oncely outbox list` has the reasons; fix them, then retry or drop the outputs.",
            ),
            Kind::IdTaken => (
                "A stream already held other messages under the ids of outputs.",
                "Find the publisher that uses these ids; the outputs have other ids now.",
            ),
            Kind::Restored => (
                "The database and NATS disagree: one of them was restored to an earlier time.",
                "Follow the guide to restores, and run `oncely recover`.",
            ),
            Kind::CannotRun => (
                "A deployed worker does not run, or receives no messages.",
                "The text of the alarm has the reason; `oncely workers` shows it, too.",
            ),
            Kind::Paused => (
                "An operator paused the worker. Its messages wait, its requests are refused.",
                "`oncely resume WORKER` ends the pause; the text of the alarm has its reason.",
            ),
            Kind::Database => (
                "The database accepts no writes of a host.",
                "Check disk space, read-only mode and standbys of the database.",
            ),
            Kind::NewFailure => (
                "Messages fail in a way that is new for their worker.",
                "`oncely dlq list` shows the failure; a recent deployment is a likely cause.",
            ),
        };
        Explanation {
            code: self.as_str(),
            meaning,
            action,
        }
    }

    /// The kind with this name.
    pub fn parse(text: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    /// The unit of the alarm's value.
    pub fn unit(self) -> &'static str {
        match self {
            Kind::DeadLetters | Kind::NewFailure => "dead_letters",
            Kind::Parked | Kind::IdTaken => "outputs",
            Kind::Restored | Kind::CannotRun | Kind::Paused | Kind::Database => "hosts",
            Kind::DeadLetterAge | Kind::UnhandledAge | Kind::UnpublishedAge => "ms",
        }
    }

    /// Formats a value for display. Times of 10 s and more are rounded down to whole seconds.
    pub fn format_value(self, value: u64) -> String {
        match self.unit() {
            "ms" => units::format_duration(Duration::from_millis(
                value - value % if value >= 10_000 { 1_000 } else { 1 },
            )),
            _ => value.to_string(),
        }
    }

    /// The command or check that shows more about the alarm.
    fn hint(self, worker: &str, group: Option<&FailureGroup>) -> String {
        match (self, group) {
            (Kind::NewFailure, Some(group)) => format!("oncely dlq list --group {}", group.id),
            (Kind::DeadLetters | Kind::DeadLetterAge | Kind::NewFailure, _) => {
                format!("oncely dlq list --groups --worker {worker}")
            }
            (Kind::UnhandledAge | Kind::UnpublishedAge | Kind::CannotRun | Kind::Database, _) => {
                "oncely status".to_owned()
            }
            (Kind::IdTaken, _) => {
                "search the logs for `id taken`, and check which clients may publish to that stream"
                    .to_owned()
            }
            (Kind::Restored, _) => "oncely recover --dry-run".to_owned(),
            (Kind::Paused, _) => format!("oncely resume {worker}"),
            (Kind::Parked, _) => format!("oncely outbox list --worker {worker}"),
        }
    }
}

impl Thresholds {
    /// The value that raises an alarm of this kind: a count or milliseconds. Zero disables it.
    pub fn threshold(&self, kind: Kind) -> u64 {
        match kind {
            Kind::DeadLetters => self.dead_letters.into(),
            Kind::DeadLetterAge => units::milliseconds(self.dead_letter_age),
            Kind::UnhandledAge => units::milliseconds(self.unhandled_age),
            Kind::UnpublishedAge => units::milliseconds(self.unpublished_age),
            Kind::Parked => self.parked.into(),
            Kind::IdTaken => self.id_taken.into(),
            // Not configurable: a single affected host is enough.
            Kind::Restored | Kind::CannotRun | Kind::Paused | Kind::Database => 1,
            Kind::NewFailure => u64::from(self.new_failures > 0),
        }
    }
}

/// An alarm as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Alarm {
    /// The name of the worker, or [`HOST`] for an alarm of a host itself.
    pub worker: String,
    /// The condition that raises it.
    pub kind: Kind,
    /// The new failure; none for other kinds.
    pub group: Option<FailureGroup>,
    /// Number of times that it was raised so far.
    pub times: u32,
    /// The value measured when it was raised, in the unit of the threshold: a count or
    /// milliseconds.
    pub value: u64,
    /// The threshold that `value` reached, in the same unit.
    pub threshold: u64,
    /// When it was last raised.
    #[schemars(with = "Time")]
    pub raised_at: Timestamp,
    /// None while it is raised.
    #[schemars(with = "Option<Time>")]
    pub cleared_at: Option<Timestamp>,
    /// How long the value has been low enough to clear it, in milliseconds. None if it is not.
    pub recovering_ms: Option<u64>,
    /// For a new failure: its dead letters that are open or redriven now.
    pub open_dead_letters: u64,
}

impl Alarm {
    /// Whether it has not been cleared since it was last raised.
    pub fn is_raised(&self) -> bool {
        self.cleared_at.is_none()
    }

    /// The command or check that shows more about it.
    pub fn command(&self) -> String {
        self.kind.hint(&self.worker, self.group.as_ref())
    }

    /// The sort key among the alarms of all workers.
    pub fn key(&self) -> (&str, Kind, &str) {
        (
            &self.worker,
            self.kind,
            self.group.as_ref().map_or("", |group| &group.id),
        )
    }
}

/// The step that follows from a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlarmStep {
    /// The value reached the threshold.
    Raise,
    /// The value is low enough as of now.
    Recover,
    /// The value was low enough and no longer is.
    Relapse,
    /// The value has been low enough for long enough.
    Clear,
}

/// The next step of an alarm, from its stored state, if any, and a measured `value`. None if
/// nothing changes, for example because the value could not be measured.
///
/// An alarm is raised at the threshold. It is cleared once the value has stayed at half of the
/// threshold or below for `clear_after`. A value that flaps around the threshold is thus one alarm.
pub fn next_step(
    existing: Option<&Alarm>,
    value: Option<u64>,
    threshold: u64,
    clear_after: Duration,
) -> Option<AlarmStep> {
    let raised = existing.filter(|alarm| alarm.is_raised());
    if threshold == 0 {
        return raised.map(|_| AlarmStep::Clear);
    }
    let value = value?;
    let Some(alarm) = raised else {
        return (value >= threshold).then_some(AlarmStep::Raise);
    };
    match (value <= threshold / 2, alarm.recovering_ms) {
        (true, Some(recovering_ms)) => {
            (u128::from(recovering_ms) >= clear_after.as_millis()).then_some(AlarmStep::Clear)
        }
        (true, None) if clear_after.is_zero() => Some(AlarmStep::Clear),
        (true, None) => Some(AlarmStep::Recover),
        (false, Some(_)) => Some(AlarmStep::Relapse),
        (false, None) => None,
    }
}

/// One step of one alarm, applied only if the alarm is unchanged since it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlarmUpdate {
    /// The name of the worker, or [`HOST`] for an alarm of a host itself.
    pub worker: String,
    /// The condition that the alarm is about.
    pub kind: Kind,
    /// The new failure; none for other kinds.
    pub group: Option<FailureGroup>,
    /// `times` of the alarm when it was read; 0 if it was never raised.
    pub times: u32,
    /// The step to apply.
    pub step: AlarmStep,
    /// The measured value, in the unit of the threshold.
    pub value: u64,
    /// The threshold at the time of the measurement: a count or milliseconds.
    pub threshold: u64,
    /// The cause, where the kind does not imply it.
    pub why: Option<String>,
}

/// An alarm that was just raised or cleared, to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The name of the worker, or [`HOST`] for an alarm of a host itself.
    pub worker: String,
    /// The condition that raised it.
    pub kind: Kind,
    /// The new failure; none for other kinds.
    pub group: Option<FailureGroup>,
    /// Number of times that it was raised, this one included.
    pub times: u32,
    /// The current measured value.
    pub value: u64,
    /// The threshold, in the unit of [`Kind::unit`].
    pub threshold: u64,
    /// When it was raised; for a cleared alarm, the last time.
    pub raised_at: Timestamp,
    /// None if it was raised.
    pub cleared_at: Option<Timestamp>,
    /// The cause, where the kind does not imply it.
    pub why: Option<String>,
}

/// The JSON body of an alarm message.
#[derive(Debug, Serialize)]
struct Body<'n> {
    id: &'n str,
    worker: &'n str,
    alarm: Kind,
    state: &'static str,
    times: u32,
    value: u64,
    threshold: u64,
    unit: &'static str,
    raised_at: Timestamp,
    cleared_at: Option<Timestamp>,
    text: String,
    hint: String,
    group: Option<&'n FailureGroup>,
}

impl Notice {
    /// The alarm for a database that accepts no writes of this host.
    pub fn database_unavailable(host: &str, why: &str) -> Notice {
        Notice {
            worker: HOST.to_owned(),
            kind: Kind::Database,
            group: None,
            // Random, because no counter can be stored without the database.
            times: rand::random(),
            value: 1,
            threshold: 1,
            raised_at: Timestamp::now(),
            cleared_at: None,
            why: Some(format!("on {host}: {why}")),
        }
    }

    /// The same alarm, cleared now.
    #[must_use]
    pub fn cleared(self) -> Notice {
        Notice {
            value: 0,
            cleared_at: Some(Timestamp::now()),
            ..self
        }
    }

    /// Whether the notice is about a raised alarm, not about a cleared one.
    pub fn is_raised(&self) -> bool {
        self.cleared_at.is_none()
    }

    /// `raised` or `cleared`.
    pub fn state(&self) -> &'static str {
        if self.is_raised() {
            "raised"
        } else {
            "cleared"
        }
    }

    /// The readable id of the alarm message and of the webhook request. A change has the same id on
    /// every host.
    pub fn id(&self) -> String {
        let group = self
            .group
            .as_ref()
            .map(|group| format!(":{}", group.id))
            .unwrap_or_default();
        format!(
            "alarm:{}:{}{group}:{}:{}",
            self.worker,
            self.kind.as_str(),
            self.times,
            self.state()
        )
    }

    /// One sentence for an operator.
    pub fn text(&self) -> String {
        let worker = &self.worker;
        let (value, threshold) = (
            self.kind.format_value(self.value),
            self.kind.format_value(self.threshold),
        );
        if let Some(cleared_at) = self.cleared_at {
            let lasted = cleared_at
                .duration_since(self.raised_at)
                .max(SignedDuration::ZERO);
            let lasted =
                units::format_duration(Duration::from_secs(lasted.as_secs().unsigned_abs()));
            let whose = if worker == HOST {
                "the host".to_owned()
            } else {
                format!("worker {worker}")
            };
            return format!(
                "{whose}: alarm `{}` cleared after {lasted}",
                self.kind.as_str()
            );
        }
        match self.kind {
            Kind::DeadLetters => {
                format!(
                    "worker {worker} has {value} open dead letters; the threshold is {threshold}"
                )
            }
            Kind::DeadLetterAge => {
                format!("a dead letter of worker {worker} has been open for {value}")
            }
            Kind::UnhandledAge => format!("a message for worker {worker} has waited for {value}"),
            Kind::UnpublishedAge => {
                format!("an output of worker {worker} has not been published for {value}")
            }
            Kind::Parked => {
                format!("{value} outputs of worker {worker} are parked and hold their keys")
            }
            Kind::IdTaken => format!(
                "a stream held other messages under the ids of {value} outputs of worker {worker}; \
                 these outputs were published under other ids"
            ),
            Kind::Restored => format!(
                "the database and NATS disagree, as after a restore of one of them: worker {worker} \
                 receives no messages, and its outputs are not published"
            ),
            Kind::CannotRun => format!("worker {worker} cannot run{}", self.reason_suffix()),
            Kind::Paused => format!("worker {worker} is paused{}", self.reason_suffix()),
            Kind::Database => format!("the database takes no writes{}", self.reason_suffix()),
            Kind::NewFailure => {
                let again = if self.times > 1 { " again" } else { "" };
                format!(
                    "worker {worker} dead-letters messages{again}: {}",
                    self.failure_text()
                )
            }
        }
    }

    fn reason_suffix(&self) -> String {
        self.why
            .as_ref()
            .map_or_else(String::new, |why| format!(": {why}"))
    }

    fn failure_text(&self) -> String {
        let Some(group) = &self.group else {
            return "a new failure".to_owned();
        };
        let code = group
            .code
            .as_ref()
            .map(|code| format!(" ({code})"))
            .unwrap_or_default();
        let shape = if group.shape.is_empty() {
            String::new()
        } else {
            format!(": {}", group.shape)
        };
        let place = group
            .place
            .as_ref()
            .map(|place| format!(", at {place}"))
            .unwrap_or_default();
        format!("{}{code}{shape}{place}", group.reason)
    }

    /// The message to `oncely.alarm.{worker}`. `docs/alarms.md` describes its headers and its body.
    pub fn output(&self) -> Output {
        let id = self.id();
        let body = Body {
            id: &id,
            worker: &self.worker,
            alarm: self.kind,
            state: self.state(),
            times: self.times,
            value: self.value,
            threshold: self.threshold,
            unit: self.kind.unit(),
            raised_at: self.raised_at,
            cleared_at: self.cleared_at,
            text: self.text(),
            hint: self.kind.hint(&self.worker, self.group.as_ref()),
            group: self.group.as_ref(),
        };
        // Serialization cannot fail: the body holds text, numbers and times only.
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let headers = [
            ("Content-Type", "application/json"),
            ("Oncely-Worker", &self.worker),
            ("Oncely-Alarm", self.kind.as_str()),
            ("Oncely-State", self.state()),
        ];
        Output {
            kind: OutputKind::Alarm,
            event_id: id.clone(),
            id,
            ordinal: 0,
            subject: format!("oncely.alarm.{}", self.worker),
            headers: headers
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .to_vec(),
            body: Bytes::from(body),
            // One key per worker keeps its alarms in order.
            ordering_key: Some(ALARM_ORDERING_KEY.to_owned()),
            delay: Duration::ZERO,
        }
    }
}

/// Logs a raised or cleared alarm.
pub fn log(notice: &Notice) {
    let (worker, alarm, group) = (
        &notice.worker,
        notice.kind.as_str(),
        notice.group.as_ref().map(|group| &group.id),
    );
    match notice.is_raised() {
        // A new failure is worth a log line, but it does not need an operator at once.
        true if notice.kind == Kind::NewFailure => {
            tracing::warn!(worker, alarm, group, text = notice.text(), "alarm raised")
        }
        true => tracing::error!(worker, alarm, group, text = notice.text(), "alarm raised"),
        false => tracing::info!(worker, alarm, group, text = notice.text(), "alarm cleared"),
    }
}

/// The ordering key of a worker's alarms. An alarm is never published as cleared before it is
/// published as raised.
const ALARM_ORDERING_KEY: &str = "oncely.alarm";

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm(raised: bool, recovering_ms: Option<u64>) -> Alarm {
        Alarm {
            worker: "settle".to_owned(),
            kind: Kind::DeadLetters,
            group: None,
            times: 1,
            value: 100,
            threshold: 100,
            raised_at: Timestamp::UNIX_EPOCH,
            cleared_at: (!raised).then_some(Timestamp::UNIX_EPOCH),
            recovering_ms,
            open_dead_letters: 0,
        }
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn an_alarm_is_raised_at_its_threshold_and_cleared_at_half() {
        let (over, up) = (alarm(false, None), alarm(true, None));
        assert_eq!(next_step(None, Some(99), 100, MINUTE), None);
        assert_eq!(
            next_step(None, Some(100), 100, MINUTE),
            Some(AlarmStep::Raise)
        );
        assert_eq!(
            next_step(Some(&over), Some(100), 100, MINUTE),
            Some(AlarmStep::Raise)
        );
        assert_eq!(next_step(Some(&up), Some(100), 100, MINUTE), None);
        assert_eq!(next_step(Some(&up), Some(51), 100, MINUTE), None);
        assert_eq!(
            next_step(Some(&up), Some(50), 100, MINUTE),
            Some(AlarmStep::Recover)
        );
        assert_eq!(
            next_step(Some(&alarm(true, Some(59_999))), Some(0), 100, MINUTE),
            None
        );
        assert_eq!(
            next_step(Some(&alarm(true, Some(59_999))), Some(51), 100, MINUTE),
            Some(AlarmStep::Relapse)
        );
        assert_eq!(
            next_step(Some(&alarm(true, Some(60_000))), Some(0), 100, MINUTE),
            Some(AlarmStep::Clear)
        );
        assert_eq!(
            next_step(Some(&up), Some(0), 100, Duration::ZERO),
            Some(AlarmStep::Clear)
        );
    }

    #[test]
    fn an_unmeasured_alarm_is_unchanged_and_a_disabled_one_is_cleared() {
        let up = alarm(true, Some(60_000));
        assert_eq!(next_step(Some(&up), None, 100, MINUTE), None);
        assert_eq!(next_step(None, None, 100, MINUTE), None);
        assert_eq!(
            next_step(Some(&up), None, 0, MINUTE),
            Some(AlarmStep::Clear)
        );
        assert_eq!(next_step(None, Some(1_000), 0, MINUTE), None);
    }

    #[test]
    fn a_value_that_flaps_around_the_threshold_raises_one_alarm() {
        let mut existing: Option<Alarm> = None;
        let (mut raised, mut cleared) = (0, 0);
        for second in 0..1_000_u64 {
            let value = if second % 7 < 3 { 101 } else { 45 };
            match next_step(existing.as_ref(), Some(value), 100, MINUTE) {
                Some(AlarmStep::Raise) => {
                    (raised, existing) = (raised + 1, Some(alarm(true, None)))
                }
                Some(AlarmStep::Recover) => existing = Some(alarm(true, Some(0))),
                Some(AlarmStep::Relapse) => existing = Some(alarm(true, None)),
                Some(AlarmStep::Clear) => {
                    (cleared, existing) = (cleared + 1, Some(alarm(false, None)))
                }
                None => {
                    let recovering_ms = existing
                        .as_ref()
                        .and_then(|alarm| alarm.recovering_ms)
                        .map(|recovering_ms| recovering_ms + 1_000);
                    existing = existing.map(|alarm| Alarm {
                        recovering_ms,
                        ..alarm
                    });
                }
            }
        }
        assert_eq!((raised, cleared), (1, 0));
    }

    #[test]
    fn an_alarm_notice_has_a_text_and_a_hint() {
        let notice = Notice {
            worker: "settle".to_owned(),
            kind: Kind::UnpublishedAge,
            group: None,
            times: 3,
            value: 61_250,
            threshold: 60_000,
            raised_at: Timestamp::UNIX_EPOCH,
            cleared_at: None,
            why: None,
        };
        let output = notice.output();
        assert_eq!(
            (output.id.as_str(), output.subject.as_str()),
            (
                "alarm:settle:unpublished-age:3:raised",
                "oncely.alarm.settle"
            )
        );
        let body: serde_json::Value = serde_json::from_slice(&output.body).unwrap();
        assert_eq!(
            body["text"],
            "an output of worker settle has not been published for 1m 1s"
        );
        assert_eq!(
            (&body["alarm"], &body["state"], &body["value"]),
            (&"unpublished-age".into(), &"raised".into(), &61_250.into())
        );
        let over = Notice {
            cleared_at: Some("1970-01-01T02:00:00Z".parse().unwrap()),
            ..notice
        };
        assert_eq!(over.id(), "alarm:settle:unpublished-age:3:cleared");
        assert_eq!(
            over.text(),
            "worker settle: alarm `unpublished-age` cleared after 2h"
        );
    }
}
