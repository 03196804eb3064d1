//! `oncely compile-component`: the process in which a host compiles a component. Not for people.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::guest::compile_component;

/// Compile the component on standard input for a host, within limits.
#[derive(Debug, Args)]
pub struct CompileComponent {
    /// Limit the processor time to this many seconds.
    #[arg(long, value_name = "SECONDS")]
    time: u64,
    /// Limit the address space to this many bytes.
    #[arg(long, value_name = "BYTES")]
    memory: u64,
    /// Use the compiled functions in this file, and write those of this component after it.
    #[arg(long, value_name = "FILE")]
    functions: Option<PathBuf>,
}

impl CompileComponent {
    pub fn run(self) -> Result<()> {
        compile_component(
            Duration::from_secs(self.time),
            self.memory,
            self.functions.as_deref(),
        )
    }
}
