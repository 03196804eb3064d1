//! WebAssembly: a component becomes a [`Guest`], and a guest runs once for each message, or request, in a fresh instance,
//! unless its worker asks for less isolation.
//!
//! A guest has no effect of its own. Outputs and state changes are buffered in the host, SQL goes through the
//! [`Database`] it is lent; what comes back is a [`CallOutcome`] that the delivery keeps or throws away.

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
