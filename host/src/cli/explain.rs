//! `oncely explain`: the codes of errors, their meaning, and the reaction to them.

use anyhow::{Result, anyhow};
use clap::Args;

use super::exit::Exit;
use super::term;
use crate::audit;
use crate::ingress::ProblemCode;
use crate::model::alarm;
use crate::model::explanation::Explanation;
use crate::model::failure_code::FailureCode;
use crate::model::hint::WithHint as _;
use crate::model::sql::SqlErrorCode;
use crate::model::verdict::Reason;

/// Explain the codes of errors: their meaning, and the reaction to them.
#[derive(Debug, Args)]
pub struct Explain {
    /// Explain this code only, such as `id-reuse`.
    code: Option<String>,
    /// Print the reference in Markdown.
    #[arg(long, conflicts_with = "code")]
    markdown: bool,
}

/// The codes of one part of Oncely.
struct Group {
    title: &'static str,
    /// Where its codes are shown.
    place: &'static str,
    codes: Vec<Explanation>,
}

impl Explain {
    pub fn run(self) -> Result<()> {
        if self.markdown {
            return term::data(reference().trim_end());
        }
        let mut found = false;
        for group in groups() {
            let is_meant =
                |one: &&Explanation| self.code.as_ref().is_none_or(|code| *code == one.code);
            for one in group.codes.iter().filter(is_meant) {
                found = true;
                let Explanation {
                    code,
                    meaning,
                    action,
                } = one;
                let title = group.title;
                term::data(format!("{code} ({title})\n  {meaning}\n  {action}"))?;
            }
        }
        match (found, self.code) {
            (false, Some(code)) => Err(anyhow!(
                Exit::NotFound.with_message(format!("there is no code `{code}`"))
            ))
            .hint("oncely explain"),
            _ => Ok(()),
        }
    }
}

/// The explanations of a code, each with the title of its part.
pub(super) fn find(code: &str) -> Vec<(&'static str, Explanation)> {
    let of_group = |group: Group| {
        let codes = group.codes.into_iter();
        codes.map(move |one| (group.title, one))
    };
    groups()
        .into_iter()
        .flat_map(of_group)
        .filter(|(_, one)| one.code == code)
        .collect()
}

fn groups() -> [Group; 7] {
    [
        Group {
            title: "reason of a dead letter",
            place: "The column `REASON` of `oncely dlq list`, see [dead letters](dead-letters.md).",
            codes: explanations(Reason::ALL, |reason| reason.explanation()),
        },
        Group {
            title: "failure of a handler",
            place: "The column `CODE` of `oncely dlq list`, and logs. A handler has its own codes \
                    besides.",
            codes: explanations(FailureCode::ALL, |code| code.explanation()),
        },
        Group {
            title: "error of a statement",
            place: "The errors of `sql.query` and `sql.execute`, see [handlers](handlers.md).",
            codes: explanations(SqlErrorCode::ALL, |code| code.explanation()),
        },
        Group {
            title: "response of the ingress",
            place: "The member `code` of a problem, see [requests over HTTP](http.md#errors).",
            codes: explanations(ProblemCode::ALL, |code| code.explanation()),
        },
        Group {
            title: "alarm",
            place: "`oncely status` and the stream of alarms, see [alarms](alarms.md).",
            codes: explanations(&alarm::Kind::ALL, |kind| kind.explanation()),
        },
        Group {
            title: "difference of an audit",
            place: "The output of `oncely audit`, see [audit](audit.md).",
            codes: explanations(audit::Kind::ALL, |kind| kind.explanation()),
        },
        Group {
            title: "exit code",
            place: "All commands.",
            codes: explanations(Exit::ALL, |exit| exit.explanation()),
        },
    ]
}

fn explanations<T: Copy>(codes: &[T], explain: impl Fn(T) -> Explanation) -> Vec<Explanation> {
    codes.iter().map(|code| explain(*code)).collect()
}

/// The text of `docs/errors.md`.
fn reference() -> String {
    let mut text = "# Errors\n\n\
        All codes of Oncely, their meaning, and the reaction to them. `oncely explain CODE`\n\
        prints one of them. This page is the output of `oncely explain --markdown`.\n"
        .to_owned();
    for group in groups() {
        let (first, rest) = group.title.split_at(1);
        let heading = first.to_uppercase() + rest;
        let place = group.place;
        text.push_str(&format!("\n## {heading}\n\n{place}\n\n"));
        text.push_str("| code | meaning | reaction |\n|---|---|---|\n");
        for Explanation {
            code,
            meaning,
            action,
        } in group.codes
        {
            text.push_str(&format!("| `{code}` | {meaning} | {action} |\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_of_errors_is_up_to_date() {
        let written = include_str!("../../../docs/errors.md");
        assert_eq!(
            written,
            reference(),
            "write the output of `oncely explain --markdown` to docs/errors.md"
        );
    }

    #[test]
    fn no_code_is_twice_in_a_group() {
        for group in groups() {
            let codes: std::collections::BTreeSet<&str> =
                group.codes.iter().map(|one| one.code).collect();
            assert_eq!(codes.len(), group.codes.len(), "{}", group.title);
        }
    }
}
