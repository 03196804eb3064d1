//! Charts of the history of workers, as images in the page.

use std::fmt::Write as _;

use jiff::Timestamp;
use maud::{Markup, html};
use serde::Serialize;

use super::parts::{age, count, time};
use crate::store::{HISTORY_BUCKET_SECS, HistoryPoint};

/// One bar for each point of time, also for those without a row.
struct Bars<'p> {
    /// The points in their places; none where nothing was counted.
    points: Vec<Option<&'p HistoryPoint>>,
}

impl<'p> Bars<'p> {
    /// The last `number` times of `step` rows each, up to now.
    fn of(points: &'p [HistoryPoint], number: usize, step: u32, now: Timestamp) -> Self {
        let secs = (HISTORY_BUCKET_SECS * u64::from(step)).cast_signed();
        let place = |at: Timestamp| {
            let back = now.as_second() / secs - at.as_second() / secs;
            let back = usize::try_from(back).ok()?;
            number.checked_sub(back + 1)
        };
        let mut placed = vec![None; number];
        for point in points {
            if let Some(bar) = place(point.at).and_then(|place| placed.get_mut(place)) {
                *bar = Some(point);
            }
        }
        Bars { points: placed }
    }

    fn highest(&self, value: fn(&HistoryPoint) -> u64) -> u64 {
        let points = self.points.iter().flatten();
        points.map(|point| value(point)).max().unwrap_or_default()
    }

    fn sum(&self, value: fn(&HistoryPoint) -> u64) -> u64 {
        self.points.iter().flatten().map(|point| value(point)).sum()
    }

    /// The outline of all bars of a value, on the bottom of a box of this height. A bar is one unit
    /// wide, and a value that is not zero is visible.
    fn path(&self, value: fn(&HistoryPoint) -> u64, highest: u64, height: u32) -> String {
        let mut path = String::new();
        for (place, point) in self.points.iter().enumerate() {
            let value = point.map(value).unwrap_or_default();
            if value == 0 {
                continue;
            }
            let scaled = value as f64 / highest.max(1) as f64 * f64::from(height);
            let top = f64::from(height) - scaled.max(1.0);
            let _ = write!(path, "M{place} {height}V{top:.1}h.8V{height}z");
        }
        path
    }
}

fn done(point: &HistoryPoint) -> u64 {
    point.done
}

/// Failed attempts, dead letters included.
fn failed(point: &HistoryPoint) -> u64 {
    point.retries + point.dead
}

fn p50(point: &HistoryPoint) -> u64 {
    point.p50_us.unwrap_or_default()
}

fn p99(point: &HistoryPoint) -> u64 {
    point.p99_us.unwrap_or_default()
}

fn lag(point: &HistoryPoint) -> u64 {
    point.lag_ms
}

/// The last 24 hours of a worker, in a row of a table.
pub fn spark(points: &[HistoryPoint], now: Timestamp) -> Markup {
    let bars = Bars::of(points, 48, SPARK_STEP, now);
    let highest = bars.highest(|point| point.done.max(point.retries + point.dead));
    let label = format!(
        "last 24 hours: {} handled, {} failed attempts",
        count(bars.sum(done)),
        count(bars.sum(failed))
    );
    html! {
        svg.spark viewBox="0 0 48 20" preserveAspectRatio="none" role="img" aria-label=(label) {
            path.done d=(bars.path(done, highest, 20)) {}
            path.failed d=(bars.path(failed, highest, 20)) {}
        }
    }
}

/// The rows of a point of [`spark`]: half an hour.
pub const SPARK_STEP: u32 = 6;

/// The rows of a point of [`week`]: an hour.
pub const WEEK_STEP: u32 = 12;

/// A deployment or a rollback, marked on the axis of time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mark {
    pub at: Timestamp,
    /// The version that became active.
    pub version: u32,
    pub is_rollback: bool,
}

/// The points of [`week`].
const WEEK_POINTS: u32 = 7 * 24;

/// The charts of seven days, on one axis of time with the marks.
pub fn week(points: &[HistoryPoint], marks: &[Mark], now: Timestamp) -> Markup {
    let bars = Bars::of(points, WEEK_POINTS as usize, WEEK_STEP, now);
    let highest = bars.highest(|point| point.done.max(failed(point)));
    let slowest = bars.highest(p99);
    let longest = bars.highest(lag);
    let handled = format!(
        "{} handled, {} failed attempts; at most {} an hour",
        count(bars.sum(done)),
        count(bars.sum(failed)),
        count(highest)
    );
    let called = match slowest {
        0 => "no calls".to_owned(),
        slowest => format!(
            "half of the calls within {}, 99 of 100 within {}, in the slowest hour",
            micros(bars.highest(p50)),
            micros(slowest)
        ),
    };
    let waited = match longest {
        0 => "no message waited".to_owned(),
        longest => format!("the oldest message waited {} at most", age(longest)),
    };
    let places: Vec<f64> = marks
        .iter()
        .filter_map(|mark| place_of(mark.at, now))
        .collect();
    html! {
        div.charts.panel {
            (chart("Handled and failed", &handled, &places, html! {
                path.done d=(bars.path(done, highest, 60)) {}
                path.failed d=(bars.path(failed, highest, 60)) {}
            }))
            (chart("Time of a call", &called, &places, html! {
                path.slow d=(bars.path(p99, slowest, 60)) {}
                path.done d=(bars.path(p50, slowest, 60)) {}
            }))
            (chart("Age of the oldest message", &waited, &places, html! {
                path.lag d=(bars.path(lag, longest, 60)) {}
            }))
            p.axis.muted { span { "7 days ago" } span { "now" } }
            (mark_list(marks))
        }
    }
}

/// The place of a time on the axis, in hours from its left end.
fn place_of(at: Timestamp, now: Timestamp) -> Option<f64> {
    // The last bar is the current hour, which ends later than now.
    let end = (now.as_second() / 3600 + 1) * 3600;
    let back = (end - at.as_second()) as f64 / 3600.0;
    let place = f64::from(WEEK_POINTS) - back;
    (0.0..=f64::from(WEEK_POINTS))
        .contains(&place)
        .then_some(place)
}

/// The marks in words, newest first.
fn mark_list(marks: &[Mark]) -> Markup {
    if marks.is_empty() {
        return html! { p.caption { "No version was activated in the last seven days." } };
    }
    html! {
        p.caption {
            span.mark-sample aria-hidden="true" {} " "
            @for (number, mark) in marks.iter().enumerate() {
                @if number > 0 { " · " }
                @if mark.is_rollback { "back to " } "version " (mark.version) " " (time(mark.at))
            }
        }
    }
}

/// A duration in microseconds.
fn micros(us: u64) -> String {
    match us {
        0..10_000 => format!("{:.1} ms", us as f64 / 1000.0),
        10_000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{:.1} s", us as f64 / 1_000_000.0),
    }
}

fn chart(title: &str, text: &str, marks: &[f64], content: Markup) -> Markup {
    html! {
        figure {
            figcaption { strong { (title) } " " span.muted { (text) } }
            svg viewBox="0 0 168 60" preserveAspectRatio="none" role="img"
                aria-label=(format!("{title}, last seven days: {text}")) {
                @for day in 1..7 { line x1=(day * 24) y1="0" x2=(day * 24) y2="60" {} }
                (content)
                @for place in marks {
                    line.mark x1=(format!("{place:.2}")) y1="0" x2=(format!("{place:.2}")) y2="60" {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_placed_by_their_time() {
        let now = Timestamp::from_second(1_000_000_000).unwrap();
        let hour = |hours: i64, done| HistoryPoint {
            worker: "a".to_owned(),
            at: Timestamp::from_second((1_000_000_000 - hours * 3600) / 3600 * 3600).unwrap(),
            done,
            retries: 0,
            dead: 0,
            lag_ms: 0,
            p50_us: None,
            p99_us: None,
        };
        let points = [hour(200, 9), hour(167, 1), hour(1, 4), hour(0, 2)];
        let bars = Bars::of(&points, 168, WEEK_STEP, now);
        let done = |place: usize| bars.points[place].map(|point| point.done);
        assert_eq!((done(0), done(166), done(167)), (Some(1), Some(4), Some(2)));
        assert_eq!(bars.sum(super::done), 7, "older points are left out");
        assert_eq!(bars.path(super::done, 4, 60).matches('M').count(), 3);
    }

    #[test]
    fn marks_are_placed_by_their_time() {
        let now = Timestamp::from_second(1_000_000_000).unwrap();
        let ago = |secs: i64| place_of(Timestamp::from_second(1_000_000_000 - secs).unwrap(), now);
        // It is 46 minutes and 40 seconds past the hour.
        assert!((ago(0).unwrap() - 167.78).abs() < 0.01);
        assert!((ago(24 * 3600).unwrap() - 143.78).abs() < 0.01);
        assert_eq!(ago(8 * 24 * 3600), None);
        assert_eq!(ago(-7200), None);
        assert_eq!(
            [micros(141), micros(45_300), micros(1_600_000)],
            ["0.1 ms", "45 ms", "1.6 s"]
        );
    }
}
