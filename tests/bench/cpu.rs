//! CPU time of this process and of all its child processes, by program name, and their memory.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use anyhow::{Context, Result};

/// Seconds of CPU time so far by program; empty on a system without `/proc`.
pub fn seconds() -> BTreeMap<String, f64> {
    let processes: HashMap<u32, Process> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| read(&entry.path()))
        .collect();
    let mut seconds = BTreeMap::new();
    for (pid, process) in &processes {
        if is_ours(*pid, &processes) {
            *seconds.entry(process.name.clone()).or_default() +=
                process.ticks as f64 / TICKS_PER_SECOND;
        }
    }
    seconds
}

/// Microseconds per message since `before`, by program; programs with less than one are left out.
pub fn micros_since(before: &BTreeMap<String, f64>, messages: usize) -> BTreeMap<String, f64> {
    let spent = |(program, after): (String, f64)| {
        let spent = after - before.get(&program).copied().unwrap_or_default();
        (program, spent * 1e6 / messages as f64)
    };
    seconds()
        .into_iter()
        .map(spent)
        .filter(|(_, micros)| *micros >= 1.0)
        .collect()
}

/// The CPU time of each program, for people.
pub fn describe(micros: &BTreeMap<String, f64>) -> Vec<String> {
    let programs = micros.iter();
    programs
        .map(|(program, micros)| format!("{program} {micros:.0}"))
        .collect()
}

/// The user-space tick rate of Linux, independent of the kernel's clock.
const TICKS_PER_SECOND: f64 = 100.0;

struct Process {
    name: String,
    parent: u32,
    /// Ticks of the process and of the children it has waited for.
    ticks: u64,
}

fn read(folder: &std::path::Path) -> Option<(u32, Process)> {
    let pid = folder.file_name()?.to_str()?.parse().ok()?;
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let (before, after) = stat.rsplit_once(") ")?;
    let name = before.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = after.split(' ').collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    let ticks = (11..15).filter_map(number).sum();
    Some((
        pid,
        Process {
            name,
            parent: u32::try_from(number(1)?).ok()?,
            ticks,
        },
    ))
}

fn is_ours(pid: u32, processes: &HashMap<u32, Process>) -> bool {
    let mut pid = pid;
    while pid != std::process::id() {
        match processes.get(&pid) {
            Some(process) if process.parent > 0 => pid = process.parent,
            _ => return false,
        }
    }
    true
}

/// The largest resident memory of a process so far, in MiB.
pub fn peak_memory_mib(pid: u32) -> Result<f64> {
    Ok(memory_kib(pid, "VmHWM:")? / 1024.0)
}

/// The resident memory of a process, in KiB.
pub fn resident_kib(pid: u32) -> Result<f64> {
    memory_kib(pid, "VmRSS:")
}

fn memory_kib(pid: u32, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read the memory")?;
    let found = status.lines().find_map(|text| text.strip_prefix(line));
    let text = found.context("find the memory")?;
    let kib: f64 = text.trim().trim_end_matches(" kB").parse()?;
    Ok(kib)
}
