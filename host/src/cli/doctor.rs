//! `oncely doctor`: checks what a host needs, with a running host or without one.

use anyhow::Result;
use clap::Args;

use super::client::{Client, HostArgs, HostFile};
use super::exit::Exit;
use super::term::{self, Table};
use crate::config::{HostConfig, HostFlags};
use crate::doctor::{self, Finding, Level, Report};
use crate::model::hint;
use crate::model::visible::visible;

/// Check NATS, the database, this machine and the settings of a host.
///
/// A host that runs here is asked to check itself. Without one, or with settings as flags, the
/// configuration is read as by `oncely run`. Nothing is changed.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Ask the host with this control API, such as http://127.0.0.1:7420. Default: the host whose
    /// .oncely folder is here or in a parent folder.
    #[arg(long, env = "ONCELY_HOST", value_name = "URL")]
    host: Option<String>,
    /// Read the configuration even if a host runs here.
    #[arg(long, conflicts_with = "host")]
    direct: bool,
    /// Show only advice and problems.
    #[arg(long)]
    quiet: bool,
    /// List the checks, and run none.
    #[arg(long)]
    list: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: HostFlags,
}

impl Doctor {
    pub async fn run(self) -> Result<()> {
        if self.list {
            return list();
        }
        let report = self.examine().await?;
        if self.json {
            term::json(&report)?;
        } else {
            self.show(&report)?;
        }
        let problems = report.count(Level::Problem);
        let advice = report.count(Level::Advice);
        let ok = report.count(Level::Ok);
        let summary = format!("{problems} problems, {advice} advice, {ok} ok");
        if problems > 0 {
            return Err(Exit::Findings.with_message(summary).into());
        }
        if !self.json {
            term::note(summary);
        }
        Ok(())
    }

    async fn examine(&self) -> Result<Report> {
        if let Some(client) = self.client()? {
            let answer: Result<Report> = client.get("/doctor").await;
            match answer {
                Ok(report) => return Ok(report),
                // A host that was named has to answer.
                Err(error) if self.host.is_some() => return Err(error),
                Err(error) => term::warning(format!(
                    "the host does not answer, checking its configuration: {error:#}{}",
                    hints(&error)
                )),
            }
        }
        Ok(doctor::examine(&HostConfig::load(&self.flags)?, None).await)
    }

    /// The host to ask, if any.
    fn client(&self) -> Result<Option<Client>> {
        let asks = !self.direct && !self.flags.sets_servers();
        let args = HostArgs {
            host: self.host.clone(),
            token: self.flags.token.clone().or_else(|| {
                // The token of the control API has the same variable as the setting.
                std::env::var("ONCELY_TOKEN")
                    .ok()
                    .filter(|token| !token.is_empty())
            }),
        };
        let is_known = self.host.is_some() || (asks && HostFile::nearest().is_some());
        is_known.then(|| Client::find(&args)).transpose()
    }

    fn show(&self, report: &Report) -> Result<()> {
        let shown = report.findings.iter();
        let shown = shown.filter(|finding| !self.quiet || finding.level != Level::Ok);
        let text: Vec<String> = shown.map(render).collect();
        if text.is_empty() {
            return Ok(());
        }
        term::data(text.join("\n"))
    }
}

/// Prints the names of the checks and their subjects.
fn list() -> Result<()> {
    let mut table = Table::new(&["check", "subject"]);
    doctor::CHECKS
        .iter()
        .for_each(|check| table.row([check.name, check.subject]));
    term::data(table.to_string().trim_end())
}

fn hints(error: &anyhow::Error) -> String {
    let hints = hint::hints(error);
    let hints = hints.iter().map(|hint| format!(" ({hint})"));
    hints.collect()
}

/// A finding: one line, and for trouble the reason and the fix.
fn render(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Ok => "ok",
        Level::Advice => "advice",
        Level::Problem => "problem",
    };
    let (check, found) = (&finding.check, visible(&finding.found));
    let first = format!("{level:>7}: {check}: {found}");
    match &finding.fix {
        None => first,
        Some(fix) => format!(
            "{first}\n         {}\n         fix: {}",
            visible(&finding.reason),
            visible(fix)
        ),
    }
}
