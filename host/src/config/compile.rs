//! The limits for compiling a component.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::sources::{Setting, Sources};
use crate::model::units;

/// The default processor time for one component.
const TIME_DEFAULT: Duration = Duration::from_secs(120);

/// The default memory for one component, in bytes.
const MEMORY_DEFAULT: u64 = 2 << 30;

/// The minimum memory, in bytes. With less, even a small component does not compile.
const MEMORY_MIN: u64 = 1 << 30;

/// The settings for compiling components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompileSettings {
    /// Processor time for one component, of all threads together.
    pub time: Duration,
    /// Address space for one component, in bytes.
    pub memory: u64,
    /// The program that is started to compile: this one.
    pub program: PathBuf,
    /// Whether machine code of functions is kept for the next compilation. Not a setting: only
    /// `oncely dev` and `oncely test` do so.
    pub keeps_functions: bool,
}

impl CompileSettings {
    /// The settings of `oncely test`.
    pub fn for_tests() -> Self {
        CompileSettings {
            keeps_functions: true,
            ..CompileSettings::default()
        }
    }
}

impl Default for CompileSettings {
    fn default() -> Self {
        CompileSettings {
            time: TIME_DEFAULT,
            memory: MEMORY_DEFAULT,
            program: current_program(),
            keeps_functions: false,
        }
    }
}

/// The running program, even if its file was replaced by another version since.
fn current_program() -> PathBuf {
    let running = Path::new("/proc/self/exe");
    match std::env::current_exe() {
        Ok(file) if !running.exists() => file,
        _ => running.to_owned(),
    }
}

pub(super) fn resolve(sources: &Sources<'_>) -> anyhow::Result<CompileSettings> {
    Ok(CompileSettings {
        time: sources
            .get("compile_time")
            .map_or(Ok(TIME_DEFAULT), |setting| time(&setting))?,
        memory: sources
            .get("compile_memory")
            .map_or(Ok(MEMORY_DEFAULT), |setting| memory(&setting))?,
        ..CompileSettings::default()
    })
}

fn time(setting: &Setting) -> anyhow::Result<Duration> {
    let (least, most) = (Duration::from_secs(1), Duration::from_secs(60 * 60));
    match units::parse_duration(&setting.value) {
        Ok(time) if (least..=most).contains(&time) => Ok(time),
        _ => Err(setting.refuse_value("is not a duration between 1s and 1h", "2m")),
    }
}

fn memory(setting: &Setting) -> anyhow::Result<u64> {
    match units::parse_size(&setting.value) {
        Ok(memory) if memory >= MEMORY_MIN => Ok(memory),
        _ => Err(setting.refuse_value("is not a size of 1 GiB or more", "2GiB")),
    }
}
