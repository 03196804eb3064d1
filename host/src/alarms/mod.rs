//! Alarms: [`monitor`] raises and clears them, [`webhook`] posts them.

pub mod monitor;
mod post;
pub mod webhook;

pub use post::WebhookClient;
