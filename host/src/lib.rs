//! Oncely runs WebAssembly message handlers whose effects happen once.
//!
//! The map, floor by floor; imports run strictly downwards and rooms on one floor do not know each other.
//!
//! - what people touch: `cli`, `api`
//! - loops: `host`, `worker`, `lane`, `relay`
//! - the heart: `delivery`
//! - one room per outside thing: `guest` (wasmtime), `store` (sqlx), `bus` (async-nats)
//! - plain values, no IO: `message`, `sql`, `verdict`, `manifest`, `retry`
//!
//! Beside them stands `crate_build`, which knows no other module: Rust crates in, components out.

pub mod crate_build;
pub mod message;
pub mod sql;
pub mod store;
pub mod verdict;
