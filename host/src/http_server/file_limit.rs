//! Connections are open files: how many of them fit under the limit of the process.

use rustix::process::{Resource, getrlimit};

use crate::config::HttpLimits;

/// Files of a host besides the connections of its clients and of its database: listeners, NATS, Redis, logs, components.
const HOST_FILES: u64 = 40;

/// Files for each connection to the database: a SQLite file comes with a write-ahead log.
const FILES_PER_DATABASE_CONNECTION: u64 = 2;

/// The fewest connections of a listener.
const CONNECTIONS_MIN: usize = 4;

/// Lowers the bounds of connections so that all of them fit under the process's limit of open files, and says so in the log.
///
/// `requests` are the limits of the listener for requests to workers, `control` those of the control API, which keeps a share of its
/// own. `pool_size` is the most connections to the database.
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
            "http_connections lowered: the process may not open more files (ulimit -n)"
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

/// Connections for requests, and for the control API.
fn share(files: u64, requests: usize, control: usize, pool_size: u32) -> (usize, usize) {
    let others = HOST_FILES + FILES_PER_DATABASE_CONNECTION * u64::from(pool_size);
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
