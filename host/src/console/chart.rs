//! Charts of the history of workers, as images in the page.

use std::fmt::Write as _;

use jiff::Timestamp;
use maud::{Markup, html};

use super::parts::{age, count};
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

/// The charts of seven days.
pub fn week(points: &[HistoryPoint], now: Timestamp) -> Markup {
    let bars = Bars::of(points, 7 * 24, WEEK_STEP, now);
    let highest = bars.highest(|point| point.done.max(point.retries + point.dead));
    let longest = bars.highest(lag);
    let handled = format!(
        "{} handled, {} failed attempts; at most {} an hour",
        count(bars.sum(done)),
        count(bars.sum(failed)),
        count(highest)
    );
    let waited = match longest {
        0 => "no message waited".to_owned(),
        longest => format!("the oldest message waited {} at most", age(longest)),
    };
    html! {
        div.charts {
            (chart("Handled and failed", &handled, html! {
                path.done d=(bars.path(done, highest, 60)) {}
                path.failed d=(bars.path(failed, highest, 60)) {}
            }))
            (chart("Age of the oldest message", &waited, html! {
                path.lag d=(bars.path(lag, longest, 60)) {}
            }))
        }
    }
}

fn chart(title: &str, text: &str, content: Markup) -> Markup {
    html! {
        figure.panel {
            figcaption { strong { (title) } " " span.muted { (text) } }
            svg viewBox="0 0 168 60" preserveAspectRatio="none" role="img"
                aria-label=(format!("{title}, last seven days: {text}")) {
                @for day in 1..7 { line x1=(day * 24) y1="0" x2=(day * 24) y2="60" {} }
                (content)
            }
            p.axis.muted { span { "7 days ago" } span { "now" } }
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
        };
        let points = [hour(200, 9), hour(167, 1), hour(1, 4), hour(0, 2)];
        let bars = Bars::of(&points, 168, WEEK_STEP, now);
        let done = |place: usize| bars.points[place].map(|point| point.done);
        assert_eq!((done(0), done(166), done(167)), (Some(1), Some(4), Some(2)));
        assert_eq!(bars.sum(super::done), 7, "older points are left out");
        assert_eq!(bars.path(super::done, 4, 60).matches('M').count(), 3);
    }
}
