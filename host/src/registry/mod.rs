//! OCI registries: finds the manifest of a component, pulls the component and its signatures.
//!
//! A registry is not trusted. Each part is limited in size before it is read, and checked against
//! the digest by which it was named.

use anyhow::{Context, Result, anyhow};

use crate::component::SIZE_MAX;
use crate::model::hint::WithHint;
use crate::model::oci::{Descriptor, Digest, Manifest, MediaType, Reference};
use crate::model::signature::{SIGNATURES_MAX, Signature, SignedPayload};

mod challenge;
mod connection;
mod credentials;

use connection::Connection;

/// The maximum size of a manifest in bytes. Those of components have less than 10 KB.
const MANIFEST_MAX: u64 = 1 << 20;

/// The maximum size of a signed payload in bytes.
const PAYLOAD_MAX: u64 = 64 << 10;

/// The annotation of a layer with the signature of its payload.
const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";

/// A component in a registry whose manifest was read and checked.
pub struct Artifact {
    connection: Connection,
    /// The reference with the digest of the manifest.
    pub reference: Reference,
    manifest: String,
    component: Descriptor,
}

impl Artifact {
    /// Finds the manifest of a component. A tag is resolved to the digest of the present.
    ///
    /// # Errors
    /// The registry does not have it or refuses it, or it is not the manifest of a component.
    pub async fn find(reference: &Reference) -> Result<Artifact> {
        let context = || format!("find {reference}");
        let mut connection = Connection::open(reference).with_context(context)?;
        let name = reference.manifest_name();
        let bytes = connection.manifest(&name, MANIFEST_MAX).await;
        let bytes = bytes.with_context(context)?;
        let missing = || {
            anyhow!(
                "the registry {} does not have {reference}",
                reference.registry
            )
            .hint(missing_hint(reference))
        };
        let bytes = bytes.ok_or_else(missing)?;

        // The manifest is that of the reference, and that of a component.
        let digest = Digest::of(&bytes);
        if let Some(expected) = &reference.digest {
            check_digest(expected, &digest).with_context(context)?;
        }
        let found =
            Manifest::parse(&bytes).map_err(|why| not_a_component(reference, why, false))?;
        let component = found.component().cloned();
        let component =
            component.map_err(|why| not_a_component(reference, why, found.is_index()))?;
        if usize::try_from(component.size).map_or(true, |size| size > SIZE_MAX) {
            let size = component.size;
            return Err(anyhow!(
                "the component {reference} has {size} bytes; a component may have {SIZE_MAX}"
            ))
            .hint("build it with optimisation and without debug information");
        }
        let manifest = String::from_utf8(bytes).context("read the manifest as UTF-8")?;
        Ok(Artifact {
            connection,
            reference: reference.pinned(digest),
            manifest,
            component,
        })
    }

    /// The digest of the component.
    pub fn digest(&self) -> &Digest {
        &self.component.digest
    }

    /// Pulls the component.
    ///
    /// # Errors
    /// The registry sends something else, or too much.
    pub async fn pull(&mut self) -> Result<Vec<u8>> {
        let (connection, component) = (&mut self.connection, &self.component);
        let pulled = pull_blob(connection, component).await;
        pulled.with_context(|| format!("pull {}", self.reference))
    }

    /// Pulls its signatures by cosign; `None` if it has none.
    ///
    /// # Errors
    /// The registry fails, or has something else in their place.
    pub async fn signature(&mut self) -> Result<Option<Signature>> {
        let payloads = self.payloads().await;
        let payloads =
            payloads.with_context(|| format!("pull the signatures of {}", self.reference))?;
        Ok((!payloads.is_empty()).then(|| Signature::Artifact {
            manifest: self.manifest.clone(),
            payloads,
        }))
    }

    async fn payloads(&mut self) -> Result<Vec<SignedPayload>> {
        let digest = Digest::of(self.manifest.as_bytes());
        let tag = format!("sha256-{}.sig", digest.hex());
        let Some(bytes) = self.connection.manifest(&tag, MANIFEST_MAX).await? else {
            return Ok(Vec::new());
        };
        let manifest = Manifest::parse(&bytes).map_err(anyhow::Error::msg)?;
        let signed = manifest.layers.iter().filter_map(|layer| {
            let signature = layer.annotations.get(SIGNATURE_ANNOTATION)?;
            (layer.media_type == MediaType::SIGNED_PAYLOAD && layer.size <= PAYLOAD_MAX)
                .then(|| (layer, signature.clone()))
        });
        // New signatures are appended.
        let signed: Vec<_> = signed.rev().take(SIGNATURES_MAX).collect();
        let mut payloads = Vec::new();
        for (layer, signature) in signed {
            let payload = pull_blob(&mut self.connection, layer).await?;
            let payload = String::from_utf8(payload).context("read a payload as UTF-8")?;
            payloads.push(SignedPayload { payload, signature });
        }
        Ok(payloads)
    }
}

async fn pull_blob(connection: &mut Connection, blob: &Descriptor) -> Result<Vec<u8>> {
    let bytes = connection.blob(&blob.digest, blob.size).await?;
    let bytes = bytes.ok_or_else(|| anyhow!("the registry does not have {}", blob.digest))?;
    check_digest(&blob.digest, &Digest::of(&bytes))?;
    Ok(bytes)
}

fn check_digest(expected: &Digest, actual: &Digest) -> Result<()> {
    if expected == actual {
        return Ok(());
    }
    Err(anyhow!(
        "the registry sent other content than {expected}: it has the digest {actual}"
    ))
    .hint("push the component again; a proxy in front of the registry may also change content")
}

fn missing_hint(reference: &Reference) -> String {
    format!(
        "check the repository and the tag or digest; \
         some registries answer so without a login: docker login {}",
        reference.registry
    )
}

fn not_a_component(reference: &Reference, why: String, is_index: bool) -> anyhow::Error {
    let hint = match is_index {
        true => "name one of them by its digest: component = \"oci://…@sha256:…\"".to_owned(),
        false => format!(
            "push a component as a Wasm artifact: wkg oci push {}/{}:TAG worker.wasm",
            reference.registry, reference.repository
        ),
    };
    anyhow!(why)
        .hint(hint)
        .context(format!("{reference} is not a component"))
}
