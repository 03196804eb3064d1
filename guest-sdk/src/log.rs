//! Log lines, written at once and kept when the delivery is rolled back.
//!
//! The macros take the arguments of `format!`:
//!
//! ```no_run
//! # use oncely_guest::prelude::*;
//! log::info!("settled {} for {}", 1250, "alice");
//! log::warn!(context: "limits", "alice is close to her limit");
//! ```

pub use crate::bindings::wasi::logging::logging::Level;
use crate::bindings::wasi::logging::logging::log;
#[doc(inline)]
pub use crate::{
    __critical as critical, __debug as debug, __error as error, __info as info, __trace as trace,
    __warn as warn,
};

/// Writes one line. `context` groups lines by topic and may be empty.
pub fn write(level: Level, context: &str, message: &str) {
    log(level, context, message);
}

/// Logs a panic before it traps: the trap alone does not carry the panic message to the dead
/// letter.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        write(Level::Critical, "panic", &panic.to_string())
    }));
}

/// One line of a level, with or without a context; shared by the six macros below.
#[doc(hidden)]
#[macro_export]
macro_rules! __log {
    ($level:ident, context: $context:expr, $($part:tt)+) => {
        $crate::log::write($crate::log::Level::$level, $context, &::std::format!($($part)+))
    };
    ($level:ident, $($part:tt)+) => {
        $crate::log::write($crate::log::Level::$level, "", &::std::format!($($part)+))
    };
}

/// Logs a step within a function.
#[doc(hidden)]
#[macro_export]
macro_rules! __trace {
    ($($part:tt)+) => { $crate::__log!(Trace, $($part)+) };
}

/// Logs details for debugging the handler.
#[doc(hidden)]
#[macro_export]
macro_rules! __debug {
    ($($part:tt)+) => { $crate::__log!(Debug, $($part)+) };
}

/// Logs normal operation.
#[doc(hidden)]
#[macro_export]
macro_rules! __info {
    ($($part:tt)+) => { $crate::__log!(Info, $($part)+) };
}

/// Logs an unexpected condition that was handled.
#[doc(hidden)]
#[macro_export]
macro_rules! __warn {
    ($($part:tt)+) => { $crate::__log!(Warn, $($part)+) };
}

/// Logs a failure.
#[doc(hidden)]
#[macro_export]
macro_rules! __error {
    ($($part:tt)+) => { $crate::__log!(Error, $($part)+) };
}

/// Logs a failure after which the handler cannot continue.
#[doc(hidden)]
#[macro_export]
macro_rules! __critical {
    ($($part:tt)+) => { $crate::__log!(Critical, $($part)+) };
}
