//! Redrives dead letters during the whole campaign, sometimes twice at once.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use support::database::Database;

/// Interval between redrives.
const INTERVAL: Duration = Duration::from_millis(500);

/// Maximum dead letters per redrive.
const BATCH_MAX: usize = 20;

/// Maximum redrives of a dead letter that keeps failing.
const GENERATIONS: u32 = 2;

pub struct Redriver {
    pub program: PathBuf,
    pub folder: PathBuf,
    pub database: Database,
}

/// Redrives dead letters until it is aborted.
pub async fn redrive(redriver: Redriver) {
    // A message that fails after a second on each redrive would slow everything else down.
    let open = format!(
        "select id from oncely.dead_letter where state = 'open' and reason = 'attempts-exhausted'
             and generation < {GENERATIONS} and coalesce(code, '') not in ('timeout', 'out-of-memory')
         order by id limit {BATCH_MAX}"
    );
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Ok(ids) = redriver.database.rows(&open).await else {
            continue;
        };
        let ids = ids.concat();
        if !ids.is_empty() {
            // The host may be unreachable, and one of the two calls is too late.
            let (_, _) = tokio::join!(redriver.run(&ids, &[]), redriver.run(&ids, &[]));
        }
    }
}

impl Redriver {
    /// Redrives all dead letters without an effect, including those that seem to be in flight.
    pub async fn redrive_the_rest(&self) -> Result<()> {
        let rest =
            "select id from oncely.dead_letter where headers like '%\"Redriven\"%' and reason = 'attempts-exhausted'
            and state in ('open', 'redriven')";
        let ids = self
            .database
            .rows(rest)
            .await
            .context("query the dead letters")?
            .concat();
        // Dead letters with an effect are refused.
        for ids in ids.chunks(100) {
            self.run(ids, &["--force"]).await?;
        }
        Ok(())
    }

    async fn run(&self, ids: &[String], flags: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.program);
        command
            .args(["dlq", "redrive", "--rate", "0", "--wait", "0s"])
            .args(flags)
            .args(ids);
        command
            .current_dir(&self.folder)
            .env_remove("ONCELY_HOST")
            .env_remove("ONCELY_TOKEN");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        tokio::task::spawn_blocking(move || command.status())
            .await?
            .context("run oncely dlq redrive")?;
        Ok(())
    }
}
