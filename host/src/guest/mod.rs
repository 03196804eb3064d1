//! WebAssembly: loads components and runs them.
//!
//! A component becomes a [`Guest`]. A guest runs once for each message or request, in a fresh
//! instance. A worker can configure less isolation.
//!
//! A guest has no effect of its own. The host buffers its outputs and state changes. SQL goes
//! through the [`Database`] of the call. The [`CallOutcome`] holds all effects, and the delivery
//! commits or discards them.

mod bindings;
mod call;
mod compile;
mod component;
mod engine;
mod http;
mod imports;
mod kind;
mod limiter;
mod logs;
mod record;
mod recorder;
mod wasi;

pub use call::{
    Call, CallFailure, CallOutcome, FailureKind, HandlerResult, ReplayProgress, WarmInstance,
};
pub use compile::{COMMAND as COMPILE_COMMAND, compile_component};
pub use component::Guest;
pub use engine::GuestEngine;
pub use http::{RequestCall, header_to_bytes, header_to_text};
pub use imports::{CacheReader, CachedValue, Database};
pub use kind::check_kind;
pub use record::{HostCall, HostResult, RECORD_FORMAT, Record, Step};
pub use recorder::{PlaybackEnd, Recorder};
