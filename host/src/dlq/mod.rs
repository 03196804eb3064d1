//! Dead letters: the [`dry_run`] of a redrive, the [`replay`] of a failed attempt, and how to
//! [`verify`] a redrive.

pub mod dry_run;
pub mod replay;
pub mod verify;
