//! `oncely test`: runs messages or requests against a component, and compares the effects with the
//! expected ones.
//!
//! Each case runs in a transaction that is rolled back, behind the same statement filter and the
//! same limits as in a host.

mod case;
mod content;
mod effects;
mod race;
mod requests;
mod runner;
mod torture;
mod update;

pub use case::{Case, CaseFile, Input};
pub use effects::Effects;
pub use race::{Racer, race};
pub use runner::{Fault, Runner};
pub use torture::{Tortured, torture};
pub use update::with_expectations;
