//! Shared test support: real servers on free loopback ports, removed when the test process ends.

pub mod books;
pub mod browser;
pub mod compiled;
pub mod counting;
pub mod database;
pub mod eventually;
pub mod guests;
pub mod metrics;
pub mod nats;
pub mod pgbouncer;
pub mod postgres;
pub mod production;
pub mod project;
pub mod proxy;
pub mod redis;
pub mod registry;
pub mod server;
pub mod world;

/// The exit code of a test program: success if `holds` is true. An error is the last line printed,
/// without a backtrace.
pub fn exit_code(holds: anyhow::Result<bool>) -> std::process::ExitCode {
    match holds {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => std::process::ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
