//! The addresses of the pages.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// Everything but the characters that mean nothing in a URL.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// A text as one segment of a path or one value of a query.
pub fn encoded(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

/// The page of a worker.
pub fn worker(name: &str) -> String {
    format!("/workers/{}", encoded(name))
}

/// The page of an event.
pub fn event(worker: &str, event_id: &str) -> String {
    format!("/workers/{}/events/{}", encoded(worker), encoded(event_id))
}

/// The page of a dead letter.
pub fn dead_letter(id: i64) -> String {
    format!("/dead-letters/{id}")
}

/// The failures of a group.
pub fn group(id: &str) -> String {
    format!("/failures?group={}", encoded(id))
}

/// The page of a redrive job.
pub fn job(id: i64) -> String {
    format!("/jobs/{id}")
}

/// The page of an audit.
pub fn audit(id: i64) -> String {
    format!("/books/{id}")
}

/// The failures of a worker.
pub fn failures_of(worker: &str) -> String {
    format!("/failures?worker={}", encoded(worker))
}

/// The page of an output.
pub fn output(number: i64) -> String {
    format!("/outputs/{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_event_ids_stay_one_segment() {
        assert_eq!(event("w", "a/b?c#d%"), "/workers/w/events/a%2Fb%3Fc%23d%25");
        assert_eq!(
            event("w", "\"><script>"),
            "/workers/w/events/%22%3E%3Cscript%3E"
        );
    }
}
