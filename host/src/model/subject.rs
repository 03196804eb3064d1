//! Subjects and their patterns, by the rules of NATS: `*` is one token, a last `>` one or more.

/// The longest subject, in bytes.
pub const SUBJECT_MAX: usize = 1024;

/// Whether `pattern` matches `subject`.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for part in pattern.split('.') {
        match (part, tokens.next()) {
            (_, None) => return false,
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (part, Some(token)) if part == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether `outer` matches everything that `inner` matches. `inner` may be a plain subject.
pub fn covers(outer: &str, inner: &str) -> bool {
    let mut tokens = inner.split('.');
    for part in outer.split('.') {
        match (part, tokens.next()) {
            (_, None) => return false,
            (">", Some(_)) => return true,
            (_, Some(">")) => return false,
            ("*", Some(_)) => {}
            (part, Some(token)) if part == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether both match a common subject.
pub fn overlaps(one: &str, other: &str) -> bool {
    let (mut ones, mut others) = (one.split('.'), other.split('.'));
    loop {
        match (ones.next(), others.next()) {
            (None, None) => return true,
            (None, Some(_)) | (Some(_), None) => return false,
            (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// Whether a subject belongs to NATS (`$JS.…`, `_INBOX.…`) or to the platform (`oncely.…`). Workers
/// may not publish there: they could command the broker, or forge a dead letter.
pub fn is_reserved(subject: &str) -> bool {
    let first = subject.split('.').next().unwrap_or_default();
    first.starts_with('$') || first.starts_with("_INBOX") || first == "oncely"
}

/// Checks that a subject can be published to: tokens of printable ASCII without space, `*` and `>`,
/// separated by dots.
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn check_subject(subject: &str) -> Result<(), String> {
    check_tokens(subject)?;
    match subject.chars().find(|c| matches!(c, '*' | '>')) {
        Some(wildcard) => Err(format!(
            "the subject `{subject}` contains the wildcard `{wildcard}`"
        )),
        None => Ok(()),
    }
}

/// Checks a pattern: as [`check_subject`], but a whole token may be `*`, and the last one `>`.
///
/// # Errors
///
/// Returns a clause without a full stop.
pub fn check_pattern(pattern: &str) -> Result<(), String> {
    check_tokens(pattern)?;
    let mut tokens = pattern.split('.').peekable();
    while let Some(token) = tokens.next() {
        if token == ">" && tokens.peek().is_some() {
            return Err(format!(
                "`>` can only be the last token of the subject `{pattern}`"
            ));
        }
        if token.len() > 1 && token.contains(['*', '>']) {
            return Err(format!(
                "`*` and `>` must be whole tokens, and `{token}` in `{pattern}` is not"
            ));
        }
    }
    Ok(())
}

fn check_tokens(subject: &str) -> Result<(), String> {
    if subject.is_empty() {
        return Err("the subject is empty".to_owned());
    }
    if subject.len() > SUBJECT_MAX {
        return Err(format!(
            "the subject has {} bytes; at most {SUBJECT_MAX} are allowed",
            subject.len()
        ));
    }
    if let Some(odd) = subject.chars().find(|c| !c.is_ascii_graphic()) {
        return Err(format!(
            "the subject `{}` contains {odd:?}; printable ASCII is allowed",
            subject.escape_debug()
        ));
    }
    if subject.split('.').any(str::is_empty) {
        return Err(format!("the subject `{subject}` has an empty token"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_in_nats() {
        for (pattern, subject) in [
            ("a.b", "a.b"),
            ("a.*", "a.b"),
            ("a.>", "a.b"),
            ("a.>", "a.b.c"),
            (">", "a"),
            ("*.b", "a.b"),
        ] {
            assert!(matches(pattern, subject), "{pattern} {subject}");
        }
        for (pattern, subject) in [
            ("a.b", "a"),
            ("a", "a.b"),
            ("a.*", "a"),
            ("a.*", "a.b.c"),
            ("a.>", "a"),
            ("*", "a.b"),
        ] {
            assert!(!matches(pattern, subject), "{pattern} {subject}");
        }
    }

    /// Checks `covers` and `overlaps` against `matches`, for all patterns of up to three tokens.
    #[test]
    fn covering_and_overlapping_agree_with_matching() {
        let subjects = sequences(&["a", "b"], 4);
        let patterns: Vec<String> = sequences(&["a", "b", "*", ">"], 3)
            .into_iter()
            .filter(|p| check_pattern(p).is_ok())
            .collect();
        for one in &patterns {
            for other in &patterns {
                let both = |s: &String| matches(one, s) && matches(other, s);
                assert_eq!(
                    overlaps(one, other),
                    subjects.iter().any(both),
                    "{one} overlaps {other}"
                );
                // The literals stand for all tokens outside of the alphabet, too, so none of them
                // covers `*`.
                let all = !subjects
                    .iter()
                    .any(|s| matches(other, s) && !matches(one, s));
                assert_eq!(covers(one, other), all, "{one} covers {other}");
            }
        }
    }

    fn sequences(tokens: &[&str], length_max: usize) -> Vec<String> {
        let mut all: Vec<String> = tokens.iter().map(ToString::to_string).collect();
        let mut last = all.clone();
        for _ in 1..length_max {
            last = last
                .iter()
                .flat_map(|head| tokens.iter().map(move |token| format!("{head}.{token}")))
                .collect();
            all.extend(last.clone());
        }
        all
    }

    #[test]
    fn subjects_that_cannot_be_published_to_are_refused() {
        for subject in [
            "",
            "a.",
            ".a",
            "a..b",
            "a b",
            "a.*",
            "a.>",
            "a\n",
            "é",
            &"a".repeat(1025),
        ] {
            assert!(check_subject(subject).is_err(), "{subject}");
        }
        assert_eq!(check_subject("payments.settled-1_x/y"), Ok(()));
    }

    #[test]
    fn patterns_take_whole_wildcards_only() {
        for pattern in ["a.>.b", "a.b*", "a.>>", "*a", "a."] {
            assert!(check_pattern(pattern).is_err(), "{pattern}");
        }
        for pattern in ["a", "*", ">", "a.*.>", "*.b"] {
            assert_eq!(check_pattern(pattern), Ok(()));
        }
    }

    #[test]
    fn the_brokers_and_the_platforms_own_subjects_are_reserved() {
        for subject in [
            "$JS.API.STREAM.DELETE.X",
            "_INBOX.a",
            "oncely.dlq.x",
            "$KV.a",
        ] {
            assert!(is_reserved(subject), "{subject}");
        }
        assert!(!is_reserved("onceler.x"));
    }
}
