//! Signatures of components, and the public keys that a host accepts.
//!
//! cosign signs an artifact by a payload. The payload names the digest of the manifest, and the
//! manifest names that of the component. All three are checked against the bytes of the component.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::oci::{Digest, Manifest};

/// The most signatures of one artifact.
pub const SIGNATURES_MAX: usize = 16;

/// The kind of payload that signs an artifact.
const PAYLOAD_KIND: &str = "cosign container image signature";

/// The encoding of a public key on the curve P-256, before the 64 bytes of its point.
const P256_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];
const P256_LENGTH: usize = 91;

const PEM_BEGIN: &str = "-----BEGIN PUBLIC KEY-----";
const PEM_END: &str = "-----END PUBLIC KEY-----";

/// A signature of a component. Signatures are ECDSA on P-256 over SHA-256, as Base64 of DER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", tag = "of")]
pub enum Signature {
    /// Of the bytes of the component, as `cosign sign-blob` makes it.
    File {
        /// The signature.
        signature: String,
    },
    /// Of an artifact in a registry, as `cosign sign` makes it.
    Artifact {
        /// The manifest, byte for byte.
        manifest: String,
        /// The signatures in the registry; it may contain those of other keys.
        payloads: Vec<SignedPayload>,
    },
}

/// A payload with its signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SignedPayload {
    /// The signed text: JSON with the digest of a manifest.
    pub payload: String,
    /// The signature of the text.
    pub signature: String,
}

/// The part of a payload that is checked.
#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    #[serde(rename = "type")]
    kind: String,
    image: SignedImage,
}

#[derive(Deserialize)]
struct SignedImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// The public keys by which components have to be signed: at least one.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKeys(Vec<Vec<u8>>);

impl PublicKeys {
    /// Reads the keys of a PEM text, such as `cosign.pub` or several of its kind.
    ///
    /// # Errors
    /// There is no key, or one of another algorithm.
    pub fn parse(text: &str) -> Result<PublicKeys, String> {
        let blocks: Vec<&str> = text.split(PEM_BEGIN).skip(1).collect();
        if blocks.is_empty() {
            return Err(format!("it contains no key: no line `{PEM_BEGIN}`"));
        }
        let keys: Result<Vec<_>, String> = blocks.into_iter().map(parse_key).collect();
        keys.map(PublicKeys)
    }

    /// Checks that one of the keys signed the component.
    ///
    /// # Errors
    /// The reason why the signature does not count, as a clause.
    pub fn verify(&self, wasm: &[u8], signature: &Signature) -> Result<(), String> {
        match signature {
            Signature::File { signature } if self.signed(wasm, signature) => Ok(()),
            Signature::File { .. } => {
                Err("its signature is not by a key of this host, or of other bytes".to_owned())
            }
            Signature::Artifact { manifest, payloads } => {
                check_manifest(manifest, wasm)?;
                self.verify_payloads(&Digest::of(manifest.as_bytes()), payloads)
            }
        }
    }

    /// Checks that one of the keys signed the manifest with this digest.
    fn verify_payloads(&self, manifest: &Digest, payloads: &[SignedPayload]) -> Result<(), String> {
        if payloads.len() > SIGNATURES_MAX {
            return Err(format!("it has more than {SIGNATURES_MAX} signatures"));
        }
        let mut signed = payloads
            .iter()
            .filter(|one| self.signed(one.payload.as_bytes(), &one.signature))
            .peekable();
        if signed.peek().is_none() {
            let count = payloads.len();
            return Err(format!(
                "none of its {count} signatures is by a key of this host"
            ));
        }
        match signed.any(|one| is_for(&one.payload, manifest)) {
            true => Ok(()),
            false => Err(format!(
                "its signature is of another artifact than {manifest}"
            )),
        }
    }

    /// Whether `signature` is of these bytes, by one of the keys.
    fn signed(&self, bytes: &[u8], signature: &str) -> bool {
        let Ok(signature) = STANDARD.decode(signature.trim()) else {
            return false;
        };
        self.0.iter().any(|point| {
            let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point);
            key.verify(bytes, &signature).is_ok()
        })
    }
}

impl fmt::Debug for PublicKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} public keys", self.0.len())
    }
}

/// The point of a key, from the text after its first line.
fn parse_key(block: &str) -> Result<Vec<u8>, String> {
    let (base64, _) = block
        .split_once(PEM_END)
        .ok_or_else(|| format!("a key has no line `{PEM_END}`"))?;
    let base64: String = base64.split_whitespace().collect();
    let der = STANDARD
        .decode(base64)
        .map_err(|_| "a key is not Base64".to_owned())?;
    // The point begins with its form, the last byte of the prefix.
    match der.get(P256_PREFIX.len() - 1..) {
        Some(point) if der.len() == P256_LENGTH && der.starts_with(&P256_PREFIX) => {
            Ok(point.to_vec())
        }
        _ => Err("a key is not one for ECDSA on the curve P-256".to_owned()),
    }
}

/// Checks that a manifest is that of the component.
fn check_manifest(manifest: &str, wasm: &[u8]) -> Result<(), String> {
    let manifest = Manifest::parse(manifest.as_bytes())?;
    let signed = &manifest.component()?.digest;
    match *signed == Digest::of(wasm) {
        true => Ok(()),
        false => Err(format!("its signature is of another component, {signed}")),
    }
}

/// Whether a payload signs the manifest with this digest.
fn is_for(payload: &str, manifest: &Digest) -> bool {
    serde_json::from_str::<Payload>(payload).is_ok_and(|payload| {
        payload.critical.kind == PAYLOAD_KIND
            && payload.critical.image.digest == manifest.to_string()
    })
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
    use serde_json::json;

    use super::*;

    struct Signer(EcdsaKeyPair);

    impl Signer {
        fn new() -> Self {
            let (algorithm, random) = (&ECDSA_P256_SHA256_ASN1_SIGNING, SystemRandom::new());
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
            Signer(EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).unwrap())
        }

        fn pem(&self) -> String {
            let point = self.0.public_key().as_ref();
            let der = [&P256_PREFIX[..26], point].concat();
            format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", STANDARD.encode(der))
        }

        fn keys(&self) -> PublicKeys {
            PublicKeys::parse(&self.pem()).unwrap()
        }

        fn sign(&self, bytes: &[u8]) -> String {
            let signature = self.0.sign(&SystemRandom::new(), bytes).unwrap();
            STANDARD.encode(signature)
        }
    }

    fn manifest(wasm: &[u8]) -> String {
        let digest = Digest::of(wasm).to_string();
        let layer = json!({ "mediaType": "application/wasm", "digest": digest, "size": 4 });
        json!({ "layers": [layer] }).to_string()
    }

    fn payload(manifest: &str, kind: &str) -> String {
        let image = json!({ "docker-manifest-digest": Digest::of(manifest.as_bytes()) });
        json!({ "critical": { "type": kind, "image": image, "identity": {} } }).to_string()
    }

    fn artifact(signer: &Signer, manifest: &str, payload: String) -> Signature {
        let signature = signer.sign(payload.as_bytes());
        Signature::Artifact {
            manifest: manifest.to_owned(),
            payloads: vec![SignedPayload { payload, signature }],
        }
    }

    #[test]
    fn a_file_needs_a_signature_of_its_bytes_by_a_key() {
        let (own, other) = (Signer::new(), Signer::new());
        let signature = Signature::File {
            signature: own.sign(b"wasm"),
        };
        assert!(own.keys().verify(b"wasm", &signature).is_ok());
        assert!(own.keys().verify(b"WASM", &signature).is_err());
        assert!(other.keys().verify(b"wasm", &signature).is_err());
        let both = PublicKeys::parse(&format!("{}{}", other.pem(), own.pem())).unwrap();
        assert!(both.verify(b"wasm", &signature).is_ok());
        for broken in ["", "?", "AAAA"] {
            let signature = Signature::File {
                signature: broken.to_owned(),
            };
            assert!(own.keys().verify(b"wasm", &signature).is_err());
        }
    }

    #[test]
    fn an_artifact_needs_an_unbroken_chain_to_its_component() {
        let (own, other) = (Signer::new(), Signer::new());
        let (good, evil) = (manifest(b"good"), manifest(b"evil"));
        let signed = payload(&good, PAYLOAD_KIND);
        let right = artifact(&own, &good, signed.clone());
        assert_eq!(own.keys().verify(b"good", &right), Ok(()));

        let swapped = artifact(&own, &evil, signed.clone());
        let tampered = match right.clone() {
            Signature::Artifact {
                manifest,
                mut payloads,
            } => {
                payloads[0].payload.push(' ');
                Signature::Artifact { manifest, payloads }
            }
            file => file,
        };
        let other_kind = artifact(&own, &good, payload(&good, "attestation"));
        let unsigned = Signature::Artifact {
            manifest: good.clone(),
            payloads: Vec::new(),
        };
        for (keys, wasm, signature, why) in [
            (own.keys(), b"evil", &right, "of another component"),
            (own.keys(), b"evil", &swapped, "of another artifact"),
            (other.keys(), b"good", &right, "none of its 1 signatures"),
            (own.keys(), b"good", &tampered, "none of its 1 signatures"),
            (own.keys(), b"good", &other_kind, "of another artifact"),
            (own.keys(), b"good", &unsigned, "none of its 0 signatures"),
        ] {
            let refused = keys.verify(wasm, signature).unwrap_err();
            assert!(refused.contains(why), "{why}: {refused}");
        }
    }

    #[test]
    fn keys_are_read_from_pem_and_others_are_refused() {
        let key = Signer::new().pem();
        assert!(PublicKeys::parse(&key.replace('\n', "\r\n")).is_ok());
        for (text, why) in [
            (String::new(), "contains no key"),
            (key.replace("PUBLIC", "PRIVATE"), "contains no key"),
            (key.replace(PEM_END, ""), "has no line"),
            (format!("{PEM_BEGIN}\n?\n{PEM_END}"), "not Base64"),
            (format!("{PEM_BEGIN}\nAAAA\n{PEM_END}"), "not one for ECDSA"),
            (
                format!("{key}{PEM_BEGIN}\nAAAA\n{PEM_END}"),
                "not one for ECDSA",
            ),
        ] {
            let refused = PublicKeys::parse(&text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }
}
