//! Sends HTTP requests that are safe to retry, and retries them well.
//!
//! Whoever sends a request and hears nothing does not know whether it was carried out. Sending it again is safe if the
//! server can tell that it is the same: so each *operation* (one payment, one order) has one `Idempotency-Key`, made
//! once and the same on every try, and a server that follows the
//! [IETF draft](https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/) answers the second try
//! with what it answered the first.
//!
//! ```no_run
//! use oncely_client::{Client, Error, Method};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Error> {
//! // One for the whole program: clones share connections and the retry budget.
//! let client = Client::new("http://127.0.0.1:8080")?;
//!
//! // POST /publish/orders.placed, under a key of ours: if the program dies here, the next one goes on.
//! let response = client.publish("orders.placed", r#"{"id":"o-1","cents":1250}"#).key("order-o-1").send().await?;
//! println!("{} in {} tries, replayed: {}", response.status, response.tries, response.replayed);
//!
//! // Any other request. A POST without a key of ours gets one of its own; a GET needs none.
//! match client.call(Method::POST, "/transfers").json(&("alice", "bob", 1250)).send().await {
//!     Ok(response) => println!("{}", response.text()),
//!     Err(error) if error.is_unclear() => println!("{error}\nmay have been done, under the key {:?}", error.key()),
//!     Err(error) => println!("{error}"),
//! }
//! # Ok(()) }
//! ```
//!
//! How it retries: [`Builder`] has the numbers, `docs/client.md` the table and the reasons.

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
// What the public functions take and give.
pub use reqwest;
pub use reqwest::{Method, StatusCode, header::HeaderMap};

/// The code in the guide compiles.
#[cfg(doctest)]
#[doc = include_str!("../../docs/client.md")]
struct Guide;
