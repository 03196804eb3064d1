//! The `oncely` program.

use std::process::ExitCode;

use clap::Parser;
use oncely::cli::{Cli, exit, term};

/// A host allocates and frees many small objects per message. mimalloc spends less time on them
/// than the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            term::error(&anyhow::Error::new(error).context("start the async runtime"));
            return exit::Exit::Failure.into();
        }
    };
    match runtime.block_on(cli.run()) {
        Ok(()) => exit::Exit::Success.into(),
        Err(error) => {
            let exit = exit::Exit::from_error(&error);
            match exit {
                // A result, not a failure.
                exit::Exit::Changes | exit::Exit::Findings => term::note(&error),
                _ => term::error(&error),
            }
            exit.into()
        }
    }
}
