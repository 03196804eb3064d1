//! What the tests share: real servers on free loopback ports, removed when the test process ends, however it ends.

pub mod books;
pub mod counting;
pub mod database;
pub mod guests;
pub mod metrics;
pub mod nats;
pub mod pgbouncer;
pub mod postgres;
pub mod production;
pub mod proxy;
pub mod redis;
pub mod server;
pub mod world;

/// How a program ends: well, or with a failure when something does not hold. What went wrong is the last thing that is printed,
/// without a backtrace, whatever the environment says.
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
