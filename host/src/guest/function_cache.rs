//! Machine code of functions, kept for the next compilation by `oncely dev` and `oncely test`.
//!
//! A component in Python or JavaScript is an interpreter and the data of the program. A change of
//! the program changes the data, and few functions.
//!
//! Hosts in production have no such cache. A component that takes control of the compiler could
//! change functions that other components use.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, BufMut, Bytes};
use sha2::{Digest, Sha256};
use wasmtime::CacheStore;

/// Limit of the file, in bytes: the functions of a few interpreters.
const FILE_MAX: usize = 128 << 20;

/// The SHA-256 of the functions is at the end of the file.
const SUM_SIZE: usize = 32;

/// The file is written again when more than one function of a component in this many is new.
const NEW_SHARE: usize = 10;

/// The functions of earlier compilations and of this one.
#[derive(Debug, Default)]
pub(super) struct FunctionCache {
    earlier: HashMap<Bytes, Bytes>,
    used: Mutex<HashSet<Bytes>>,
    added: Mutex<Vec<(Bytes, Bytes)>>,
}

impl FunctionCache {
    /// Reads the file of an earlier compilation. A file that is absent or damaged counts as empty.
    pub fn read(path: &Path) -> Self {
        let mut file = Bytes::from(std::fs::read(path).unwrap_or_default());
        let sum = file.split_off(file.len().saturating_sub(SUM_SIZE));
        let mut earlier = HashMap::new();
        if Sha256::digest(&file).as_slice() != sum {
            return FunctionCache::default();
        }
        while let Some((key, code)) = take(&mut file).zip(take(&mut file)) {
            earlier.insert(key, code);
        }
        FunctionCache {
            earlier,
            ..FunctionCache::default()
        }
    }

    /// The next content of the file; none if it is not worth the time, as few functions were
    /// added. The functions of this compilation come first, so that others leave a full file.
    pub fn to_file(&self) -> Option<Vec<u8>> {
        let added = self.added.lock().unwrap_or_else(PoisonError::into_inner);
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if added.len() * NEW_SHARE <= used.len() {
            return None;
        }
        let (used, unused): (Vec<_>, Vec<_>) = self
            .earlier
            .iter()
            .partition(|(key, _)| used.contains(*key));
        let added = added.iter().map(|(key, code)| (key, code));
        let functions: Vec<_> = added.chain(used).chain(unused).collect();
        let size = |(key, code): &(&Bytes, &Bytes)| key.len() + code.len() + 8;
        let whole = functions.iter().map(size).sum();
        let mut file = Vec::with_capacity(FILE_MAX.min(whole) + SUM_SIZE);
        for function in functions {
            if file.len() + size(&function) > FILE_MAX {
                break;
            }
            put(&mut file, function.0);
            put(&mut file, function.1);
        }
        let sum = Sha256::digest(&file);
        file.extend_from_slice(&sum);
        Some(file)
    }
}

impl CacheStore for FunctionCache {
    fn get(&self, key: &[u8]) -> Option<Cow<'_, [u8]>> {
        let (key, code) = self.earlier.get_key_value(key)?;
        self.used
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.clone());
        Some(Cow::Borrowed(code))
    }

    fn insert(&self, key: &[u8], code: Vec<u8>) -> bool {
        self.added
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((Bytes::copy_from_slice(key), code.into()));
        true
    }
}

/// Takes bytes from a file that [`put`] wrote.
fn take(file: &mut Bytes) -> Option<Bytes> {
    let length = usize::try_from(file.try_get_u32_le().ok()?).ok()?;
    (length <= file.len()).then(|| file.split_to(length))
}

/// Adds bytes to a file, after their length.
fn put(file: &mut Vec<u8>, bytes: &[u8]) {
    if let Ok(length) = u32::try_from(bytes.len()) {
        file.put_u32_le(length);
        file.put_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_outlast_a_compilation_and_a_damaged_file_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("functions");
        let first = FunctionCache::read(&path);
        assert!(first.insert(b"a", b"one".to_vec()) && first.insert(b"b", Vec::new()));
        std::fs::write(&path, first.to_file().unwrap()).unwrap();

        let second = FunctionCache::read(&path);
        assert_eq!(second.get(b"a").as_deref(), Some(&b"one"[..]));
        assert_eq!(second.get(b"c"), None);
        assert_eq!(second.to_file(), None);
        second.insert(b"c", b"three".to_vec());
        let file = second.to_file().unwrap();
        std::fs::write(&path, &file).unwrap();
        assert_eq!(FunctionCache::read(&path).earlier.len(), 3);

        // Torn, or changed
        for length in 0..file.len() {
            std::fs::write(&path, &file[..length]).unwrap();
            assert!(FunctionCache::read(&path).earlier.is_empty());
            let mut changed = file.clone();
            changed[length] ^= 1;
            std::fs::write(&path, changed).unwrap();
            assert!(FunctionCache::read(&path).earlier.is_empty());
        }
    }
}
