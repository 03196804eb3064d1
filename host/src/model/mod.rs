//! Plain values: parsed, compared and formatted without IO. Time and randomness are arguments.

pub mod alarm;
pub mod base64_text;
pub mod breaker;
pub mod cache_writes;
pub mod cloud_events;
pub mod dead_letter;
pub mod explanation;
pub mod failure_code;
pub mod failure_group;
pub mod hint;
pub mod invalidation;
pub mod keyed_state;
pub mod message;
pub mod oci;
pub mod output_ids;
pub mod redrive;
pub mod request;
pub mod retry;
pub mod signature;
pub mod sql;
pub mod subject;
pub mod trace_context;
pub mod units;
pub mod verdict;
