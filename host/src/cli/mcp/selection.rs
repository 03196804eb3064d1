//! Arguments that name things: dead letters, workers, pages of lists, times.

use anyhow::{Context as _, Result, anyhow, ensure};
use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::model::units;
use crate::store::DeadLetterFilter;

/// The default and the maximum number of items of a list.
const LIMIT_DEFAULT: u32 = 20;
const LIMIT_MAX: u32 = 100;

/// The longest reason, in characters.
const REASON_MAX: usize = 500;

/// Filters for dead letters. All of them must match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Filters {
    /// The name of a worker.
    pub worker: Option<String>,
    /// A reason such as `rejected` or `attempts-exhausted`.
    pub reason: Option<String>,
    /// The failure code of the handler.
    pub code: Option<String>,
    /// The id of a failure group, from `dead_letter_groups`.
    pub group: Option<String>,
    /// A subject, with the NATS wildcards `*` and `>`.
    pub subject: Option<String>,
    /// Dead-lettered since: a duration ago (`2h`), or a time (`2026-01-31T12:00:00Z`).
    pub since: Option<String>,
    /// Dead-lettered before this time.
    pub until: Option<String>,
    /// Include done, resolved and dropped ones.
    pub closed: bool,
}

impl Filters {
    /// The filter of the control API.
    pub fn filter(&self, limit: u32) -> Result<DeadLetterFilter> {
        let time = |text: &Option<String>| text.as_deref().map(parse_time).transpose();
        Ok(DeadLetterFilter {
            worker: self.worker.clone(),
            reason: self.reason.clone(),
            code: self.code.clone(),
            group: self.group.clone(),
            subject: self.subject.clone(),
            since: time(&self.since)?,
            until: time(&self.until)?,
            closed: self.closed,
            limit,
            ..DeadLetterFilter::default()
        })
    }
}

/// The number of items of a list; 20 by default, at most 100.
pub fn limit(wanted: Option<u32>) -> u32 {
    wanted.unwrap_or(LIMIT_DEFAULT).clamp(1, LIMIT_MAX)
}

/// A time: a duration before now, or a point in time.
pub fn parse_time(text: &str) -> Result<Timestamp> {
    units::parse_time(text, Timestamp::now()).map_err(|why| anyhow!(why))
}

/// The name of a worker as a segment of a path. Other names could lead to another request.
pub fn worker_segment(worker: &str) -> Result<&str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    ensure!(
        !worker.is_empty() && worker.chars().all(is_plain),
        "that is not the name of a worker"
    );
    Ok(worker)
}

/// Any text as a segment of a path.
pub fn segment(text: &str) -> Result<String> {
    ensure!(!matches!(text, "" | "." | ".."), "that is not an id");
    Ok(utf8_percent_encode(text, NON_ALPHANUMERIC).to_string())
}

/// The reason of a change, which the activity log keeps.
pub fn reason(text: &str) -> Result<String> {
    let text = text.trim();
    ensure!(!text.is_empty(), "a change needs a reason");
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let printable: String = printable.collect();
    ensure!(
        printable.chars().count() <= REASON_MAX,
        "a reason has at most {REASON_MAX} characters"
    );
    Ok(printable)
}

/// Distinct ids, in order, within a limit.
pub fn distinct(ids: &[i64], max: usize) -> Result<Vec<i64>> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ensure!(!ids.is_empty(), "no ids are given");
    ensure!(
        ids.len() <= max,
        "{} are too many for one plan; the limit is {max}",
        ids.len()
    );
    Ok(ids)
}

/// The rest of a list that was requested with one item more than its page.
pub fn split_page<T>(mut items: Vec<T>, offset: usize, limit: usize) -> (Vec<T>, Option<usize>) {
    let next = offset.saturating_add(limit);
    let has_more = items.len() > next;
    items.truncate(next);
    let page = items.split_off(offset.min(items.len()));
    (page, has_more.then_some(next))
}

/// A limit and an offset as one number of items to request.
pub fn requested(offset: u32, limit: u32) -> Result<u32> {
    let all = offset.checked_add(limit).and_then(|all| all.checked_add(1));
    all.filter(|all| *all <= 10_000)
        .context("that is too far down the list; use filters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_to_another_request() {
        for hostile in ["", "..", "a/../b", "%2e%2e", "a?b", "a b", "ä"] {
            assert!(worker_segment(hostile).is_err(), "{hostile}");
        }
        assert!(worker_segment("settle-2").is_ok());
        assert!(segment("..").is_err());
        assert_eq!(segment("a/b?c").ok().as_deref(), Some("a%2Fb%3Fc"));
    }

    #[test]
    fn a_list_is_read_page_by_page() {
        assert_eq!(split_page(vec![1, 2, 3], 0, 2), (vec![1, 2], Some(2)));
        assert_eq!(split_page(vec![1, 2, 3], 2, 2), (vec![3], None));
        assert_eq!(split_page(vec![1], 5, 2), (vec![], None));
        assert!(requested(u32::MAX, 100).is_err());
    }

    #[test]
    fn a_reason_is_one_line() {
        assert!(reason(" \n").is_err());
        assert_eq!(reason("a\nb").ok().as_deref(), Some("a b"));
        assert!(reason(&"x".repeat(1_000)).is_err());
    }
}
