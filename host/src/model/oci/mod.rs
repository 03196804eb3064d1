//! Components in OCI registries: references, digests and manifests.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

mod manifest;
mod reference;

pub use manifest::{Descriptor, Manifest, MediaType};
pub use reference::Reference;

/// The digest of a manifest or of a blob: `sha256:` and 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// The only algorithm that registries have to support, and the one in use.
const PREFIX: &str = "sha256:";

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let hash = <Sha256 as sha2::Digest>::digest(bytes);
        Digest(format!("{PREFIX}{}", hex::encode(hash)))
    }

    /// The hexadecimal digits, in lower case.
    pub fn hex(&self) -> &str {
        self.0.strip_prefix(PREFIX).unwrap_or_default()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match text.strip_prefix(PREFIX) {
            Some(hex) if hex.len() == 64 && hex.bytes().all(is_digit) => Ok(Digest(text)),
            _ => Err(format!(
                "`{}` is not a digest: {PREFIX} and 64 digits of 0-9 and a-f",
                text.escape_debug()
            )),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}
