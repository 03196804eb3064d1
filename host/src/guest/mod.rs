//! WebAssembly: loads components and runs them.
//!
//! A component becomes a [`Guest`]. A guest runs once for each message or request, in a fresh
//! instance. A worker can configure less isolation.
//!
//! A guest has no effect of its own. The host buffers its outputs and state changes. SQL goes
//! through the [`Database`] of the call. The [`CallOutcome`] holds all effects, and the delivery
//! commits or discards them.

mod backends;
mod bindings;
mod bucket;
mod call;
mod code;
mod compile;
mod component;
mod engine;
mod failure;
mod function_cache;
mod http;
mod imports;
mod kind;
mod limiter;
mod logs;
mod record;
mod recorder;
mod shared;
mod state;
mod wasi;
mod wasi3;

pub use backends::{CacheReader, CachedValue, Database, Deferral};
pub use call::{CallOutcome, WarmInstance};
pub use compile::{COMMAND as COMPILE_COMMAND, compile_component};
pub use component::Guest;
pub use engine::GuestEngine;
pub use failure::{CallFailure, FailureKind, HandlerResult};
pub use http::{header_to_bytes, header_to_text};
pub use kind::check_kind;
pub use record::{HostCall, HostResult, RECORD_FORMAT, Record, Step};
pub use recorder::{PlaybackEnd, Recorder, ReplayProgress};
pub use shared::SharedGuests;
pub use state::{Call, RequestCall};
