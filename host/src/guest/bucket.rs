//! The resources of other hosts' interfaces that a guest holds.

/// An open bucket.
pub struct Bucket {
    /// The beginning of its keys in the state: its name and a slash.
    pub prefix: String,
}

/// A key to compare and swap.
pub struct Cas {
    pub key: String,
    /// The version that a swap expects.
    pub version: Option<u64>,
    pub value: Option<Vec<u8>>,
}

/// The message of `wasmcloud:nats` that a handler receives: the one of its call.
pub struct MessageHandle;

/// A consumer that a guest reads from. Hosts provide none.
pub enum PullConsumer {}
