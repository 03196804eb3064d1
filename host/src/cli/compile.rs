//! `oncely compile-component`: the process that a host starts to compile a component. Not for people.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::guest::compile_component;

/// Compiles the component on standard input for a host, within limits.
#[derive(Debug, Args)]
pub struct CompileComponent {
    /// Processor time, in seconds.
    #[arg(long, value_name = "SECONDS")]
    time: u64,
    /// Address space, in bytes.
    #[arg(long, value_name = "BYTES")]
    memory: u64,
}

impl CompileComponent {
    pub fn run(self) -> Result<()> {
        compile_component(Duration::from_secs(self.time), self.memory)
    }
}
