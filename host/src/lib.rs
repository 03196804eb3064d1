//! Oncely runs WebAssembly message handlers whose effects happen once.
//!
//! The list below is the map of the host, top layer first. An empty line separates two layers. A
//! module imports modules of lower layers only. The tidy test reads this list and checks that rule.
#![warn(missing_docs)]

// The command line: one file per command.
pub mod cli;

// The console: pages for operators, by the handlers of the control API.
mod console;

// The control API: JSON over HTTP.
mod api;

// `oncely doctor`: checks of servers, machine and settings.
mod doctor;

// A running host: start and stop, supervision of workers, deployments, restores.
mod runtime;

// `oncely audit`: compares the database with the streams.
mod audit;
// Alarms: the monitor that raises them, the webhook that posts them.
mod alarms;
// Receipts: checkpoints over settled rows, and proofs for customers.
mod receipts;
// Dead letters: dry run of a redrive, verification afterwards, replay of a failed attempt.
mod dlq;

// Tests of handlers: cases with messages and expected effects, crashes, races.
mod testing;

// A running worker: pulls messages, keeps them in order, runs batches in lanes.
mod consumer;
// HTTP requests to handlers, each with one effect per idempotency key.
mod ingress;

// State shared by all parts of a running host.
mod services;

// The relay: publishes committed outputs.
mod relay;

// The core: a batch of messages, or a request, becomes one transaction.
pub mod delivery;

// The read cache, in memory and in Redis.
pub mod cache;

// NATS JetStream, by async-nats.
pub mod bus;
// Guests: components and their calls, by wasmtime.
pub mod guest;
// HTTP listeners with bounds on connections, time and memory, by hyper.
mod http_server;
// Logins with an OpenID Connect provider, by jsonwebtoken.
mod oidc;
// OCI registries: components and their signatures.
mod registry;
// The database, by sqlx.
pub mod store;
// Traces: recorded spans and their export over OTLP.
pub mod traces;

// Inspection of a component before it is compiled, by wasmparser.
mod component;
// Settings of the host and the manifest of an application.
pub mod config;
// Metrics and health.
pub mod metrics;
// Requests to other servers over HTTP and HTTPS, by hyper and rustls.
mod https;

// Ordered shutdown.
pub mod drain;

// Plain values without IO.
pub mod model;

// Named crash points, for tests.
pub mod fault;
