//! Write message handlers for Oncely in Rust.
//!
//! A handler is a function from a [`Message`] to `Result<(), Failure>`. Its effects through
//! [`sql`], [`state`] and [`outbox`] belong to one database transaction. The record that the
//! message was handled is part of that transaction. Either all of these effects are committed,
//! once, or none of them. Returning `Ok` commits; a [`Failure`], a panic or running out of time or
//! memory rolls back.
//!
//! ```
//! use oncely_guest::prelude::*;
//!
//! #[derive(Deserialize, Serialize)]
//! struct Order {
//!     id: String,
//!     cents: i64,
//! }
//!
//! fn handle(message: Message) -> Result<(), Failure> {
//!     let order: Order = message.json()?;
//!     let insert = "insert into orders (id, cents) values ($1, $2)";
//!     sql::execute(insert, params![order.id, order.cents])?;
//!     outbox::send(Outgoing::json("orders.accepted", &order)?)?;
//!     Ok(())
//! }
//!
//! oncely_guest::handler!(handle);
//! ```
//!
//! The crate of a handler is a library with `crate-type = ["cdylib"]` that depends on
//! `oncely-guest` and `serde`:
//!
//! ```toml
//! [lib]
//! crate-type = ["cdylib"]
//!
//! [dependencies]
//! oncely-guest = "0.1"
//! serde = { version = "1", features = ["derive"] }
//! ```
//!
//! It builds for `wasm32-wasip2`, which yields a component, and for `wasm32-unknown-unknown`, which
//! yields a core module that `oncely` turns into a component. `oncely deploy` does both steps when
//! the manifest says `crate = "."`. The crate also compiles for any other target, so that
//! `cargo check`, clippy and unit tests of plain functions work. There is no host on such a target:
//! calling [`sql`], [`state`], [`outbox`] or their siblings panics.
#![warn(missing_docs)]

pub mod cache;
pub mod config;
mod failure;
pub mod http;
pub mod invocation;
pub mod log;
mod message;
pub mod outbox;
pub mod sql;
pub mod state;

pub use failure::{Failure, FailureKind};
pub use message::{Headers, Message, Origin};

/// The bindings of the world `worker` in `wit/`. Authors need few of them: the other modules wrap
/// them.
#[doc(hidden)]
#[allow(unsafe_code, missing_docs, clippy::all, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
#[path = "generated/worker.rs"]
pub mod bindings;

/// The bindings of the world `batch-worker`. Only its export differs from [`bindings`].
#[doc(hidden)]
#[allow(unsafe_code, missing_docs, clippy::all, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
#[path = "generated/batch_worker.rs"]
pub mod batch_bindings;

#[doc(hidden)]
pub use wasip2;

/// The usual imports of a handler: `use oncely_guest::prelude::*;`.
pub mod prelude {
    pub use serde::{Deserialize, Serialize};

    pub use crate::outbox::Outgoing;
    pub use crate::{Failure, Message, cache, config, invocation, log, outbox, params, sql, state};
}

/// Exports a function as the handler of this component. Use it once per crate.
///
/// The function takes a [`Message`] and returns `Result<(), Failure>`. Each message is handled in a
/// fresh instance, so statics have their initial value, unless the manifest says
/// `isolation = "batch"`.
///
/// ```
/// # use oncely_guest::prelude::*;
/// fn handle(message: Message) -> Result<(), Failure> {
///     log::info!("{} bytes on {}", message.body.len(), message.subject);
///     Ok(())
/// }
///
/// oncely_guest::handler!(handle);
/// ```
#[macro_export]
macro_rules! handler {
    ($handle:expr) => {
        #[allow(
            unsafe_code,
            reason = "exporting a function by name is unsafe to the compiler"
        )]
        const _: () = {
            struct Worker;

            impl $crate::bindings::exports::oncely::worker::handler::Guest for Worker {
                fn handle(
                    message: $crate::Message,
                ) -> ::core::result::Result<(), $crate::bindings::oncely::worker::types::Failure>
                {
                    $crate::run(message, $handle)
                }
            }

            // The name of the export has characters that only WebAssembly allows in a symbol.
            #[cfg(target_family = "wasm")]
            $crate::bindings::export_worker! { Worker with_types_in $crate::bindings }

            // Other targets do not call the handler. Naming it prevents a dead-code warning.
            #[cfg(not(target_family = "wasm"))]
            const _: fn($crate::Message) -> ::core::result::Result<(), $crate::Failure> = $handle;
        };
    };
}

/// Runs a handler for one message of the host.
#[doc(hidden)]
pub fn run(
    message: Message,
    handle: impl FnOnce(Message) -> Result<(), Failure>,
) -> Result<(), bindings::oncely::worker::types::Failure> {
    log::install_panic_hook();
    handle(message).map_err(Failure::into_wit)
}

/// Exports a function as the batch handler of this component, in place of a [`handler!`]. Use it
/// once per crate.
///
/// The function takes the messages of a batch as a slice and returns one `Result<(), Failure>` for
/// each, in the same order. It suits handlers that serve many messages with one SQL statement.
///
/// The effects of a call belong together. When all results are `Ok`, they are committed. When some
/// results are failures, all effects are rolled back, and the other messages are handled again at
/// once in a call without the failed ones. A panic or an error of the database fails the call as a
/// whole. Its messages are then handled again in halves, until the failing message is alone. Each
/// output names the message that caused it:
///
/// ```
/// use oncely_guest::prelude::*;
///
/// #[derive(Deserialize, Serialize)]
/// struct Reading {
///     meter: String,
///     value: i64,
/// }
///
/// fn handle(messages: &[Message]) -> Vec<Result<(), Failure>> {
///     let readings: Vec<Result<Reading, Failure>> = messages.iter().map(Message::json).collect();
///     if readings.iter().all(Result::is_ok) {
///         let readings: Vec<Reading> = readings.into_iter().flatten().collect();
///         if let Err(failure) = keep(messages, &readings) {
///             return messages.iter().map(|_| Err(failure.clone())).collect();
///         }
///         return messages.iter().map(|_| Ok(())).collect();
///     }
///     // The valid ones are handled again, without the others.
///     readings.into_iter().map(|reading| reading.map(|_| ())).collect()
/// }
///
/// fn keep(messages: &[Message], readings: &[Reading]) -> Result<(), Failure> {
///     let all = serde_json::to_string(readings)?;
///     sql::execute(
///         "insert into reading (meter, value)
///          select value ->> 'meter', value ->> 'value' from json_each($1)",
///         params![all],
///     )?;
///     for (message, reading) in messages.iter().zip(readings) {
///         outbox::send(Outgoing::json("readings.kept", reading)?.caused_by(message))?;
///     }
///     Ok(())
/// }
///
/// oncely_guest::batch_handler!(handle);
/// ```
#[macro_export]
macro_rules! batch_handler {
    ($handle:expr) => {
        #[allow(unsafe_code, reason = "exporting a function by name is unsafe to the compiler")]
        const _: () = {
            struct Worker;

            impl $crate::batch_bindings::exports::oncely::worker::batch_handler::Guest for Worker {
                fn handle_batch(
                    messages: ::std::vec::Vec<$crate::Message>,
                ) -> ::std::vec::Vec<::core::result::Result<(), $crate::bindings::oncely::worker::types::Failure>>
                {
                    $crate::run_batch(&messages, $handle)
                }
            }

            // The name of the export has characters that only WebAssembly allows in a symbol.
            #[cfg(target_family = "wasm")]
            $crate::batch_bindings::export_batch_worker! { Worker with_types_in $crate::batch_bindings }

            // Other targets do not call the handler. Naming it prevents a dead-code warning.
            #[cfg(not(target_family = "wasm"))]
            const _: fn(&[$crate::Message]) -> ::std::vec::Vec<::core::result::Result<(), $crate::Failure>> = $handle;
        };
    };
}

/// Runs a batch handler for the messages of one call of the host.
#[doc(hidden)]
pub fn run_batch(
    messages: &[Message],
    handle: impl FnOnce(&[Message]) -> Vec<Result<(), Failure>>,
) -> Vec<Result<(), bindings::oncely::worker::types::Failure>> {
    log::install_panic_hook();
    handle(messages)
        .into_iter()
        .map(|result| result.map_err(Failure::into_wit))
        .collect()
}

/// Exports a function as the HTTP handler of this component, in place of a [`handler!`]. Use it
/// once per crate.
///
/// The function takes an [`http::Request`] and returns `Result<http::Response, http::Response>`:
/// `?` returns a response early. Each request is one transaction. A response below 400 commits the
/// effects of the handler together with the response. A retry with the same `Idempotency-Key` gets
/// the stored response. A response of 400 or above rolls the effects back and is stored as well. A
/// panic, and running out of time or memory, store nothing: a retry runs the handler again.
///
/// ```
/// use oncely_guest::http::{Request, Response};
/// use oncely_guest::prelude::*;
///
/// #[derive(Deserialize)]
/// struct Order {
///     item: String,
/// }
///
/// fn handle(request: Request) -> Result<Response, Response> {
///     let order: Order = request.json()?;
///     let take = "update stock set left = left - 1 where item = $1 and left > 0";
///     if sql::execute(take, params![order.item])? == 0 {
///         return Err(Response::problem(409, "sold-out", "the item is sold out"));
///     }
///     outbox::send(Outgoing::new("orders.accepted", request.body))?;
///     Ok(Response::json(201, &serde_json::json!({ "accepted": true })))
/// }
///
/// oncely_guest::http_handler!(handle);
/// ```
#[macro_export]
macro_rules! http_handler {
    ($handle:expr) => {
        #[allow(
            unsafe_code,
            reason = "exporting a function by name is unsafe to the compiler"
        )]
        const _: () = {
            struct Worker;

            impl $crate::wasip2::exports::http::incoming_handler::Guest for Worker {
                fn handle(
                    request: $crate::wasip2::http::types::IncomingRequest,
                    out: $crate::wasip2::http::types::ResponseOutparam,
                ) {
                    $crate::http::run(&request, out, $handle)
                }
            }

            // The name of the export has characters that only WebAssembly allows in a symbol.
            #[cfg(target_family = "wasm")]
            $crate::wasip2::http::proxy::export! { Worker with_types_in $crate::wasip2 }

            // Other targets do not call the handler. Naming it prevents a dead-code warning.
            #[cfg(not(target_family = "wasm"))]
            const _: fn(
                $crate::http::Request,
            )
                -> ::core::result::Result<$crate::http::Response, $crate::http::Response> = $handle;
        };
    };
}

/// Compiles the snippets of the guide.
#[cfg(doctest)]
#[doc = include_str!("../../docs/handlers.md")]
mod guide {}
