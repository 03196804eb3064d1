//! `oncely dlq redrive`: dead letters go back to their workers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior};

use super::plan::Plan;
use super::select::{Actor, Selection, check_all_moved};
use crate::api::letters::{Planned, PlannedRequest, RedriveRequest};
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Progress};
use crate::model::hint::WithHint;
use crate::model::units;
use crate::store::{self, LetterFilter, LetterState, LetterSummary, Moved};

/// The most letters in one request, and in one that rehearses them first.
const CHUNK_MAX: u32 = 100;
const PLANNED_CHUNK_MAX: u32 = 20;

/// How often it looks what became of letters.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Puts dead letters back: to the worker that failed and to nobody else, under the same event id, so that an event that took
/// effect meanwhile is skipped. It goes in the order of the stream, and can be stopped and begun again.
#[derive(Debug, Args)]
pub struct Redrive {
    #[command(flatten)]
    selection: Selection,
    /// Change nothing: run the deployment of now on the data of now, roll that back, and show what would have changed.
    #[arg(long)]
    dry_run: bool,
    /// Where to keep what a dry run found, as a plan for --plan.
    #[arg(long, value_name = "FILE", requires = "dry_run")]
    out: Option<PathBuf>,
    /// Put back what a plan says would succeed, as far as deployment and data are still what they were.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dry_run", "ids", "all", "again"])]
    plan: Option<PathBuf>,
    /// At most so many in a second; 0 for as fast as it goes.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Also those that are under way or closed.
    #[arg(long)]
    again: bool,
    /// How long to wait for what becomes of them.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_duration)]
    wait: Duration,
    /// Why, for the record.
    #[arg(long)]
    note: Option<String>,
    #[command(flatten)]
    actor: Actor,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: HostArgs,
}

impl Redrive {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        if let Some(path) = self.plan.clone() {
            return self.put_back_planned(&client, &path).await;
        }
        let letters = self.selection.clone().find(&client, false).await?;
        if letters.is_empty() {
            term::note("no dead letters");
            return Ok(());
        }
        if self.dry_run { self.rehearse(&client, &letters).await } else { self.put_back(&client, &letters).await }
    }

    async fn rehearse(&self, client: &Client, letters: &[LetterSummary]) -> Result<()> {
        let plan = Plan::make(client, letters).await?;
        if let Some(path) = &self.out {
            plan.write(path)?;
            term::note(format!("put back what would succeed with: oncely dlq redrive --plan {}", path.display()));
        }
        if self.json { term::json(&plan) } else { plan.show() }
    }

    async fn put_back(self, client: &Client, letters: &[LetterSummary]) -> Result<()> {
        let began = Timestamp::now();
        let again = self.again;
        let wanted: Vec<store::Redrive> =
            letters.iter().map(|letter| store::Redrive { id: letter.id, generation: None, again }).collect();
        let by = self.actor.clone().by(self.note.clone());
        let pace = Pace::of(self.rate, CHUNK_MAX);
        let (moved, is_all) = pace
            .send(&wanted, async |letters: &[store::Redrive]| {
                let request = RedriveRequest { letters: letters.to_vec(), by: by.clone() };
                client.post::<_, Vec<Moved>>("/letters/redrive", &request).await
            })
            .await?;
        if !is_all {
            let go_on =
                format!("go on with the same command and --until {began}, which leaves out what died again since");
            return Err(stopped(&moved, wanted.len())).hint(go_on);
        }
        self.conclude(client, &moved).await
    }

    async fn put_back_planned(self, client: &Client, path: &Path) -> Result<()> {
        let plan = Plan::read(path)?;
        let planned = |one: &crate::dlq::dry_run::Rehearsed| Planned { id: one.letter, basis: one.basis.clone() };
        let wanted: Vec<Planned> = plan.would_succeed().map(planned).collect();
        term::note(format!("{} of {} dead letters of the plan would succeed", wanted.len(), plan.letters.len()));
        let by = self.actor.clone().by(self.note.clone());
        let pace = Pace::of(self.rate, PLANNED_CHUNK_MAX);
        let (moved, is_all) = pace
            .send(&wanted, async |letters: &[Planned]| {
                let request = PlannedRequest { letters: letters.to_vec(), by: by.clone() };
                client.post::<_, Vec<Moved>>("/letters/redrive-planned", &request).await
            })
            .await?;
        if !is_all {
            let go_on = "go on with a new plan: oncely dlq redrive --all --dry-run --out plan.json";
            return Err(stopped(&moved, wanted.len())).hint(go_on);
        }
        self.conclude(client, &moved).await
    }

    /// Waits for what becomes of the letters, and tells.
    async fn conclude(&self, client: &Client, moved: &[Moved]) -> Result<()> {
        // Of all that have something in common, those that took effect since are no failure: nobody asked for them by name.
        let (gone, moved): (Vec<Moved>, Vec<Moved>) =
            moved.iter().cloned().partition(|moved| moved.took_effect && !self.selection.is_by_number());
        let mut outcome = Outcome::of(client, &moved, self.wait).await?;
        outcome.took_effect_before = gone.len();
        if self.json {
            term::json(&outcome)?;
        } else {
            term::data(outcome.in_words())?;
        }
        check_all_moved(&moved, "put back")
    }
}

fn stopped(moved: &[Moved], wanted: usize) -> anyhow::Error {
    let count = moved.iter().filter(|moved| moved.refused.is_none()).count();
    anyhow!("stopped after {count} of {wanted} dead letters")
}

/// So many letters at a time, and how long from one time to the next.
struct Pace {
    chunk: usize,
    every: Duration,
}

impl Pace {
    /// For so many letters in a second; 0 for as fast as it goes.
    fn of(rate: u32, chunk_max: u32) -> Pace {
        let chunk = if rate == 0 { chunk_max } else { (rate / 10).clamp(1, chunk_max) };
        let every = if rate == 0 {
            Duration::from_nanos(1)
        } else {
            Duration::from_secs(1).mul_f64(f64::from(chunk) / f64::from(rate))
        };
        Pace { chunk: chunk as usize, every }
    }

    /// Sends letters at this pace until all are sent or Ctrl-C is pressed: then false. What was sent is sent.
    async fn send<T>(
        &self,
        letters: &[T],
        send: impl AsyncFn(&[T]) -> Result<Vec<Moved>>,
    ) -> Result<(Vec<Moved>, bool)> {
        let mut tick = tokio::time::interval(self.every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut progress = Progress::bar("put back", letters.len() as u64);
        let mut moved: Vec<Moved> = Vec::new();
        let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
        for chunk in letters.chunks(self.chunk) {
            tokio::select! {
                biased;
                _ = &mut stop => return Ok((moved, false)),
                _ = tick.tick() => {}
            }
            moved.extend(send(chunk).await?);
            progress.set(moved.len() as u64);
        }
        let count = moved.iter().filter(|moved| moved.refused.is_none()).count();
        progress.finish(&format!("{count} of {}", letters.len()));
        Ok((moved, true))
    }
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    put_back: usize,
    took_effect: usize,
    died_again: usize,
    under_way: usize,
    /// Not put back, as they had taken effect by then.
    took_effect_before: usize,
    refused: Vec<Moved>,
}

impl Outcome {
    /// Looks until all letters are settled, the time is over, or Ctrl-C is pressed.
    async fn of(client: &Client, moved: &[Moved], wait: Duration) -> Result<Outcome> {
        let ids: Vec<i64> = moved.iter().filter(|moved| moved.refused.is_none()).map(|moved| moved.id).collect();
        let refused = moved.iter().filter(|moved| moved.refused.is_some()).cloned().collect();
        let mut outcome = Outcome { put_back: ids.len(), refused, ..Outcome::default() };
        if ids.is_empty() {
            return Ok(outcome);
        }
        let end = Instant::now() + wait;
        let mut progress = Progress::bar("settled", ids.len() as u64);
        let filter = LetterFilter { ids, closed: true, limit: u32::MAX, ..LetterFilter::default() };
        let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
        loop {
            let letters: Vec<LetterSummary> = client.post("/letters/find", &filter).await?;
            let count = |state: LetterState| letters.iter().filter(|letter| letter.state == state).count();
            outcome.took_effect = count(LetterState::Done);
            outcome.died_again = count(LetterState::Open);
            outcome.under_way = count(LetterState::Redriven);
            progress.set((letters.len() - outcome.under_way) as u64);
            if outcome.under_way == 0 || Instant::now() >= end {
                return Ok(outcome);
            }
            tokio::select! {
                _ = &mut stop => return Ok(outcome),
                // Not so often when there are many.
                () = tokio::time::sleep(LOOK_EVERY * (1 + outcome.put_back as u32 / 500)) => {}
            }
        }
    }

    fn in_words(&self) -> String {
        let mut words = format!("put back: {}; took effect: {}", self.put_back, self.took_effect);
        let rest = [
            (self.died_again, "died again"),
            (self.under_way, "under way"),
            (self.took_effect_before, "had taken effect before"),
        ];
        for (count, what) in rest {
            if count > 0 {
                words.push_str(&format!("; {what}: {count}"));
            }
        }
        words
    }
}
