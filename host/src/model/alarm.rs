//! Alarms: what raises and clears one, and the message that tells of it.

use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::model::failure_group::FailureGroup;
use crate::model::message::{Output, OutputKind};
use crate::model::units;

/// The stream all alarms go to.
pub const ALARM_STREAM: &str = "ONCELY_ALARM";

/// What that stream holds.
pub const ALARM_SUBJECTS: &str = "oncely.alarm.>";

/// How long that stream keeps an alarm, unless somebody made it otherwise.
pub const ALARM_MAX_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A failure of which no letter is open, and of which none died for so long, is new again when it comes back.
pub const NEW_FAILURE_RESET_AFTER: Duration = Duration::from_secs(60 * 60);

/// Within what time new failures are counted against [`Thresholds::new_failures`].
pub const NEW_FAILURES_WINDOW: Duration = Duration::from_secs(60 * 60);

/// What an alarm is about; `as_str` is what people see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Many dead letters are open.
    DeadLetters,
    /// A dead letter has been open for long.
    DeadLetterAge,
    /// A message has waited for long on the stream.
    UnhandledAge,
    /// An output is committed and has not been published for long.
    UnpublishedAge,
    /// Outputs wait for a person.
    Parked,
    /// A stream held messages of others under the ids of outputs, which were published under other ids.
    IdTaken,
    /// Database and broker disagree: one of them was restored to an earlier time.
    Restored,
    /// A worker that is deployed does not run, or gets no messages.
    CannotRun,
    /// The database takes no writes. This one is a host's own, and told around the database.
    Database,
    /// Messages die of something they did not die of before.
    NewFailure,
}

/// In the place of a worker's name in alarms of a host itself. No worker can have this name.
pub const HOST: &str = "_host";

/// `[worker.alarm]`: what raises an alarm. Each of these is off when it is zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Thresholds {
    /// Open dead letters.
    pub dead_letters: u32,
    /// Age of the oldest open dead letter.
    #[serde(with = "units::duration")]
    pub dead_letter_age: Duration,
    /// Age of the oldest message on the stream that is not settled.
    #[serde(with = "units::duration")]
    pub unhandled_age: Duration,
    /// Age of the oldest output that is due and not published.
    #[serde(with = "units::duration")]
    pub unpublished_age: Duration,
    /// Outputs that are set aside.
    pub parked: u32,
    /// Outputs whose ids were taken, of those in the outbox.
    pub id_taken: u32,
    /// How many new failures raise an alarm within an hour; those beyond do not.
    pub new_failures: u32,
    /// How long a value stays at half of its threshold or below before the alarm is cleared.
    #[serde(with = "units::duration")]
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
    pub const ALL: [Kind; 10] = [
        Kind::DeadLetters,
        Kind::DeadLetterAge,
        Kind::UnhandledAge,
        Kind::UnpublishedAge,
        Kind::Parked,
        Kind::IdTaken,
        Kind::Restored,
        Kind::CannotRun,
        Kind::Database,
        Kind::NewFailure,
    ];

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
            Kind::Database => "database",
            Kind::NewFailure => "new-failure",
        }
    }

    pub fn parse(text: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == text)
    }

    /// What its value counts.
    pub fn unit(self) -> &'static str {
        match self {
            Kind::DeadLetters | Kind::NewFailure => "dead_letters",
            Kind::Parked | Kind::IdTaken => "outputs",
            Kind::Restored | Kind::CannotRun | Kind::Database => "hosts",
            Kind::DeadLetterAge | Kind::UnhandledAge | Kind::UnpublishedAge => "ms",
        }
    }

    /// A value for people.
    pub fn format_value(self, value: u64) -> String {
        match self.unit() {
            "ms" => units::format_duration(Duration::from_millis(
                value - value % if value >= 10_000 { 1_000 } else { 1 },
            )),
            _ => value.to_string(),
        }
    }

    /// What to type to see more.
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
                "look for `id taken` in the logs, and for who may publish to that stream".to_owned()
            }
            (Kind::Restored, _) => "oncely recover --dry-run".to_owned(),
            (Kind::Parked, _) => format!("oncely outbox list --worker {worker}"),
        }
    }
}

impl Thresholds {
    /// What raises an alarm of this kind: a count, or milliseconds. Zero when nothing does.
    pub fn threshold(&self, kind: Kind) -> u64 {
        match kind {
            Kind::DeadLetters => self.dead_letters.into(),
            Kind::DeadLetterAge => units::milliseconds(self.dead_letter_age),
            Kind::UnhandledAge => units::milliseconds(self.unhandled_age),
            Kind::UnpublishedAge => units::milliseconds(self.unpublished_age),
            Kind::Parked => self.parked.into(),
            Kind::IdTaken => self.id_taken.into(),
            // There is nothing to set: one host that waits is one too many.
            Kind::Restored | Kind::CannotRun | Kind::Database => 1,
            Kind::NewFailure => u64::from(self.new_failures > 0),
        }
    }
}

/// One alarm as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    pub worker: String,
    pub kind: Kind,
    /// Which failure is new; for no other kind.
    pub group: Option<FailureGroup>,
    /// How often it was raised so far.
    pub times: u32,
    /// What was measured when it was raised, and what raised it: a count, or milliseconds.
    pub value: u64,
    pub threshold: u64,
    pub raised_at: Timestamp,
    /// None while it is raised.
    pub cleared_at: Option<Timestamp>,
    /// For how long the value has been low enough to clear it, in milliseconds; none when it is not.
    pub recovering_ms: Option<u64>,
    /// For a new failure: how many of its letters are open or under way now.
    pub open_dead_letters: u64,
}

impl Alarm {
    pub fn is_raised(&self) -> bool {
        self.cleared_at.is_none()
    }

    /// Its place among the alarms of all workers.
    pub fn key(&self) -> (&str, Kind, &str) {
        (
            &self.worker,
            self.kind,
            self.group.as_ref().map_or("", |group| &group.id),
        )
    }
}

/// What follows from a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlarmStep {
    Raise,
    /// The value is low enough, from now on.
    Recover,
    /// It was, and is not any more.
    Relapse,
    Clear,
}

/// What follows for an alarm, if it was ever raised, from a `value`; none when that could not be measured. It is raised at
/// the threshold, and cleared once the value stayed at half of it or below for a while, so that a value that goes up and
/// down around the threshold is one alarm.
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

/// One step of one alarm, to be taken if the alarm is still as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlarmUpdate {
    pub worker: String,
    pub kind: Kind,
    pub group: Option<FailureGroup>,
    /// How often it had been raised when it was seen; 0 for never.
    pub times: u32,
    pub step: AlarmStep,
    pub value: u64,
    pub threshold: u64,
    /// The trouble, where the kind does not say it.
    pub why: Option<String>,
}

/// An alarm that was just raised or cleared, to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub worker: String,
    pub kind: Kind,
    pub group: Option<FailureGroup>,
    /// How often it was raised, this time included.
    pub times: u32,
    /// What was measured just now.
    pub value: u64,
    pub threshold: u64,
    pub raised_at: Timestamp,
    /// None when it was raised.
    pub cleared_at: Option<Timestamp>,
    /// The trouble, where the kind does not say it.
    pub why: Option<String>,
}

/// The body of the message that tells of an alarm.
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
    /// The database takes nothing that this host writes.
    pub fn database_unavailable(host: &str, why: &str) -> Notice {
        Notice {
            worker: HOST.to_owned(),
            kind: Kind::Database,
            group: None,
            // No counter can be kept: the database is away.
            times: rand::random(),
            value: 1,
            threshold: 1,
            raised_at: Timestamp::now(),
            cleared_at: None,
            why: Some(format!("on {host}: {why}")),
        }
    }

    /// The same alarm, over.
    #[must_use]
    pub fn cleared(self) -> Notice {
        Notice {
            value: 0,
            cleared_at: Some(Timestamp::now()),
            ..self
        }
    }

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

    /// The readable id of its message, and the id of the webhook. The same change has the same id, whichever host sends it.
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

    /// One sentence for a person.
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
                "{whose}: the alarm `{}` is over after {lasted}",
                self.kind.as_str()
            );
        }
        match self.kind {
            Kind::DeadLetters => {
                format!("worker {worker} has {value} open dead letters; {threshold} raise an alarm")
            }
            Kind::DeadLetterAge => {
                format!("a dead letter of worker {worker} has been open for {value}")
            }
            Kind::UnhandledAge => format!("a message for worker {worker} has waited for {value}"),
            Kind::UnpublishedAge => {
                format!("an output of worker {worker} has not been published for {value}")
            }
            Kind::Parked => {
                format!("{value} outputs of worker {worker} are set aside and hold their keys")
            }
            Kind::IdTaken => format!(
                "a stream held other messages under the ids of {value} outputs of worker {worker}; these were published \
                 under other ids"
            ),
            Kind::Restored => format!(
                "database and broker disagree, as after a restore of one of them: worker {worker} takes no messages, and its \
                 outputs wait"
            ),
            Kind::CannotRun => format!("worker {worker} cannot run{}", self.reason_suffix()),
            Kind::Database => format!("the database takes no writes{}", self.reason_suffix()),
            Kind::NewFailure => {
                let again = if self.times > 1 { " again" } else { "" };
                format!(
                    "messages die{again} at worker {worker}: {}",
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
            return "of a new failure".to_owned();
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
        // Text, numbers and times: there is nothing in it that JSON does not take.
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
            // One of a worker's alarms after the other.
            ordering_key: Some(ALARM_ORDERING_KEY.to_owned()),
            delay: Duration::ZERO,
        }
    }
}

/// Tells of an alarm in the log.
pub fn log(notice: &Notice) {
    let (worker, alarm, group) = (
        &notice.worker,
        notice.kind.as_str(),
        notice.group.as_ref().map(|group| &group.id),
    );
    match notice.is_raised() {
        // The first bad message of a kind is news, and nothing to wake a person for.
        true if notice.kind == Kind::NewFailure => {
            tracing::warn!(worker, alarm, group, "alarm raised: {}", notice.text())
        }
        true => tracing::error!(worker, alarm, group, "alarm raised: {}", notice.text()),
        false => tracing::info!(worker, alarm, group, "alarm cleared: {}", notice.text()),
    }
}

/// The ordering key of a worker's alarms: that one is over is never told before that it was raised.
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
            "worker settle: the alarm `unpublished-age` is over after 2h"
        );
    }
}
