//! Merkle trees: the root over the leaves of a checkpoint, and the path that proves one of them.
//!
//! Source: RFC 9162 (Certificate Transparency 2.0), sections 2.1.1 and 2.1.3. A leaf is hashed
//! after a zero byte and a node after a one, so that no node can pass for a leaf.

use sha2::{Digest, Sha256};

/// A SHA-256.
pub type Hash = [u8; 32];

/// The hash of a leaf.
pub fn leaf_hash(leaf: &[u8]) -> Hash {
    hash(0, &[leaf])
}

fn node_hash(left: &Hash, right: &Hash) -> Hash {
    hash(1, &[left, right])
}

/// SHA-256 over a byte for the purpose, and the parts.
pub(super) fn hash(purpose: u8, parts: &[&[u8]]) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update([purpose]);
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// The root over hashes: of leaves, or of complete subtrees of equal size, of which the last may be
/// smaller. Without any, the hash of nothing.
pub fn root(hashes: &[Hash]) -> Hash {
    match hashes {
        [] => Sha256::digest([]).into(),
        [one] => *one,
        _ => {
            let (left, right) = hashes.split_at(split(hashes.len()));
            node_hash(&root(left), &root(right))
        }
    }
}

/// The hashes beside the way from a leaf to the root, lowest first. Empty for an index beyond the
/// leaves.
pub fn path(hashes: &[Hash], index: usize) -> Vec<Hash> {
    if hashes.len() < 2 || index >= hashes.len() {
        return Vec::new();
    }
    let at = split(hashes.len());
    let (left, right) = hashes.split_at(at);
    let (mut path, beside) = match index < at {
        true => (path(left, index), root(right)),
        false => (path(right, index - at), root(left)),
    };
    path.push(beside);
    path
}

/// The largest power of two below a length of two or more.
fn split(length: usize) -> usize {
    length.div_ceil(2).next_power_of_two()
}

/// The root that a leaf and its path lead to, in a tree with `size` leaves. `None` if the path has
/// another length than that of this index.
pub fn root_from_path(leaf: Hash, index: u64, size: u64, path: &[Hash]) -> Option<Hash> {
    if index >= size {
        return None;
    }
    let (mut node, mut last, mut hash) = (index, size - 1, leaf);
    for beside in path {
        if last == 0 {
            return None;
        }
        if node % 2 == 1 || node == last {
            hash = node_hash(beside, &hash);
            while node % 2 == 0 && node != 0 {
                node /= 2;
                last /= 2;
            }
        } else {
            hash = node_hash(&hash, beside);
        }
        node /= 2;
        last /= 2;
    }
    (last == 0).then_some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(count: usize) -> Vec<Hash> {
        (0..count).map(|n| leaf_hash(&n.to_be_bytes())).collect()
    }

    #[test]
    fn a_tree_has_the_roots_of_the_reference() {
        // The first leaves of the test vectors of the Certificate Transparency project.
        let inputs: [&[u8]; 4] = [b"", b"\x00", b"\x10", b"\x20\x21"];
        let hashes: Vec<Hash> = inputs.iter().map(|leaf| leaf_hash(leaf)).collect();
        let roots = [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ];
        for (count, expected) in (1..).zip(roots) {
            assert_eq!(hex::encode(root(&hashes[..count])), expected);
        }
        assert!(hex::encode(root(&[])).starts_with("e3b0c442"));
    }

    #[test]
    fn a_path_leads_to_the_root_and_to_no_other() {
        for count in 1..40 {
            let hashes = leaves(count);
            let root = root(&hashes);
            for index in 0..count {
                let path = path(&hashes, index);
                let (at, size) = (index as u64, count as u64);
                let lead = |leaf, at, size, path: &[Hash]| root_from_path(leaf, at, size, path);
                assert_eq!(lead(hashes[index], at, size, &path), Some(root));

                // Another leaf, a longer path, a shorter one, a changed one.
                assert_ne!(lead([7; 32], at, size, &path), Some(root));
                let longer = [path.clone(), vec![[7; 32]]].concat();
                assert_eq!(lead(hashes[index], at, size, &longer), None);
                if let Some((_, shorter)) = path.split_last() {
                    assert_ne!(lead(hashes[index], at, size, shorter), Some(root));
                    let mut changed = path.clone();
                    changed[0][0] ^= 1;
                    assert_ne!(lead(hashes[index], at, size, &changed), Some(root));
                }
                assert_eq!(lead(hashes[index], size, size, &path), None);
            }
        }
    }

    #[test]
    fn roots_of_blocks_make_the_same_tree() {
        for count in 1..70 {
            let hashes = leaves(count);
            let blocks: Vec<&[Hash]> = hashes.chunks(8).collect();
            let roots: Vec<Hash> = blocks.iter().map(|block| root(block)).collect();
            assert_eq!(root(&roots), root(&hashes), "{count}");
            for index in 0..count {
                let mut combined = path(blocks[index / 8], index % 8);
                combined.extend(path(&roots, index / 8));
                assert_eq!(combined, path(&hashes, index), "{index} of {count}");
            }
        }
    }
}
