//! `oncely completions`: scripts for shell completion.

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, term};

/// Print a completion script for a shell.
#[derive(Debug, Args)]
pub struct Completions {
    /// Print the script for this shell.
    shell: Shell,
}

impl Completions {
    pub fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "oncely", &mut script);
        term::raw(&script)
    }
}
