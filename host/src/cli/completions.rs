//! `oncely completions`: scripts that let a shell complete commands.

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, term};

/// Print a script that completes commands in a shell.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell that runs the script.
    shell: Shell,
}

impl Completions {
    pub fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "oncely", &mut script);
        term::raw(&script)
    }
}
