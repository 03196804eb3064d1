//! Write message handlers for Oncely in Rust.
//!
//! A handler is a function from a [`Message`] to `Result<(), Failure>`. What it does through [`sql`], [`state`] and
//! [`outbox`] happens in one database transaction together with the record that this message was handled: either
//! all of it takes effect, once, or none of it does. Returning `Ok` commits; a [`Failure`], a panic or running out
//! of time or memory rolls back.
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
//!     sql::execute("insert into orders (id, cents) values ($1, $2)", params![order.id, order.cents])?;
//!     outbox::send(Outgoing::json("orders.accepted", &order)?)?;
//!     Ok(())
//! }
//!
//! oncely_guest::handler!(handle);
//! ```
//!
//! The crate of a handler is a library with `crate-type = ["cdylib"]` that depends on `oncely-guest` and `serde`:
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
//! It builds for `wasm32-wasip2`, which yields a component, and for `wasm32-unknown-unknown`, which yields a core
//! module that `oncely` turns into one. `oncely deploy` does either by itself when the manifest says `crate = "."`.
//! On any other target it compiles too, so that `cargo check`, clippy and unit tests of plain functions work, but
//! there is no host to answer: calling [`sql`], [`state`], [`outbox`] or their siblings there panics.
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

/// The bindings of the world `worker` in `wit/`. Authors need little of them: the other modules wrap them.
#[doc(hidden)]
#[allow(unsafe_code, missing_docs, clippy::all, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
#[path = "generated/worker.rs"]
pub mod bindings;

/// The same for the world `batch-worker`: only its export differs from [`bindings`].
#[doc(hidden)]
#[allow(unsafe_code, missing_docs, clippy::all, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
#[path = "generated/batch_worker.rs"]
pub mod batch_bindings;

#[doc(hidden)]
pub use wasip2;

/// What a handler usually needs: `use oncely_guest::prelude::*;`.
pub mod prelude {
    pub use serde::{Deserialize, Serialize};

    pub use crate::outbox::Outgoing;
    pub use crate::{Failure, Message, cache, config, invocation, log, outbox, params, sql, state};
}

/// Makes a function the handler of this component. Once in a crate.
///
/// The function takes a [`Message`] and returns `Result<(), Failure>`. It is called in a fresh instance for each
/// message, unless the manifest says `isolation = "batch"`: statics hold their first value every time.
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

            // The export's name holds characters that only WebAssembly allows in a symbol.
            #[cfg(target_family = "wasm")]
            $crate::bindings::export_worker! { Worker with_types_in $crate::bindings }

            // Elsewhere nothing calls the handler; naming it keeps the compiler from finding it dead.
            #[cfg(not(target_family = "wasm"))]
            const _: fn($crate::Message) -> ::core::result::Result<(), $crate::Failure> = $handle;
        };
    };
}

/// Runs a handler as the host calls it.
#[doc(hidden)]
pub fn run(
    message: Message,
    handle: impl FnOnce(Message) -> Result<(), Failure>,
) -> Result<(), bindings::oncely::worker::types::Failure> {
    log::install_panic_hook();
    handle(message).map_err(Failure::into_wit)
}

/// Makes a function the batch handler of this component, in place of a [`handler!`]. Once in a crate.
///
/// The function takes the messages of a batch as a slice and returns one `Result<(), Failure>` for each, in their order. It
/// is for handlers that serve many messages with one SQL statement. The effects of the call belong together: when all
/// answers are `Ok` they take effect, and when some are failures none does, and the other messages come again at once
/// without those. A panic or an error of the database fails the call as a whole; its messages then come again in halves, until
/// the one that is to blame is alone. Each output says which message caused it:
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
///         if let Err(failure) = keep(messages, &readings.into_iter().flatten().collect::<Vec<_>>()) {
///             return messages.iter().map(|_| Err(failure.clone())).collect();
///         }
///         return messages.iter().map(|_| Ok(())).collect();
///     }
///     // The good ones come again, without the others.
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

            // The export's name holds characters that only WebAssembly allows in a symbol.
            #[cfg(target_family = "wasm")]
            $crate::batch_bindings::export_batch_worker! { Worker with_types_in $crate::batch_bindings }

            // Elsewhere nothing calls the handler; naming it keeps the compiler from finding it dead.
            #[cfg(not(target_family = "wasm"))]
            const _: fn(&[$crate::Message]) -> ::std::vec::Vec<::core::result::Result<(), $crate::Failure>> = $handle;
        };
    };
}

/// Runs a batch handler as the host calls it.
#[doc(hidden)]
pub fn run_batch(
    messages: &[Message],
    handle: impl FnOnce(&[Message]) -> Vec<Result<(), Failure>>,
) -> Vec<Result<(), bindings::oncely::worker::types::Failure>> {
    log::install_panic_hook();
    handle(messages)
        .into_iter()
        .map(|answer| answer.map_err(Failure::into_wit))
        .collect()
}

/// Makes a function the handler of requests over HTTP of this component, in place of a [`handler!`]. Once in a crate.
///
/// The function takes an [`http::Request`] and returns `Result<http::Response, http::Response>`: `?` answers early. A request
/// is one transaction. An answer below 400 commits what the handler did, and itself: who sends the same `Idempotency-Key`
/// again gets it again. An answer of 400 and above takes back what the handler did, and is kept as well. A panic, and running
/// out of time or memory, keep nothing: asking again runs the handler again.
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
///     let taken = sql::execute("update stock set left = left - 1 where item = $1 and left > 0", params![order.item])?;
///     if taken == 0 {
///         return Err(Response::problem(409, "sold-out", "there is none left"));
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

            // The export's name holds characters that only WebAssembly allows in a symbol.
            #[cfg(target_family = "wasm")]
            $crate::wasip2::http::proxy::export! { Worker with_types_in $crate::wasip2 }

            // Elsewhere nothing calls the handler; naming it keeps the compiler from finding it dead.
            #[cfg(not(target_family = "wasm"))]
            const _: fn(
                $crate::http::Request,
            )
                -> ::core::result::Result<$crate::http::Response, $crate::http::Response> = $handle;
        };
    };
}

/// The snippets of the guide for authors, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../docs/handlers.md")]
mod guide {}
