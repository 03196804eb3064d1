//! `oncely dlq redrive`: dead letters go back to their workers.

use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Args;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior};

use super::select::{Actor, Selection, check_all_moved};
use crate::api::letters::RedriveRequest;
use crate::cli::client::{Client, HostArgs};
use crate::cli::term::{self, Progress};
use crate::hint::WithHint;
use crate::store::{self, By, LetterFilter, LetterState, LetterSummary, Moved};
use crate::units;

/// The most letters in one request.
const CHUNK_MAX: u32 = 100;

/// How often it looks what became of letters.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Puts dead letters back: to the worker that failed and to nobody else, under the same event id, so that an event that took
/// effect meanwhile is skipped. It goes in the order of the stream, and can be stopped and begun again.
#[derive(Debug, Args)]
pub struct Redrive {
    #[command(flatten)]
    selection: Selection,
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

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    put_back: usize,
    /// What became of them so far.
    done: usize,
    died_again: usize,
    under_way: usize,
    refused: Vec<Moved>,
}

impl Redrive {
    pub async fn run(self) -> Result<()> {
        let client = Client::find(&self.host)?;
        let began = jiff::Timestamp::now();
        let letters = self.selection.find(&client, false).await?;
        if letters.is_empty() {
            term::note("no dead letters");
            return Ok(());
        }
        let wanted: Vec<store::Redrive> = letters
            .iter()
            .map(|letter| store::Redrive { id: letter.id, generation: None, again: self.again })
            .collect();
        let (moved, stopped) = put_back(&client, &wanted, &self.actor.by(self.note), self.rate).await?;
        if stopped {
            let count = moved.iter().filter(|moved| moved.refused.is_none()).count();
            return Err(anyhow!("stopped after {count} of {} dead letters", wanted.len())).hint(format!(
                "go on with the same command and --until {began}, which leaves out what died again since"
            ));
        }
        let outcome = outcome(&client, &moved, self.wait).await?;
        if self.json {
            term::json(&outcome)?;
        } else {
            term::data(outcome.in_words())?;
        }
        check_all_moved(&moved, "put back")
    }
}

/// Puts letters back at a steady pace; the second value says whether Ctrl-C ended it. What was put back stays so.
async fn put_back(client: &Client, wanted: &[store::Redrive], by: &By, rate: u32) -> Result<(Vec<Moved>, bool)> {
    let chunk = if rate == 0 { CHUNK_MAX } else { (rate / 10).clamp(1, CHUNK_MAX) };
    let pause = Duration::from_secs(1).mul_f64(f64::from(chunk) / f64::from(rate.max(1)));
    let mut tick = tokio::time::interval(if rate == 0 { Duration::from_nanos(1) } else { pause });
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut progress = Progress::bar("put back", wanted.len() as u64);
    let mut moved: Vec<Moved> = Vec::new();
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    for letters in wanted.chunks(chunk as usize) {
        tokio::select! {
            biased;
            _ = &mut stop => return Ok((moved, true)),
            _ = tick.tick() => {}
        }
        let request = RedriveRequest { letters: letters.to_vec(), by: by.clone() };
        moved.extend(client.post::<_, Vec<Moved>>("/letters/redrive", &request).await?);
        progress.set(moved.len() as u64);
    }
    progress.finish(&format!("{} dead letters", moved.iter().filter(|moved| moved.refused.is_none()).count()));
    Ok((moved, false))
}

/// Looks what became of the letters until all are settled, the time is over, or Ctrl-C is pressed.
async fn outcome(client: &Client, moved: &[Moved], wait: Duration) -> Result<Outcome> {
    let ids: Vec<i64> = moved.iter().filter(|moved| moved.refused.is_none()).map(|moved| moved.id).collect();
    let refused: Vec<Moved> = moved.iter().filter(|moved| moved.refused.is_some()).cloned().collect();
    let end = Instant::now() + wait;
    let filter = LetterFilter { ids: ids.clone(), closed: true, limit: u32::MAX, ..LetterFilter::default() };
    let mut progress = Progress::bar("settled", ids.len() as u64);
    loop {
        let letters: Vec<LetterSummary> =
            if ids.is_empty() { Vec::new() } else { client.post("/letters/find", &filter).await? };
        let count = |state: LetterState| letters.iter().filter(|letter| letter.state == state).count();
        let under_way = count(LetterState::Redriven);
        progress.set((ids.len() - under_way) as u64);
        if under_way == 0 || Instant::now() >= end {
            let (done, died_again) = (count(LetterState::Done), count(LetterState::Open));
            return Ok(Outcome { put_back: ids.len(), done, died_again, under_way, refused });
        }
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(Outcome { put_back: ids.len(), under_way, refused, ..Outcome::default() }),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

impl Outcome {
    fn in_words(&self) -> String {
        let mut words = format!("put back: {}; took effect: {}", self.put_back, self.done);
        for (count, what) in [(self.died_again, "died again"), (self.under_way, "under way")] {
            if count > 0 {
                words.push_str(&format!("; {what}: {count}"));
            }
        }
        words
    }
}
