//! The dead letters that a command applies to, and the person who runs it.

use anyhow::{Result, anyhow};
use clap::Args;
use jiff::Timestamp;

use crate::api::StatedBy;
use crate::cli::client::Client;
use crate::cli::exit::Exit;
use crate::cli::term;
use crate::model::hint::WithHint;
use crate::model::units;
use crate::store::{DeadLetterActionResult, DeadLetterFilter, DeadLetterSummary};

/// Filters for dead letters.
#[derive(Debug, Clone, Args)]
pub struct Filters {
    /// Select only dead letters of this worker.
    #[arg(long)]
    worker: Option<String>,
    /// Select only those with this reason, such as rejected or attempts-exhausted.
    #[arg(long)]
    reason: Option<String>,
    /// Select only those with this failure code of the handler.
    #[arg(long)]
    code: Option<String>,
    /// Select only this failure group; see `list --groups`.
    #[arg(long, value_name = "ID")]
    group: Option<String>,
    /// Select only this subject, with the NATS wildcards `*` and `>`.
    #[arg(long)]
    subject: Option<String>,
    /// Select only those that died since: a duration ago (2h), a time (2026-01-31T12:00:00Z), or a
    /// time of today in UTC (12:00).
    #[arg(long, value_name = "WHEN", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Select only those that died before this time.
    #[arg(long, value_name = "WHEN", value_parser = parse_time)]
    until: Option<Timestamp>,
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    units::parse_time(text, Timestamp::now())
}

impl Filters {
    pub fn filter(self) -> DeadLetterFilter {
        let Filters {
            worker,
            reason,
            code,
            group,
            subject,
            since,
            until,
        } = self;
        DeadLetterFilter {
            worker,
            reason,
            code,
            group,
            subject,
            since,
            until,
            limit: u32::MAX,
            ..DeadLetterFilter::default()
        }
    }
}

/// Dead letters, selected by their ids or by filters.
#[derive(Debug, Clone, Args)]
pub struct Selection {
    /// Select dead letters by their ids.
    ids: Vec<i64>,
    /// Select all open dead letters.
    #[arg(long, conflicts_with = "ids")]
    all: bool,
    #[command(flatten)]
    filters: Filters,
}

impl Selection {
    /// Whether the dead letters are selected by their ids.
    pub fn is_by_id(&self) -> bool {
        !self.ids.is_empty()
    }

    /// Finds the selected dead letters, in the order of their streams.
    ///
    /// # Errors
    /// The selection is empty, or a dead letter with a selected id does not exist.
    pub async fn find(self, client: &Client, closed: bool) -> Result<Vec<DeadLetterSummary>> {
        let Selection { ids, all, filters } = self;
        let is_by_id = !ids.is_empty();
        let filter = DeadLetterFilter {
            closed: closed || is_by_id,
            ids,
            ..filters.filter()
        };

        // An empty selection must not mean all.
        let unfiltered = DeadLetterFilter {
            closed: filter.closed,
            limit: u32::MAX,
            ..DeadLetterFilter::default()
        };
        if filter == unfiltered && !all {
            return Err(Exit::Usage.with_message("no dead letters selected"))
                .hint("add their ids, a filter such as --worker NAME, or --all");
        }
        let mut dead_letters: Vec<DeadLetterSummary> =
            client.post("/dead-letters/find", &filter).await?;
        if let Some(missing) = filter.ids.iter().find(|id| {
            dead_letters
                .iter()
                .all(|dead_letter| dead_letter.id != **id)
        }) {
            return Err(Exit::NotFound.with_message(format!("there is no dead letter {missing}")))
                .hint("oncely dlq list");
        }
        dead_letters.sort_by(|a, b| a.stream_order().cmp(&b.stream_order()));
        Ok(dead_letters)
    }
}

/// The person who runs a command.
#[derive(Debug, Clone, Args)]
pub struct ActorArgs {
    /// State this name, which is recorded beside the name of the token. Default: the user of the
    /// operating system.
    #[arg(long, env = "ONCELY_ACTOR", value_name = "NAME")]
    actor: Option<String>,
}

impl ActorArgs {
    pub fn with_note(self, note: Option<String>) -> StatedBy {
        StatedBy {
            actor: self.actor,
            note,
        }
    }
}

/// Fails if dead letters were refused, with the reasons.
pub fn check_none_refused(results: &[DeadLetterActionResult], participle: &str) -> Result<()> {
    let refused: Vec<(i64, &str)> = results
        .iter()
        .filter_map(|result| Some((result.id, result.refused.as_deref()?)))
        .collect();
    match refused.as_slice() {
        [] => Ok(()),
        [(id, why)] if results.len() == 1 => {
            Err(anyhow!("{why}").context(format!("dead letter {id} was not {participle}")))
        }
        refused => {
            for (id, why) in refused {
                term::warning(format!("dead letter {id} was not {participle}: {why}"));
            }
            Err(anyhow!(
                "{} of {} dead letters were not {participle}",
                refused.len(),
                results.len()
            ))
        }
    }
}
