//! The connection limits that fit under the process's limit on open files.

use rustix::process::{Resource, getrlimit};

use crate::config::HttpLimits;

/// Open files of a host besides connections of clients and to the database: listeners, NATS, Redis,
/// logs, components.
const HOST_FILES: u64 = 40;

/// Open files per database connection: a SQLite file has a write-ahead log.
const FILES_PER_DATABASE_CONNECTION: u64 = 2;

/// The minimum number of connections of a listener.
const CONNECTIONS_MIN: usize = 4;

/// Lowers the connection limits so that all connections fit under the process's limit on open
/// files, and logs that.
///
/// `requests` are the limits of the listener for requests to workers. `control` are those of the
/// control API, which keeps its own share. `pool_size` is the maximum number of database
/// connections.
pub fn within_file_limit(
    requests: HttpLimits,
    control: HttpLimits,
    pool_size: u32,
) -> (HttpLimits, HttpLimits) {
    let Some(files) = getrlimit(Resource::Nofile).current else {
        return (requests, control);
    };
    let (for_requests, for_control) =
        share(files, requests.connections, control.connections, pool_size);
    if for_requests < requests.connections {
        tracing::info!(
            files,
            from = requests.connections,
            to = for_requests,
            "http_connections lowered to the limit on open files (ulimit -n)"
        );
    }
    (
        HttpLimits {
            connections: for_requests,
            ..requests
        },
        HttpLimits {
            connections: for_control,
            ..control
        },
    )
}

/// The process's limit on open files (`None` for no limit), and the number that a host needs to
/// keep all its connections open at once.
pub fn file_limit(requests: usize, control: usize, pool_size: u32) -> (Option<u64>, u64) {
    let clients = (requests.saturating_add(control)) as u64;
    let needed = files_besides_clients(pool_size) + clients;
    (getrlimit(Resource::Nofile).current, needed)
}

fn files_besides_clients(pool_size: u32) -> u64 {
    HOST_FILES + FILES_PER_DATABASE_CONNECTION * u64::from(pool_size)
}

/// The number of connections for requests, and for the control API.
fn share(files: u64, requests: usize, control: usize, pool_size: u32) -> (usize, usize) {
    let others = files_besides_clients(pool_size);
    let left = usize::try_from(files.saturating_sub(others)).unwrap_or(usize::MAX);
    let for_control = control.min(left / 4).max(CONNECTIONS_MIN);
    let for_requests = requests
        .min(left.saturating_sub(for_control))
        .max(CONNECTIONS_MIN);
    (for_requests, for_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_limit_fits_the_file_descriptor_limit() {
        assert_eq!(share(1 << 20, 1024, 64, 16), (1024, 64));
        assert_eq!(share(1024, 1024, 64, 16), (888, 64));
        assert_eq!(share(128, 1024, 64, 16), (42, 14));
        assert_eq!(share(16, 1024, 64, 16), (4, 4));
    }
}
