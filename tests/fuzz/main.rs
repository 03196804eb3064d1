//! `make fuzz-sql`: generated statements against the statement filter and a real PostgreSQL.
//!
//! The server is the oracle. The host's role is not a superuser. The test revokes from PUBLIC every
//! right to objects that guests must not reach: disallowed volatile functions, functions that run
//! text, the catalog and the platform's schemas. A statement that passes the filter runs on the
//! server in a transaction. The filter has failed if the server reports a missing privilege, or a
//! command other than `select`, `insert`, `update`, `delete` and `merge`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use oncely::model::sql::{Dialect, Functions, check_statement};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::postgres::Cluster;

use crate::generate::{Generator, Vocabulary};
use crate::session::{Session, StatementResult};

mod generate;
mod server;
mod session;

/// Statements in flight in one session.
const PIPELINE: usize = 64;

#[derive(Debug, Parser)]
struct Options {
    /// Statements to generate.
    #[arg(long, default_value_t = 10_000_000)]
    statements: u64,
    /// Stop after this many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Seed of the generated statements. Default: random.
    #[arg(long)]
    seed: Option<u64>,
    /// Concurrent sessions.
    #[arg(long, default_value_t = 2)]
    sessions: u64,
    /// Print one of this many statements that the server ran.
    #[arg(long)]
    show: Option<u64>,
}

/// Counts of statements by result.
#[derive(Default)]
struct Counts {
    generated: AtomicU64,
    /// Passed the filter and were sent.
    passed: AtomicU64,
    /// Succeeded on the server.
    ran: AtomicU64,
    /// Parsed by the server as a permitted statement, which then failed.
    failed: AtomicU64,
}

impl Counts {
    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

struct Run {
    options: Options,
    seed: u64,
    functions: Arc<Functions>,
    vocabulary: Vocabulary,
    socket: std::path::PathBuf,
    role: String,
    database: String,
    deadline: Option<Instant>,
    counts: Counts,
    /// Another session found a violation.
    over: AtomicBool,
}

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(run(Options::parse()).await)
}

async fn run(options: Options) -> Result<bool> {
    // Server
    let seed = options.seed.unwrap_or_else(rand::random);
    let cluster = Cluster::start()?;
    let server::PreparedServer {
        functions,
        vocabulary,
        role,
        database,
    } = server::prepare(&cluster).await?;
    let began = Instant::now();
    let deadline = options
        .seconds
        .map(|seconds| began + Duration::from_secs(seconds));
    let run = Arc::new(Run {
        seed,
        functions,
        vocabulary,
        socket: cluster.socket(),
        role,
        database,
        deadline,
        counts: Counts::default(),
        over: AtomicBool::new(false),
        options,
    });
    println!("seed {seed}");
    server::check_oracle(&run.socket, &run.role, &run.database)?;

    // Sessions
    let sessions: Vec<_> = (0..run.options.sessions)
        .map(|number| {
            let run = Arc::clone(&run);
            std::thread::spawn(move || {
                let ended = run.fuzz(number);
                run.over.fetch_or(ended.is_err(), Ordering::Relaxed);
                ended
            })
        })
        .collect();
    let mut ended = Ok(());
    for session in sessions {
        let one = session
            .join()
            .map_err(|_| anyhow::anyhow!("a session panicked"))?;
        ended = ended.and(one);
    }
    run.report(began.elapsed());
    ended?;

    // Result
    let (passed, ran) = (
        Counts::get(&run.counts.passed),
        Counts::get(&run.counts.ran),
    );
    ensure!(
        ran * 20 > passed && ran > 0,
        "the server ran only {ran} of {passed} statements: too few for a conclusion"
    );
    println!("every text that passed the filter was one permitted statement");
    Ok(true)
}

impl Run {
    fn report(&self, took: Duration) {
        let counts = &self.counts;
        let generated = Counts::get(&counts.generated);
        println!(
            "{generated} statements in {} s ({} per second): {} passed the filter; of these, {} succeeded and {} \
             were parsed but failed",
            took.as_secs(),
            generated / took.as_secs().max(1),
            Counts::get(&counts.passed),
            Counts::get(&counts.ran),
            Counts::get(&counts.failed),
        );
    }

    fn fuzz(&self, number: u64) -> Result<()> {
        let mut session = Session::open(&self.socket, &self.role, &self.database)?;
        let mut generator = Generator::new(
            &self.vocabulary,
            StdRng::seed_from_u64(self.seed.wrapping_add(number)),
        );
        let mine = self.options.statements.div_ceil(self.options.sessions);
        let mut left = mine;
        while left > 0
            && !self.over.load(Ordering::Relaxed)
            && self.deadline.is_none_or(|end| Instant::now() < end)
        {
            let mut sent = Vec::with_capacity(PIPELINE);
            while sent.len() < PIPELINE && left > 0 {
                left -= 1;
                self.counts.generated.fetch_add(1, Ordering::Relaxed);
                let statement = generator.statement();
                if let Ok(facts) =
                    check_statement(&statement, Dialect::Postgres, Some(self.functions.as_ref()))
                {
                    session.send(&statement, facts.highest_placeholder);
                    sent.push(statement);
                }
            }
            let answers = session
                .answers(sent.len())
                .with_context(|| format!("run {sent:#?}"))?;
            for (statement, ended) in sent.iter().zip(answers) {
                self.check(statement, &ended)?;
            }
        }
        Ok(())
    }

    fn check(&self, statement: &str, ended: &StatementResult) -> Result<()> {
        self.counts.passed.fetch_add(1, Ordering::Relaxed);
        if let Err(why) = verdict(ended) {
            bail!(
                "{why}, but the statement passed the filter (seed {}):\n{statement}\n\n{statement:?}\n{ended:?}",
                self.seed
            );
        }
        match &ended.error {
            None => {
                let ran = self.counts.ran.fetch_add(1, Ordering::Relaxed);
                if self
                    .options
                    .show
                    .is_some_and(|each| ran.is_multiple_of(each))
                {
                    println!("{}: {statement}", ended.tag.as_deref().unwrap_or_default());
                }
            }
            Some((code, _)) if code != "42601" => {
                self.counts.failed.fetch_add(1, Ordering::Relaxed);
            }
            Some(_) => {}
        }
        Ok(())
    }
}

/// Permitted commands.
const COMMANDS: [&str; 5] = ["SELECT", "INSERT", "UPDATE", "DELETE", "MERGE"];

/// Error classes of permitted statements: syntax, unknown names, wrong types and values,
/// constraints, limits, sequence states, timeouts, invalid arguments.
const ERRORS: [&str; 18] = [
    "42", "22", "21", "23", "0A", "54", "55000", "57014", "08P01", "34", "24", "3F", "P0", "40",
    "44", "XX000", "38", "39",
];

pub(crate) fn verdict(ended: &StatementResult) -> Result<(), String> {
    if let Some(setting) = &ended.setting {
        return Err(format!("the statement changed the setting {setting}"));
    }
    if ended.status != b'T' && ended.status != b'E' {
        return Err("the statement ended the transaction".to_owned());
    }
    match (&ended.tag, &ended.error) {
        // A worker may write to its own sequence only through the sequence functions.
        (_, Some((code, message)))
            if code == "42501" && message == "permission denied for sequence number" =>
        {
            Ok(())
        }
        (_, Some((code, message))) if code == "42501" => Err(format!(
            "the statement reached a forbidden object: {message}"
        )),
        (_, Some((code, message))) if !ERRORS.iter().any(|class| code.starts_with(class)) => Err(
            format!("the statement failed with an unexpected error: {code} {message}"),
        ),
        (_, Some(_)) => Ok(()),
        (Some(tag), None)
            if COMMANDS
                .iter()
                .any(|command| tag.split(' ').next() == Some(command)) =>
        {
            Ok(())
        }
        (tag, None) => Err(format!("the statement was the command {tag:?}")),
    }
}

/// True once in `times` calls on average.
pub(crate) fn one_in(rng: &mut impl Rng, times: u32) -> bool {
    rng.random_ratio(1, times)
}
