//! Facts about this machine and their judgement: disk space, file permissions, open files.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::checks::{DISK, OPEN_FILES, SECRET_FILES, SQLITE_FILE_SYSTEM, SQLITE_PERMISSIONS};
use super::{Finding, failed};
use crate::config::{self, Database, HostConfig, HttpLimits};
use crate::http_server;
use crate::model::hint::shell_word;
use crate::model::units::format_size;

/// Free space below these sizes, or below this percentage, is reported.
const FREE_PROBLEM: u64 = 256 << 20;
const FREE_ADVICE: u64 = 2 << 30;
const FREE_PERCENT_ADVICE: u64 = 10;

/// Network file systems by the number that Linux has for them.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 10] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB 2"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x0bd0_0bd0, "Lustre"),
];

/// The space of a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// The bytes that this user can still write.
    pub free: u64,
    /// All bytes.
    pub total: u64,
    /// The free places for files, and all of them; 0 for a file system without a limit.
    pub free_files: u64,
    /// See `free_files`.
    pub total_files: u64,
}

/// A path as a word of a command line.
fn word(path: &Path) -> String {
    shell_word(&path.to_string_lossy()).into_owned()
}

/// Judges the machine for this configuration.
pub fn judge(config: &HostConfig) -> Vec<Finding> {
    let mut findings = disks(config);
    findings.push(open_files(config));
    findings.extend(secret_files(config));
    if let Database::Sqlite(path) = &config.database {
        findings.push(database_permissions(path));
        findings.push(database_file_system(path));
    }
    findings
}

fn disks(config: &HostConfig) -> Vec<Finding> {
    let mut folders = vec![("the data folder", config.data_dir.clone())];
    if let Database::Sqlite(path) = &config.database {
        folders.push(("the SQLite file", path.clone()));
    }
    folders.extend(config.archive.clone().map(|path| ("the archive", path)));
    let mut findings = Vec::new();
    for (what, path) in &folders {
        match space_of(path) {
            Ok(space) => findings.push(judge_space(what, path, space)),
            Err(error) => findings.push(failed(
                DISK,
                &anyhow::Error::new(error).context(format!("read the free space of {what}")),
                "create the folder, or set another one with --data-dir FOLDER",
            )),
        }
    }
    // One line is enough where all is well.
    if findings
        .iter()
        .all(|finding| finding.level == super::Level::Ok)
    {
        findings.truncate(1);
    }
    findings
}

/// The space of the file system that holds a path, or will hold it.
fn space_of(path: &Path) -> std::io::Result<Space> {
    let found = rustix::fs::statvfs(existing(path))?;
    Ok(Space {
        free: found.f_bavail.saturating_mul(found.f_frsize),
        total: found.f_blocks.saturating_mul(found.f_frsize),
        free_files: found.f_favail,
        total_files: found.f_files,
    })
}

/// The path itself, or the nearest folder above it that exists.
fn existing(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let found = path.ancestors().find(|path| path.exists());
    found.unwrap_or(Path::new("/")).to_owned()
}

/// Judges the free space of a folder.
fn judge_space(what: &str, path: &Path, space: Space) -> Finding {
    let shown = path.display();
    let percent = |free: u64, total: u64| free.saturating_mul(100).checked_div(total);
    let free_percent = percent(space.free, space.total).unwrap_or_default();
    let free = format_size(space.free & !((1 << 20) - 1));
    let found = format!("{free} are free for {what} ({shown}), {free_percent} %");
    let fix = "free space or enlarge the file system; a shorter keep_outputs or keep_inbox \
               keeps fewer rows";
    if percent(space.free_files, space.total_files).is_some_and(|free| free == 0) {
        let found = format!("no inodes are free for {what} ({shown})");
        return DISK.problem(found, "delete files, or use a file system with more inodes");
    }
    if space.free < FREE_PROBLEM {
        return DISK.problem(found, fix);
    }
    if space.free < FREE_ADVICE || free_percent < FREE_PERCENT_ADVICE {
        return DISK.advice(found, fix);
    }
    DISK.ok(found)
}

fn open_files(config: &HostConfig) -> Finding {
    let requests = match config.http {
        Some(_) => config.http_limits.connections,
        None => 0,
    };
    let control = HttpLimits::CONTROL.connections;
    let (limit, needed) = http_server::file_limit(requests, control, config.pool_size);
    judge_open_files(limit, needed)
}

fn judge_open_files(limit: Option<u64>, needed: u64) -> Finding {
    let Some(limit) = limit else {
        return OPEN_FILES.ok("there is no limit on open files");
    };
    let found = format!("the limit on open files is {limit}, and a busy host opens {needed}");
    if limit < needed {
        return OPEN_FILES.advice(
            found,
            "ulimit -n 65536, or LimitNOFILE=65536 in the systemd unit; \
             or lower http_connections",
        );
    }
    OPEN_FILES.ok(found)
}

/// The files that only the host's user should be able to read.
fn secret_files(config: &HostConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    // A host refuses to start with a readable token.
    if config.token.is_none()
        && let Err(error) = config::read_token(&config.data_dir)
    {
        let fix = format!("chmod 600 {}", word(&config.data_dir.join("token")));
        findings.push(failed(SECRET_FILES, &error, &fix));
    }
    let mut files = config.secret_files();
    files.push(config.data_dir.join("host.json"));
    for path in files {
        let Ok(metadata) = std::fs::metadata(&path) else {
            continue;
        };
        let mode = metadata.permissions().mode() & 0o777;
        findings.extend(judge_mode(&path, mode));
    }
    if findings.is_empty() {
        findings.push(SECRET_FILES.ok("no other user can read the token or a key"));
    }
    findings
}

fn judge_mode(path: &Path, mode: u32) -> Option<Finding> {
    let shown = path.display();
    if mode & 0o007 != 0 || mode & 0o020 != 0 {
        return Some(SECRET_FILES.problem(
            format!("all users can access {shown}, mode {mode:o}"),
            format!(
                "chmod 600 {}; if it may have leaked, replace its contents",
                word(path)
            ),
        ));
    }
    (mode & 0o040 != 0).then(|| {
        SECRET_FILES.advice(
            format!("the group can read {shown}, mode {mode:o}"),
            format!("chmod 600 {}", word(path)),
        )
    })
}

fn database_permissions(path: &Path) -> Finding {
    let shown = path.display();
    let Ok(metadata) = std::fs::metadata(path) else {
        return SQLITE_PERMISSIONS.ok(format!("{shown} does not exist yet; a host creates it"));
    };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        return SQLITE_PERMISSIONS.problem(
            format!("all users can access {shown}, mode {mode:o}"),
            format!("chmod 600 {}*", word(path)),
        );
    }
    if metadata.permissions().readonly() {
        return SQLITE_PERMISSIONS.problem(
            format!("{shown} is read-only, mode {mode:o}"),
            format!("chmod 600 {}", word(path)),
        );
    }
    SQLITE_PERMISSIONS.ok(format!("{shown} has the mode {mode:o}"))
}

fn database_file_system(path: &Path) -> Finding {
    judge_file_system(path, file_system(path))
}

fn judge_file_system(path: &Path, file_system: Option<u64>) -> Finding {
    let shown = path.display();
    let known = NETWORK_FILE_SYSTEMS.iter();
    let network = known
        .clone()
        .find(|(number, _)| Some(*number) == file_system);
    if let Some((_, name)) = network {
        return SQLITE_FILE_SYSTEM.problem(
            format!("{shown} is on a network file system, {name}"),
            "move the file to a local disk and set --database PATH, or use PostgreSQL",
        );
    }
    SQLITE_FILE_SYSTEM.ok(format!("{shown} is on a local file system"))
}

/// The number of the file system that holds a path; `None` where it is unknown.
#[cfg(target_os = "linux")]
fn file_system(path: &Path) -> Option<u64> {
    let found = rustix::fs::statfs(existing(path)).ok()?;
    // The type of the field differs between architectures; the numbers have 32 bits.
    u64::try_from(found.f_type)
        .ok()
        .map(|number| number & 0xffff_ffff)
}

#[cfg(not(target_os = "linux"))]
fn file_system(_path: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn free_space_is_judged_by_size_and_share() {
        let level = |free: u64, total: u64| {
            let space = Space {
                free,
                total,
                ..Space::default()
            };
            judge_space("the data folder", Path::new("/x"), space).level
        };
        assert_eq!(level(50 << 30, 100 << 30), Level::Ok);
        assert_eq!(level(5 << 30, 100 << 30), Level::Advice);
        assert_eq!(level(1 << 30, 2 << 30), Level::Advice);
        assert_eq!(level(100 << 20, 1 << 30), Level::Problem);
        assert_eq!(level(0, 0), Level::Problem);
        let no_files = Space {
            free: 50 << 30,
            total: 100 << 30,
            free_files: 0,
            total_files: 1000,
        };
        assert_eq!(
            judge_space("x", Path::new("/x"), no_files).level,
            Level::Problem
        );
    }

    #[test]
    fn a_low_limit_on_open_files_is_advice() {
        assert_eq!(judge_open_files(None, 1000).level, Level::Ok);
        assert_eq!(judge_open_files(Some(1024), 1000).level, Level::Ok);
        assert_eq!(judge_open_files(Some(256), 1000).level, Level::Advice);
    }

    #[test]
    fn file_modes_are_judged() {
        let level = |mode| judge_mode(Path::new("key"), mode).map(|finding| finding.level);
        assert_eq!(level(0o600), None);
        assert_eq!(level(0o400), None);
        assert_eq!(level(0o640), Some(Level::Advice));
        assert_eq!(level(0o644), Some(Level::Problem));
        assert_eq!(level(0o660), Some(Level::Problem));
    }

    #[test]
    fn network_file_systems_are_known_by_number() {
        let level = |number| judge_file_system(Path::new("x.db"), number).level;
        assert_eq!(level(None), Level::Ok);
        assert_eq!(level(Some(0xef53)), Level::Ok);
        assert_eq!(level(Some(0x6969)), Level::Problem);
        assert_eq!(level(Some(0xfe53_4d42)), Level::Problem);
    }
}
