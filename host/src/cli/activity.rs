//! `oncely activity`: the changes that were made through the control API.

use anyhow::Result;
use clap::Args;
use jiff::Timestamp;

use super::client::{Client, HostArgs};
use super::term::{self, Table};
use crate::model::units;
use crate::store::{ActivityFilter, ActivityRecord};

/// Show the changes made through the control API, newest first, with their actors and results.
#[derive(Debug, Args)]
pub struct Activity {
    /// Select only changes of this worker.
    #[arg(long)]
    worker: Option<String>,
    /// Select only changes made with the token of this name.
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Select only this command, such as pause or "dlq redrive".
    #[arg(long, value_name = "COMMAND")]
    verb: Option<String>,
    /// Select only changes since: a duration ago (1h), a time (2026-01-31T12:00:00Z), or a time of
    /// today in UTC (12:00).
    #[arg(long, value_name = "WHEN", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Show at most this many.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Print JSON, with parameters and results.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    units::parse_time(text, Timestamp::now())
}

impl Activity {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let filter = ActivityFilter {
            worker: self.worker,
            actor: self.actor,
            verb: self.verb,
            since: self.since,
            below: None,
            limit: self.limit,
        };
        let activities: Vec<ActivityRecord> = client.get_with("/activity", &filter).await?;
        if self.json {
            return term::json(&activities);
        }
        if activities.is_empty() {
            term::note("no activities");
            return Ok(());
        }
        let mut table = Table::new(&["at", "actor", "command", "object", "outcome", "detail"]);
        activities.iter().map(row).for_each(|row| table.row(row));
        term::data(table.to_string().trim_end())
    }
}

fn row(activity: &ActivityRecord) -> Vec<String> {
    let actor = match &activity.stated_name {
        Some(stated_name) => format!("{} ({stated_name})", activity.actor),
        None => activity.actor.clone(),
    };
    let object = [activity.worker.as_deref(), Some(activity.object.as_str())];
    let object: Vec<&str> = object
        .into_iter()
        .flatten()
        .filter(|part| !part.is_empty())
        .collect();
    let detail = match (&activity.error, &activity.result) {
        (Some(error), _) => error.clone(),
        (None, Some(result)) => result.to_string(),
        (None, None) => activity.details.to_string(),
    };
    vec![
        units::format_time(activity.at),
        actor,
        activity.verb.clone(),
        object.join(" "),
        activity
            .outcome
            .clone()
            .unwrap_or_else(|| "unknown".to_owned()),
        detail,
    ]
}
