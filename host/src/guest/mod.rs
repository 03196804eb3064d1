//! WebAssembly: a component becomes a [`Guest`], and a guest runs once for each message, or request, in a fresh instance,
//! unless its worker asks for less isolation.
//!
//! A guest has no effect of its own. Outputs and state changes are buffered in the host, SQL goes through the
//! [`Database`] it is lent; what comes back is an [`Outcome`] that the delivery keeps or throws away.

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
mod tape;
mod wasi;

pub use call::{Answer, Call, CallFailure, FailureKind, Outcome, Replayed, Warm};
pub use compile::{COMMAND as COMPILE_COMMAND, compile_component};
pub use component::Guest;
pub use engine::GuestEngine;
pub use http::{RequestCall, bytes_of, text_of};
pub use imports::{CachedValue, CachedValues, Database};
pub use kind::check_kind;
pub use record::{Asked, RECORD_FORM, Record, Saw, Step};
pub use tape::{Ended, Tape};
