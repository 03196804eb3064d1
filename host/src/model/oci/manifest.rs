//! The manifest of an artifact, which names the digests of its parts.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Digest;

/// The kinds of content that a host distinguishes.
pub struct MediaType;

impl MediaType {
    /// The manifest of one artifact.
    pub const MANIFEST: &'static str = "application/vnd.oci.image.manifest.v1+json";
    /// A list of manifests, such as one for each processor.
    pub const INDEX: &'static str = "application/vnd.oci.image.index.v1+json";
    /// The manifest of Docker.
    pub const DOCKER_MANIFEST: &'static str =
        "application/vnd.docker.distribution.manifest.v2+json";
    /// The list of Docker.
    pub const DOCKER_INDEX: &'static str =
        "application/vnd.docker.distribution.manifest.list.v2+json";
    /// A component.
    pub const WASM: &'static str = "application/wasm";
    /// The signed text of a signature by cosign.
    pub const SIGNED_PAYLOAD: &'static str = "application/vnd.dev.cosign.simplesigning.v1+json";
}

/// The manifest of an artifact, or an index of several.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    /// The parts of the artifact.
    #[serde(default)]
    pub layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

/// A part of an artifact: its kind, digest and size.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The kind of the part.
    pub media_type: String,
    /// The digest of its bytes.
    pub digest: Digest,
    /// The size in bytes.
    pub size: u64,
    /// Further properties by name.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Parses a manifest.
    ///
    /// # Errors
    /// It is no JSON document with descriptors.
    pub fn parse(bytes: &[u8]) -> Result<Manifest, String> {
        serde_json::from_slice(bytes).map_err(|error| format!("its manifest is malformed: {error}"))
    }

    /// Whether it lists several artifacts.
    pub fn is_index(&self) -> bool {
        let is_listed = [MediaType::INDEX, MediaType::DOCKER_INDEX]
            .iter()
            .any(|index| self.media_type.as_deref() == Some(index));
        is_listed || !self.manifests.is_empty()
    }

    /// The layer with the component of a Wasm artifact.
    ///
    /// # Errors
    /// The artifact is something else.
    pub fn component(&self) -> Result<&Descriptor, String> {
        if self.is_index() {
            let digests = self.manifests.iter().map(|one| one.digest.to_string());
            let digests = digests.take(8).collect::<Vec<_>>().join(", ");
            return Err(format!("it is an index of several artifacts: {digests}"));
        }
        match self.layers.as_slice() {
            [layer] if layer.media_type == MediaType::WASM => Ok(layer),
            [_] => Err(format!("it is not a Wasm artifact: {}", self.kinds())),
            layers => Err(format!(
                "it is not a Wasm artifact, which has one layer: it has {} layers, {}",
                layers.len(),
                self.kinds()
            )),
        }
    }

    /// The media types, for an error.
    fn kinds(&self) -> String {
        let config = self.config.as_ref().map(|config| &config.media_type);
        let config = config.map_or("none", String::as_str);
        let layer = self.layers.first().map(|layer| &layer.media_type);
        let layer = layer.map_or("none", String::as_str);
        let shown = |kind: &str| kind.escape_debug().take(100).collect::<String>();
        format!("config {}, layer {}", shown(config), shown(layer))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn descriptor(media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": Digest::of(b"x").to_string(), "size": 1 })
    }

    fn component(manifest: &Value) -> Result<Descriptor, String> {
        let manifest = Manifest::parse(manifest.to_string().as_bytes())?;
        manifest.component().cloned()
    }

    #[test]
    fn a_wasm_artifact_has_one_layer_with_a_component() {
        let config = descriptor("application/vnd.wasm.config.v0+json");
        let wasm = json!({ "config": config, "layers": [descriptor("application/wasm")] });
        assert_eq!(component(&wasm).unwrap().digest, Digest::of(b"x"));

        let image = descriptor("application/vnd.oci.image.layer.v1.tar+gzip");
        let wasm = descriptor("application/wasm");
        for (manifest, why) in [
            (json!({ "layers": [image] }), "v1.tar+gzip"),
            (json!({ "layers": [] }), "0 layers"),
            (json!({ "layers": [wasm, image] }), "2 layers"),
            (json!({ "manifests": [wasm] }), "an index of several"),
            (
                json!({ "mediaType": MediaType::INDEX, "layers": [wasm] }),
                "an index",
            ),
            (json!("x"), "malformed"),
            (
                json!({ "layers": [{ "mediaType": "x", "digest": "y", "size": 1 }] }),
                "malformed",
            ),
        ] {
            let refused = component(&manifest).unwrap_err();
            assert!(refused.contains(why), "{manifest}: {refused}");
        }
    }
}
