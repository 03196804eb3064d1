//! The judgement of clocks.

use std::time::Duration;

use super::Finding;
use super::checks::CLOCKS;
use crate::model::clock_reading::ClockReading;
use crate::model::units::format_duration;

/// Differences from these on are reported. The relay searches streams with a margin of two minutes.
const ADVICE_MS: u64 = 1_000;
const PROBLEM_MS: u64 = 30_000;

const FIX: &str = "synchronise the clocks of all machines: timedatectl set-ntp true";

/// Judges readings of the clocks of servers, each with the server's name.
pub fn judge(readings: &[(&str, ClockReading)]) -> Vec<Finding> {
    if readings.is_empty() {
        return Vec::new();
    }
    let mut findings: Vec<Finding> = readings.iter().filter_map(judge_one).collect();
    if findings.is_empty() {
        let names: Vec<&str> = readings.iter().map(|(name, _)| *name).collect();
        findings.push(CLOCKS.ok(format!(
            "the clock of this machine agrees with that of {}",
            names.join(" and ")
        )));
    }
    findings
}

/// The part of a difference that the round trip does not explain counts.
fn judge_one((name, reading): &(&str, ClockReading)) -> Option<Finding> {
    let apart = reading.ahead_ms.unsigned_abs();
    let least = apart.saturating_sub(reading.accuracy_ms.unsigned_abs());
    let direction = if reading.ahead_ms > 0 {
        "ahead of"
    } else {
        "behind"
    };
    let found = format!(
        "the clock of {name} is {} {direction} that of this machine",
        format_duration(Duration::from_millis(apart))
    );
    match least {
        PROBLEM_MS.. => Some(CLOCKS.problem(found, FIX)),
        ADVICE_MS.. => Some(CLOCKS.advice(found, FIX)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn differences_count_beyond_the_round_trip() {
        let level = |ahead_ms, accuracy_ms| {
            let reading = ClockReading {
                ahead_ms,
                accuracy_ms,
            };
            judge(&[("NATS", reading)])[0].level
        };
        assert_eq!(level(20, 10), Level::Ok);
        assert_eq!(level(-1_500, 2_000), Level::Ok);
        assert_eq!(level(1_500, 10), Level::Advice);
        assert_eq!(level(-60_000, 10), Level::Problem);
        assert!(judge(&[]).is_empty());
    }
}
