//! Dead letters: what a redrive would do ([`dry_run`]), what became of it ([`verify`]), and a failed attempt run again from its
//! recording ([`replay`]).

pub mod dry_run;
pub mod replay;
pub mod verify;
