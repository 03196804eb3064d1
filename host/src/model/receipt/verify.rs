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
    let written = written.get("checkpoints").and_then(Value::as_array);
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

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::model::receipt::{OutputDigest, with_salt};

    fn leaf(leaf: &Leaf) -> Value {
        let (_, fields) = leaf.to_parts().unwrap();
        with_salt(fields, "5a17".to_owned())
    }

    fn event(numbers: &[i64]) -> Leaf {
        let output = |number: &i64| OutputDigest {
            number: *number,
            subject: "out.x".to_owned(),
            sha256: "cd".to_owned(),
        };
        Leaf::Event(EventLeaf {
            worker: "pay".to_owned(),
            event: "e1".to_owned(),
            outcome: "done".to_owned(),
            payload: "ab".to_owned(),
            stream: Some("IN".to_owned()),
            sequence: Some(7),
            at: Timestamp::UNIX_EPOCH,
            outputs: Some(numbers.iter().map(output).collect()),
        })
    }

    fn output(worker: &str, number: i64) -> Leaf {
        Leaf::Output(OutputLeaf {
            worker: worker.to_owned(),
            event: "e1".to_owned(),
            number,
            id: "id".to_owned(),
            stream: "OUT".to_owned(),
            sequence: 9,
            at: Timestamp::UNIX_EPOCH,
        })
    }

    /// The checkpoints over these leaves, one after another, and the proof of each leaf.
    fn close(sets: &[&[Leaf]]) -> (Vec<Checkpoint>, Vec<Proof>) {
        let (mut checkpoints, mut proofs) = (Vec::<Checkpoint>::new(), Vec::new());
        for leaves in sets {
            let leaves: Vec<Value> = leaves.iter().map(leaf).collect();
            let hashes: Vec<Hash> = leaves.iter().map(hash_of).collect();
            let before = checkpoints.last().map(|one| (one.number, one.hash.clone()));
            let (count, root) = (leaves.len() as u64, merkle::root(&hashes));
            let at = Timestamp::UNIX_EPOCH;
            let checkpoint = Checkpoint::new("0123456789abcdef", before, at, count, &root);
            let number = checkpoint.number;
            for (index, leaf) in leaves.into_iter().enumerate() {
                let path = merkle::path(&hashes, index);
                proofs.push(Proof {
                    leaf,
                    checkpoint: number,
                    index: index as u64,
                    path: path.iter().map(hex::encode).collect(),
                });
            }
            checkpoints.push(checkpoint);
        }
        (checkpoints, proofs)
    }

    fn refused(receipt: &Receipt) -> String {
        let text = serde_json::to_vec(receipt).unwrap();
        format!("{:#}", verify(&text, None).unwrap_err())
    }

    #[test]
    fn a_receipt_may_reach_over_several_checkpoints() {
        let sets: [&[Leaf]; 3] = [
            &[output("other", 1), event(&[3])],
            &[output("other", 2)],
            &[output("other", 4), output("other", 5), output("pay", 3)],
        ];
        let (checkpoints, proofs) = close(&sets);
        let (event, output) = (proofs[1].clone(), proofs[5].clone());
        let receipt = Receipt::new(event.clone(), vec![output.clone()], checkpoints.clone());
        let text = serde_json::to_vec(&receipt).unwrap();
        let verified = verify(&text, Some(&checkpoints[2].hash)).unwrap();
        assert!(verified.is_anchored);
        assert_eq!((verified.checkpoint.number, verified.last.number), (1, 3));
        assert_eq!(verified.outputs[0].sequence, 9);
        // The last checkpoint is the anchor. An earlier one does not cover the output.
        assert!(verify(&text, Some(&checkpoints[0].hash)).is_err());

        // A gap, another order, a checkpoint too many, and one too few.
        let with = |checkpoints: Vec<Checkpoint>| Receipt {
            checkpoints,
            ..receipt.clone()
        };
        let [first, second, third] = [0, 1, 2].map(|at| checkpoints[at].clone());
        assert!(refused(&with(vec![first.clone(), third.clone()])).contains("does not follow"));
        let swapped = with(vec![second.clone(), first.clone(), third]);
        assert!(refused(&swapped).contains("does not follow"));
        let alone = Receipt::new(event.clone(), Vec::new(), vec![first.clone(), second]);
        assert!(refused(&alone).contains("that no proof names"));
        assert!(refused(&with(vec![first])).contains("has no checkpoint 3"));
        assert!(refused(&with(Vec::new())).contains("has no checkpoint 1"));
    }

    #[test]
    fn an_output_of_another_event_is_refused() {
        let leaves = [
            event(&[3, 4]),
            output("pay", 3),
            output("pay", 5),
            output("other", 4),
        ];
        let (checkpoints, proofs) = close(&[&leaves]);
        let with = |outputs: &[usize]| {
            let outputs = outputs.iter().map(|at| proofs[*at].clone()).collect();
            Receipt::new(proofs[0].clone(), outputs, checkpoints.clone())
        };
        assert!(verify(&serde_json::to_vec(&with(&[1])).unwrap(), None).is_ok());
        assert!(refused(&with(&[1, 1])).contains("the output is there twice"));
        assert!(refused(&with(&[2])).contains("of another event"));
        assert!(refused(&with(&[3])).contains("of another event"));
        assert!(refused(&with(&[0])).contains("the leaf is no output"));
        let no_event = Receipt::new(proofs[1].clone(), Vec::new(), checkpoints);
        assert!(refused(&no_event).contains("the leaf is no event"));
    }
}
