//! Oncely runs WebAssembly message handlers whose effects happen once.
//!
//! The map, floor by floor; imports run strictly downwards and rooms on one floor do not know each other.
//!
//! - what people touch: `cli`, `api`
//! - loops: `host`, `worker`, `lane`, `relay`
//! - the heart: `delivery`
//! - one room per outside thing: `guest` (wasmtime), `store` (sqlx), `bus` (async-nats)
//! - plain values, no IO: `message`, `sql`, `verdict`, `manifest`, `config`, `retry`, `subject`, `units`, `toml_text`, `hint`

pub mod cli;
pub mod config;
pub mod hint;
pub mod manifest;
pub mod message;
pub mod retry;
pub mod sql;
pub mod store;
pub mod subject;
pub mod toml_text;
pub mod units;
pub mod verdict;
