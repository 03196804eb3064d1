//! Sends HTTP requests that are safe to retry, and retries them well.
//!
//! Without a response, it is unknown whether a request was carried out. Sending it again
//! is safe if the server can recognize it. So each *operation* (one payment, one order) has one
//! `Idempotency-Key`, created once and the same on every try. A server that follows the [IETF
//! draft](https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/) answers the
//! second try with the response to the first.
//!
//! ```no_run
//! use oncely_client::{Client, Error, Method};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Error> {
//! // One client for the whole program: clones share connections and the retry budget.
//! let client = Client::new("http://127.0.0.1:8080")?;
//!
//! // POST /publish/orders.placed. The order id as the key survives a restart of the program.
//! let order = r#"{"id":"o-1","cents":1250}"#;
//! let response = client.publish("orders.placed", order).key("order-o-1").send().await?;
//! println!("{} after {} tries, replayed: {}", response.status, response.tries, response.replayed);
//!
//! // Any other request. A POST without a key gets a generated one; a GET needs none.
//! match client.call(Method::POST, "/transfers").json(&("alice", "bob", 1250)).send().await {
//!     Ok(response) => println!("{}", response.text()),
//!     Err(error) if error.is_unclear() => println!("unclear: {error}, key {:?}", error.key()),
//!     Err(error) => println!("{error}"),
//! }
//! # Ok(()) }
//! ```
//!
//! [`Builder`] has the retry settings. `docs/client.md` explains which responses are retried, and
//! why.
#![warn(missing_docs)]

mod budget;
mod client;
mod error;
mod key;
mod policy;
mod request;
mod response;
mod retry;
mod verdict;

#[cfg(test)]
mod herd;

pub use client::{Builder, Client, is_on_this_machine};
pub use error::{Error, Failure, GaveUp, GiveUpReason, Refused};
pub use request::Request;
pub use response::{Problem, Response};
// Types of the public functions.
pub use reqwest;
pub use reqwest::{Method, StatusCode, header::HeaderMap};

/// Compiles the code of the guide.
#[cfg(doctest)]
#[doc = include_str!("../../docs/client.md")]
struct Guide;
