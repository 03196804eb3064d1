//! Hints: the next command for the operator, carried along with an error.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;

/// An error with a hint. It displays like the error it wraps. [`hints`] returns the hints, which
/// are printed last.
pub struct Hinted {
    hint: String,
    error: anyhow::Error,
}

/// Attaches a hint to an error, or to the error of a result.
pub trait WithHint {
    /// The hinted error, or a result with one.
    type Hinted;

    /// Adds the next step for the operator, such as "run: oncely workers".
    fn hint(self, hint: impl Into<String>) -> Self::Hinted;
}

impl WithHint for anyhow::Error {
    type Hinted = anyhow::Error;

    fn hint(self, hint: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Hinted {
            hint: hint.into(),
            error: self,
        })
    }
}

impl<T, E: Into<anyhow::Error>> WithHint for Result<T, E> {
    type Hinted = anyhow::Result<T>;

    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| error.into().hint(hint))
    }
}

/// All hints of an error, outermost first.
pub fn hints(error: &anyhow::Error) -> Vec<&str> {
    wrapped(error).map(|hinted| hinted.hint.as_str()).collect()
}

/// The first `T` among an error, its contexts and its causes, including those behind hints.
pub fn find_cause<T: fmt::Display + fmt::Debug + Send + Sync + 'static>(
    error: &anyhow::Error,
) -> Option<&T> {
    error
        .downcast_ref::<T>()
        .or_else(|| wrapped(error).find_map(|hinted| hinted.error.downcast_ref::<T>()))
}

/// A word for a command line of a shell: quoted, unless it consists of safe characters.
pub fn shell_word(word: &str) -> Cow<'_, str> {
    let is_safe = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_safe) {
        return Cow::Borrowed(word);
    }
    Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")))
}

/// The errors that carry the hints of `error`, outermost first.
fn wrapped(error: &anyhow::Error) -> impl Iterator<Item = &Hinted> {
    let inner = |error| anyhow::Error::downcast_ref::<Hinted>(error);
    std::iter::successors(inner(error), move |hinted| inner(&hinted.error))
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl fmt::Debug for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

impl Error for Hinted {
    /// The wrapped error is displayed in place of this one, so the chain continues with its causes.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.chain().nth(1)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn a_word_with_special_characters_is_quoted() {
        assert_eq!(shell_word("PAYMENTS-1"), "PAYMENTS-1");
        assert_eq!(shell_word("$(reboot)"), "'$(reboot)'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn a_hint_leaves_the_error_chain_unchanged() {
        let error = anyhow!("no route")
            .context("connect to NATS")
            .hint("start it")
            .context("start the host");
        let texts: Vec<_> = error.chain().map(ToString::to_string).collect();
        assert_eq!(texts, ["start the host", "connect to NATS", "no route"]);
        assert_eq!(
            format!("{error:#}"),
            "start the host: connect to NATS: no route"
        );
    }

    #[test]
    fn hints_are_listed_outermost_first_and_hide_nothing() {
        let parse = "x"
            .parse::<u32>()
            .hint("inner")
            .context("read")
            .hint("outer")
            .unwrap_err();
        assert_eq!(hints(&parse), ["outer", "inner"]);
        assert!(find_cause::<std::num::ParseIntError>(&parse).is_some());
        assert!(find_cause::<std::io::Error>(&parse).is_none());
    }
}
