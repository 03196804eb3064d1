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
