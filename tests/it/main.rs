//! All tests that need real servers, one module per subject.

/// Runs a test on both databases: `both!(name, |kind| async move { ... })`.
macro_rules! both {
    ($name:ident, $test:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_sqlite() -> anyhow::Result<()> {
                let test = $test;
                test(support::database::Kind::Sqlite).await
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn on_postgres() -> anyhow::Result<()> {
                let test = $test;
                test(support::database::Kind::Postgres).await
            }
        }
    };
}

mod access;
mod alarms;
mod audit;
mod batches;
mod bindings;
mod build;
mod bus;
mod cache;
mod cases;
mod cli;
mod client;
mod cloudevents;
mod compile;
mod conformance;
mod console;
mod crash;
mod deferred;
mod delivery;
mod deploy;
mod deploy_plan;
mod deploy_secrets;
mod docs;
mod doctor;
mod first_run;
mod hints;
mod hostile;
mod ids;
mod ingress;
mod jobs;
mod ledger;
mod mcp;
mod metrics;
mod monitoring;
mod new;
mod oci;
mod openapi;
mod operating;
mod operators;
mod order;
mod positions;
mod relay;
mod relay_modes;
mod repair;

mod dry_run;
mod hosts;
mod installations;
mod others;
mod outage;
mod packaging;
mod receipts;
mod redrive;
mod replay;
mod restores;
mod schemas;
mod store;
mod takeover;
mod tidy;
mod toolchains;
mod traces;
mod wal;
