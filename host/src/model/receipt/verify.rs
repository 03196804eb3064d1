//! Verification of a receipt, without the host.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, bail, ensure};

use serde_json::Value;

use super::merkle::{self, Hash};
use super::{CHECKPOINT_FORMAT, Checkpoint, EventLeaf, Leaf, OutputLeaf, Proof, RECEIPT_FORMAT};
use super::{Receipt, hash_of};

/// The contents of a receipt whose proofs hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The event with its outcome.
    pub event: EventLeaf,
    /// The checkpoint of the event.
    pub checkpoint: Checkpoint,
    /// The last checkpoint that the proofs name. Its hash is to be compared with a published copy.
    pub last: Checkpoint,
    /// The publications of its outputs.
    pub outputs: Vec<OutputLeaf>,
    /// Whether the last checkpoint is the one that was given.
    pub is_anchored: bool,
}

/// Verifies a receipt. With `anchor`, the hash of a published checkpoint, that has to be the last
/// one that the proofs name.
///
/// # Errors
/// A proof does not hold, or the anchor is another one. The message names the part.
pub fn verify(text: &[u8], anchor: Option<&str>) -> Result<Verified> {
    let receipt: Receipt = serde_json::from_slice(text).context("read the receipt")?;
    // As it is written: two forms of a time have two hashes.
    let written: Value = serde_json::from_slice(text).context("read the receipt")?;
    let written = written["checkpoints"].as_array();
    check_hashes(&receipt.checkpoints, written.into_iter().flatten())?;
    ensure!(
        receipt.format == RECEIPT_FORMAT,
        "the format is `{}`, not `{RECEIPT_FORMAT}`",
        receipt.format
    );
    check_chain(&receipt.checkpoints)?;

    // The event.
    let leaf = check(&receipt.event, &receipt.checkpoints).context("the proof of the event")?;
    let Leaf::Event(event) = leaf else {
        bail!("the proof of the event: the leaf is no event");
    };

    // The places of its outputs.
    let mut outputs = Vec::new();
    let mut seen = BTreeSet::new();
    for (place, proof) in receipt.outputs.iter().enumerate() {
        let name = || format!("the proof of output {place}");
        let leaf = check(proof, &receipt.checkpoints).with_context(name)?;
        let Leaf::Output(output) = leaf else {
            return Err(anyhow!("the leaf is no output").context(name()));
        };
        let mut listed = event.outputs.iter().flatten();
        let is_listed = listed.any(|one| one.number == output.number);
        if !is_listed || output.worker != event.worker || output.event != event.event {
            return Err(anyhow!("the output is of another event").context(name()));
        }
        if !seen.insert(output.number) {
            return Err(anyhow!("the output is there twice").context(name()));
        }
        outputs.push(output);
    }

    // The checkpoints that the proofs name are the first, the last and those between.
    let named = || std::iter::once(&receipt.event).chain(&receipt.outputs);
    let numbers: BTreeSet<u64> = named().map(|proof| proof.checkpoint).collect();
    let (Some(first), Some(last)) = (receipt.checkpoints.first(), receipt.checkpoints.last())
    else {
        bail!("the receipt has no checkpoint");
    };
    ensure!(
        numbers.first() == Some(&first.number) && numbers.last() == Some(&last.number),
        "the receipt has checkpoints that no proof names"
    );
    if let Some(anchor) = anchor {
        ensure!(
            anchor.eq_ignore_ascii_case(&last.hash),
            "the receipt ends with checkpoint {} and its hash {}, not with {anchor}",
            last.number,
            last.hash
        );
    }
    let checkpoint = find(&receipt.checkpoints, receipt.event.checkpoint)?.clone();
    Ok(Verified {
        event,
        checkpoint,
        last: last.clone(),
        outputs,
        is_anchored: anchor.is_some(),
    })
}

/// Checks the format and the hash of each checkpoint.
fn check_hashes<'w>(
    checkpoints: &[Checkpoint],
    written: impl Iterator<Item = &'w Value>,
) -> Result<()> {
    for (checkpoint, written) in checkpoints.iter().zip(written) {
        let number = checkpoint.number;
        ensure!(
            checkpoint.format == CHECKPOINT_FORMAT,
            "the format of checkpoint {number} is `{}`, not `{CHECKPOINT_FORMAT}`",
            checkpoint.format
        );
        ensure!(
            checkpoint.hash == Checkpoint::hash_of(written),
            "checkpoint {number} does not have the hash {}",
            checkpoint.hash
        );
    }
    Ok(())
}

/// Checks that each checkpoint names the one before it.
fn check_chain(checkpoints: &[Checkpoint]) -> Result<()> {
    for pair in checkpoints.windows(2) {
        let [before, after] = pair else { continue };
        ensure!(
            after.previous.as_ref() == Some(&before.hash)
                && before.number.checked_add(1) == Some(after.number)
                && after.installation == before.installation,
            "checkpoint {} does not follow checkpoint {}",
            after.number,
            before.number
        );
    }
    Ok(())
}

fn find(checkpoints: &[Checkpoint], number: u64) -> Result<&Checkpoint> {
    let found = checkpoints.iter().find(|one| one.number == number);
    found.with_context(|| format!("the receipt has no checkpoint {number}"))
}

/// Checks that a leaf and its path lead to the root of its checkpoint. Returns the leaf.
fn check(proof: &Proof, checkpoints: &[Checkpoint]) -> Result<Leaf> {
    let checkpoint = find(checkpoints, proof.checkpoint)?;
    let path = proof.path.iter().map(|text| hash(text));
    let path = path.collect::<Result<Vec<Hash>>>()?;
    let root = merkle::root_from_path(hash_of(&proof.leaf), proof.index, checkpoint.leaves, &path);
    let is_root = root.is_some_and(|root| hex::encode(root) == checkpoint.root);
    ensure!(
        is_root,
        "leaf and path do not lead to the root of checkpoint {}",
        checkpoint.number
    );
    Leaf::from_value(&proof.leaf)
}

/// A hash in lower-case hex, the only form.
fn hash(text: &str) -> Result<Hash> {
    let bytes = hex::decode(text)
        .ok()
        .filter(|_| !text.contains(|c: char| c.is_ascii_uppercase()));
    let hash = bytes.and_then(|bytes| Hash::try_from(bytes).ok());
    hash.with_context(|| format!("`{text}` is no SHA-256"))
}
