//! Writes many log lines of all levels, and one line each to standard output and standard error.
//!
//! Options: `{"lines": 10000, "bytes": 100}`.

use oncely_guest::{Failure, Message, log};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default)]
struct Options {
    lines: usize,
    bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            lines: 10_000,
            bytes: 100,
        }
    }
}

#[allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the tests check how the host handles them"
)]
pub fn run(message: &Message) -> Result<(), Failure> {
    use log::Level::{Critical, Debug, Error, Info, Trace, Warn};

    let options: Options = crate::options(message)?;
    println!("a line on standard output");
    eprintln!("a line on standard error");
    let padding = "x".repeat(options.bytes);
    for (number, level) in [Trace, Debug, Info, Warn, Error, Critical]
        .into_iter()
        .cycle()
        .take(options.lines)
        .enumerate()
    {
        log::write(level, "tests", &format!("line {number} {padding}"));
    }
    Ok(())
}
