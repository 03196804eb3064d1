//! Receipts: the proof that a checkpoint contains the outcome of an event.
//!
//! About once a minute the rows that were settled since become the leaves of a tree, see
//! [`merkle`]. A *checkpoint* names its root and the checkpoint before it, so that checkpoints are
//! a chain, and it is published. `docs/receipts.md` describes the format for other verifiers.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::merkle::Hash;
use crate::model::message::{Output, OutputKind};
use crate::model::schema::Time;

pub mod block;
pub mod merkle;
mod verify;

pub use verify::{Verified, verify};

/// The stream of checkpoints.
pub const CHECKPOINT_STREAM: &str = "ONCELY_CHECKPOINTS";

/// The subjects of [`CHECKPOINT_STREAM`].
pub const CHECKPOINT_SUBJECTS: &str = "oncely.checkpoint.>";

/// The owner of the published checkpoints in the outbox. No worker can have this name.
pub const CHECKPOINT_OWNER: &str = "oncely:checkpoint";

/// The versions of the encodings.
const CHECKPOINT_FORMAT: &str = "oncely-checkpoint/1";
const RECEIPT_FORMAT: &str = "oncely-receipt/1";
const LEAF_VERSION: u32 = 1;

/// The purpose of a checkpoint's hash. Leaves have 0 and nodes 1.
const CHECKPOINT_PURPOSE: u8 = 2;

/// The key of a leaf's salt.
const SALT: &str = "salt";

/// The number of leaves whose subtree has one root in the database: a power of two.
pub const BLOCK: usize = 1024;

/// A row as a leaf. The field names are those of the JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Leaf {
    /// A row of the inbox.
    Event(EventLeaf),
    /// The publication of an output.
    Output(OutputLeaf),
    /// A change that an operator requested.
    Activity(ActivityLeaf),
    /// The result of such a change.
    ActivityOutcome(ActivityOutcomeLeaf),
}

/// A settled event of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventLeaf {
    /// The name of the worker.
    pub worker: String,
    /// The event id.
    pub event: String,
    /// `done`, `dead` or `skipped`.
    pub outcome: String,
    /// SHA-256 over the length of the subject, the subject and the body; hex.
    pub payload: String,
    /// The stream of the message, if it came from one.
    pub stream: Option<String>,
    /// Its sequence there.
    pub sequence: Option<u64>,
    /// The time of the transaction, on the database's clock.
    pub at: Timestamp,
    /// The outputs of that transaction, in their order. `None` if they left the outbox before the
    /// checkpoint was closed.
    pub outputs: Option<Vec<OutputDigest>>,
}

/// An output, as its event names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputDigest {
    /// The number of the output in the outbox.
    pub number: i64,
    /// The subject to which it is published.
    pub subject: String,
    /// SHA-256 of the body, hex.
    pub sha256: String,
}

/// A published output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputLeaf {
    /// The worker of its event.
    pub worker: String,
    /// The event id.
    pub event: String,
    /// The number of the output in the outbox.
    pub number: i64,
    /// The `Nats-Msg-Id` under which it was published.
    pub id: String,
    /// The stream that stored it.
    pub stream: String,
    /// Its sequence there.
    pub sequence: u64,
    /// When the publication was recorded.
    pub at: Timestamp,
}

/// An activity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivityLeaf {
    /// The id of the activity.
    pub id: i64,
    /// The name of the token.
    pub actor: String,
    /// The name of the command.
    pub verb: String,
    /// The worker concerned, if it is one.
    pub worker: Option<String>,
    /// The changed thing.
    pub object: String,
    /// SHA-256 of the parameters, hex.
    pub details: String,
    /// When the change was requested.
    pub at: Timestamp,
}

/// The outcome of an activity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivityOutcomeLeaf {
    /// The id of the activity.
    pub id: i64,
    /// `done` or `failed`.
    pub outcome: String,
    /// SHA-256 of the error and the result, hex.
    pub details: String,
    /// The end of the change.
    pub at: Timestamp,
}

/// A closed set of leaves. Its hash covers all fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// [`Checkpoint::computed_hash`], for display and comparison.
    pub hash: String,
    /// Always `oncely-checkpoint/1`.
    pub format: String,
    /// The id of the database with its hosts.
    pub installation: String,
    /// 1 for the first one.
    pub number: u64,
    /// The hash of the checkpoint before; `None` for the first one.
    pub previous: Option<String>,
    /// When it was closed, on the database's clock.
    #[schemars(with = "Time")]
    pub closed_at: Timestamp,
    /// The number of leaves.
    pub leaves: u64,
    /// The root of the tree over them, hex.
    pub root: String,
}

/// A leaf with the path that leads to the root of its checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// The leaf with its salt. Its canonical form is hashed, see [`canonical`].
    pub leaf: Value,
    /// The number of its checkpoint.
    pub checkpoint: u64,
    /// Its index among the leaves, from 0.
    pub index: u64,
    /// The hashes beside the way to the root, lowest first, hex.
    pub path: Vec<String>,
}

/// A file that proves the outcome of an event without the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Always `oncely-receipt/1`.
    pub format: String,
    /// The event.
    pub event: Proof,
    /// The publications of its outputs, as far as they are in a checkpoint.
    pub outputs: Vec<Proof>,
    /// The checkpoints from the first to the last one that the proofs name, without a gap.
    pub checkpoints: Vec<Checkpoint>,
}

impl Leaf {
    /// The time of the row.
    pub fn at(&self) -> Timestamp {
        match self {
            Leaf::Event(leaf) => leaf.at,
            Leaf::Output(leaf) => leaf.at,
            Leaf::Activity(leaf) => leaf.at,
            Leaf::ActivityOutcome(leaf) => leaf.at,
        }
    }

    /// Distinguishes the row from all others, also from a later row of the same event.
    pub fn identity(&self) -> [u8; 16] {
        let at = self.at().as_microsecond().to_string();
        let parts: [&str; 4] = match self {
            Leaf::Event(leaf) => ["event", &leaf.worker, &leaf.event, &at],
            Leaf::Output(leaf) => {
                let place = format!("{} {} {}", leaf.number, leaf.sequence, leaf.stream);
                return identity(["output", &leaf.worker, &place, &at]);
            }
            Leaf::Activity(leaf) => ["activity", "", &leaf.id.to_string(), ""],
            Leaf::ActivityOutcome(leaf) => ["activity-outcome", "", &leaf.id.to_string(), ""],
        };
        identity(parts)
    }

    /// The text that is stored: canonical JSON without the salt. Also its value.
    ///
    /// # Errors
    /// None, for values as they come from the database.
    pub fn to_parts(&self) -> Result<(String, serde_json::Map<String, Value>)> {
        let Value::Object(mut fields) = serde_json::to_value(self).context("write a leaf")? else {
            anyhow::bail!("a leaf is no object");
        };
        fields.insert("v".to_owned(), LEAF_VERSION.into());
        let text = canonical_object(&fields);
        Ok((text, fields))
    }

    /// Reads a leaf from JSON.
    ///
    /// # Errors
    /// The JSON is no leaf of a known version.
    pub fn from_value(value: &Value) -> Result<Self> {
        anyhow::ensure!(
            value["v"] == LEAF_VERSION,
            "the leaf has another version than {LEAF_VERSION}"
        );
        Leaf::deserialize(value).context("read a leaf")
    }
}

fn identity(parts: [&str; 4]) -> [u8; 16] {
    let lengths = parts.map(|part| (part.len() as u64).to_be_bytes());
    let pieces: Vec<&[u8]> = lengths
        .iter()
        .zip(parts)
        .flat_map(|(length, part)| [length.as_slice(), part.as_bytes()])
        .collect();
    let mut identity = [0; 16];
    let hash = merkle::hash(3, &pieces);
    identity.copy_from_slice(hash.split_at(16).0);
    identity
}

/// A stored leaf with its salt, as it is hashed and shown. Without the salt, a neighbour in the
/// tree could be guessed from its hash.
///
/// # Errors
/// The text is no JSON object.
pub fn salted(text: &str, salt: String) -> Result<Value> {
    let fields = serde_json::from_str(text).context("read a leaf")?;
    Ok(with_salt(fields, salt))
}

/// The same for a leaf that is read already.
pub fn with_salt(mut fields: serde_json::Map<String, Value>, salt: String) -> Value {
    fields.insert(SALT.to_owned(), salt.into());
    Value::Object(fields)
}

/// The hash of a leaf with its salt.
pub fn hash_of(leaf: &Value) -> Hash {
    merkle::leaf_hash(canonical(leaf).as_bytes())
}

/// The canonical JSON of RFC 8785 for values without fractions: keys in order, no white space.
pub fn canonical(value: &Value) -> String {
    match value {
        Value::Object(fields) => canonical_object(fields),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(canonical).collect();
            format!("[{}]", items.join(","))
        }
        other => other.to_string(),
    }
}

fn canonical_object(fields: &serde_json::Map<String, Value>) -> String {
    let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
    let pair = |(key, value): (&String, &Value)| {
        format!("{}:{}", Value::from(key.as_str()), canonical(value))
    };
    let pairs: Vec<String> = sorted.into_iter().map(pair).collect();
    format!("{{{}}}", pairs.join(","))
}

impl Checkpoint {
    /// A checkpoint after `previous`.
    pub fn new(
        installation: &str,
        previous: Option<(u64, String)>,
        closed_at: Timestamp,
        leaves: u64,
        root: &Hash,
    ) -> Self {
        let (number, previous) = match previous {
            Some((number, hash)) => (number + 1, Some(hash)),
            None => (1, None),
        };
        let mut checkpoint = Checkpoint {
            hash: String::new(),
            format: CHECKPOINT_FORMAT.to_owned(),
            installation: installation.to_owned(),
            number,
            previous,
            closed_at,
            leaves,
            root: hex::encode(root),
        };
        checkpoint.hash = checkpoint.computed_hash();
        checkpoint
    }

    /// SHA-256 over a byte 2 and the canonical JSON of all fields but `hash`, hex.
    pub fn computed_hash(&self) -> String {
        // Serialization cannot fail: the fields are text, numbers and a time.
        Checkpoint::hash_of(&serde_json::to_value(self).unwrap_or_default())
    }

    /// The same for a checkpoint as it was read.
    fn hash_of(checkpoint: &Value) -> String {
        let mut value = checkpoint.clone();
        if let Value::Object(fields) = &mut value {
            fields.remove("hash");
        }
        let text = canonical(&value);
        hex::encode(merkle::hash(CHECKPOINT_PURPOSE, &[text.as_bytes()]))
    }

    /// The subject under which an installation publishes its checkpoints.
    pub fn subject(installation: &str) -> String {
        format!("oncely.checkpoint.{installation}")
    }

    /// The message with this checkpoint.
    pub fn output(&self) -> Output {
        let id = format!("checkpoint:{}", self.hash);
        Output {
            kind: OutputKind::Checkpoint,
            event_id: id.clone(),
            id,
            ordinal: 0,
            subject: Checkpoint::subject(&self.installation),
            headers: vec![("Content-Type".to_owned(), "application/json".to_owned())],
            body: serde_json::to_vec(self).unwrap_or_default().into(),
            // Published in their order.
            ordering_key: Some(CHECKPOINT_OWNER.to_owned()),
            delay: std::time::Duration::ZERO,
        }
    }
}

impl Receipt {
    /// A receipt of the current format.
    pub fn new(event: Proof, outputs: Vec<Proof>, checkpoints: Vec<Checkpoint>) -> Self {
        Receipt {
            format: RECEIPT_FORMAT.to_owned(),
            event,
            outputs,
            checkpoints,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn canonical_json_has_sorted_keys_and_no_space() {
        let value = json!({"b": [1, null, {"z": "\u{1}é\"\n", "a": true}], "a": {}});
        let expected = "{\"a\":{},\"b\":[1,null,{\"a\":true,\"z\":\"\\u0001é\\\"\\n\"}]}";
        assert_eq!(canonical(&value), expected);
    }

    #[test]
    fn a_leaf_is_read_as_it_was_written() {
        let leaf = Leaf::Event(EventLeaf {
            worker: "pay".to_owned(),
            event: "e\u{0}\"1".to_owned(),
            outcome: "done".to_owned(),
            payload: "ab".to_owned(),
            stream: None,
            sequence: None,
            at: Timestamp::from_microsecond(1_700_000_000_000_001).unwrap(),
            outputs: Some(vec![OutputDigest {
                number: 7,
                subject: "out.x".to_owned(),
                sha256: "cd".to_owned(),
            }]),
        });
        let (text, _) = leaf.to_parts().unwrap();
        assert!(
            text.starts_with(r#"{"at":"2023-11-14T22:13:20.000001Z","#),
            "{text}"
        );
        let value = salted(&text, "5a17".to_owned()).unwrap();
        assert_eq!(Leaf::from_value(&value).unwrap(), leaf);
        assert_ne!(
            hash_of(&value),
            hash_of(&salted(&text, "5a18".to_owned()).unwrap())
        );
    }

    #[test]
    fn the_hash_of_a_checkpoint_covers_every_field() {
        let at = Timestamp::UNIX_EPOCH;
        let first = Checkpoint::new("0123", None, at, 3, &[7; 32]);
        let second = Checkpoint::new("0123", Some((1, first.hash.clone())), at, 3, &[7; 32]);
        assert_eq!((first.number, second.number), (1, 2));
        assert_ne!(first.hash, second.hash);
        let changes: [fn(&mut Checkpoint); 6] = [
            |one| one.installation.push('x'),
            |one| one.number += 1,
            |one| one.previous = None,
            |one| one.closed_at = Timestamp::MAX,
            |one| one.leaves += 1,
            |one| one.root.push('0'),
        ];
        for change in changes {
            let mut changed = second.clone();
            change(&mut changed);
            assert_ne!(changed.computed_hash(), second.hash);
        }
    }
}
