//! Oncely runs WebAssembly message handlers whose effects happen once.
//!
//! The map, floor by floor; imports run strictly downwards and rooms on one floor do not know each other.
//!
//! - what people touch: `cli`, `api`
//! - loops: `host` (with `deploy`, `reconcile`, `replay` and `watch`), `worker`, `lane`, `relay`, `ingress`, `webhook`,
//!   `cache_feed`, `drain`
//! - the heart: `delivery`
//! - one room per outside thing: `guest` (wasmtime), `store` (sqlx), `bus` (async-nats), `cache` (moka,
//!   redis), `http_server` (hyper), `crate_build` (cargo)
//! - plain values, no IO: `message`, `output_ids`, `request`, `sql`, `state`, `verdict`, `dead_letter`, `redrive`, `manifest`, `config`, `retry`,
//!   `subject`, `units`, `toml_text`, `base64_text`, `hint`, `breaker`, `metrics`, `alarm`, `health`,
//!   `failure_group`, `cached`, `invalidation`, `component`; and `fault`, named points and mutants for tests

pub mod alarm;
pub mod api;
pub mod base64_text;
pub mod breaker;
pub mod bus;
pub mod cache;
pub mod cache_feed;
pub mod cached;
pub mod cli;
pub mod component;
pub mod config;
pub mod crate_build;
pub mod dead_letter;
pub mod delivery;
pub mod deploy;
pub mod drain;
pub mod failure_group;
pub mod fault;
pub mod guest;
pub mod health;
pub mod hint;
pub mod host;
pub mod http_server;
pub mod ingress;
pub mod invalidation;
pub mod lane;
pub mod manifest;
pub mod message;
pub mod metrics;
pub mod output_ids;
pub mod reconcile;
pub mod redrive;
pub mod relay;
pub mod replay;
pub mod request;
pub mod retry;
pub mod sql;
pub mod state;
pub mod store;
pub mod subject;
pub mod toml_text;
pub mod units;
pub mod verdict;
pub mod watch;
pub mod webhook;
pub mod worker;
