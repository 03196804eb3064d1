//! The command line.

use clap::{Parser, Subcommand};

mod activity;
mod audit;
mod build;
pub mod cargo;
mod client;
mod compile;
mod completions;
mod console;
mod deploy;
mod dev;
mod dlq;
mod doctor;
mod encode;
pub mod exit;
mod explain;
mod lock;
mod log_line;
mod mcp;
mod new;
mod operate;
mod outbox;
mod publish;
mod receipt;
mod recover;
mod replay;
mod rollout;
mod run;
mod schema;
mod serve;
mod signals;
mod skip;
mod state;
mod status;
pub mod term;
mod test;
mod token;
mod watch;

/// The version and the commit, such as `0.1.0 (1a2b3c4d5e6f)`.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("ONCELY_COMMIT"), ")");

/// Run WebAssembly message handlers whose effects happen once.
#[derive(Debug, Parser)]
#[command(name = "oncely", version = VERSION, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    New(new::New),
    Dev(dev::Dev),
    Run(Box<run::Run>),
    Build(build::Build),
    Test(test::Test),
    Deploy(deploy::Deploy),
    Rollback(deploy::Rollback),
    Retire(deploy::Retire),
    Workers(status::Workers),
    Pause(operate::Pause),
    Resume(operate::Resume),
    Drain(operate::Drain),
    Skip(skip::Skip),
    Publish(publish::Publish),
    Dlq(dlq::Dlq),
    Replay(replay::Replay),
    Outbox(outbox::Outbox),
    Recover(recover::Recover),
    State(state::State),
    Status(status::Status),
    Audit(audit::Audit),
    Receipt(receipt::Receipt),
    Doctor(Box<doctor::Doctor>),
    Activity(activity::Activity),
    Token(token::Token),
    Console(console::Console),
    Mcp(mcp::Mcp),
    Completions(completions::Completions),
    Schema(schema::Schema),
    Explain(explain::Explain),
    #[command(hide = true)]
    CompileComponent(compile::CompileComponent),
}

impl Cli {
    /// Runs the command.
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::New(new) => new.run(),
            Command::Dev(dev) => dev.run().await,
            Command::Run(run) => run.run().await,
            Command::Build(build) => build.run().await,
            Command::Test(test) => test.run().await,
            Command::Deploy(deploy) => deploy.run().await,
            Command::Rollback(rollback) => rollback.run().await,
            Command::Retire(retire) => retire.run().await,
            Command::Workers(workers) => workers.run().await,
            Command::Pause(pause) => pause.run().await,
            Command::Resume(resume) => resume.run().await,
            Command::Drain(drain) => drain.run().await,
            Command::Skip(skip) => skip.run().await,
            Command::Publish(publish) => publish.run().await,
            Command::Dlq(dlq) => dlq.run().await,
            Command::Replay(replay) => replay.run().await,
            Command::Outbox(outbox) => outbox.run().await,
            Command::Recover(recover) => recover.run().await,
            Command::State(state) => state.run().await,
            Command::Status(status) => status.run().await,
            Command::Audit(audit) => audit.run().await,
            Command::Receipt(receipt) => receipt.run().await,
            Command::Doctor(doctor) => doctor.run().await,
            Command::Activity(activity) => activity.run().await,
            Command::Token(token) => token.run().await,
            Command::Console(console) => console.run().await,
            Command::Mcp(mcp) => mcp.run().await,
            Command::Completions(completions) => completions.run(),
            Command::Schema(schema) => schema.run(),
            Command::Explain(explain) => explain.run(),
            Command::CompileComponent(compile) => compile.run(),
        }
    }
}
