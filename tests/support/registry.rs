//! A docker-registry per test, pushes of artifacts as wkg and oras make them, and signatures as
//! cosign makes them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{KeyPair, SigningKey as _};
use reqwest::header::{CONTENT_TYPE, LOCATION};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::server::{Server, free_port};

/// The login of a registry that needs one.
pub const USER: &str = "ci";
pub const PASSWORD: &str = "h4ndle";

/// The same login as a line of `htpasswd`.
const HTPASSWD: &str = "ci:$2b$04$DAxL/qtW.ApFZyrpEYlxI.5PoHtL2TVJRa9j37eZHv7dxsWmRGCAu\n";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry on a loopback port, empty at first.
pub struct Registry {
    port: u16,
    folder: TempDir,
    has_login: bool,
    client: reqwest::Client,
    _server: Server,
}

/// A part of an artifact.
pub struct Part {
    pub media_type: &'static str,
    pub bytes: Vec<u8>,
    pub annotations: Value,
}

impl Part {
    pub fn new(media_type: &'static str, bytes: impl Into<Vec<u8>>) -> Self {
        Part {
            media_type,
            bytes: bytes.into(),
            annotations: json!({}),
        }
    }
}

/// The digest of some bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

impl Registry {
    pub async fn start() -> Result<Self> {
        Registry::start_with("", false).await
    }

    /// A registry that needs the login [`USER`].
    pub async fn start_with_login() -> Result<Self> {
        let auth = "auth: { htpasswd: { realm: tests, path: htpasswd } }\n";
        Registry::start_with(auth, true).await
    }

    async fn start_with(settings: &str, has_login: bool) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("oncely-registry-")
            .tempdir()
            .context("create a folder")?;
        let (port, path) = (free_port()?, folder.path());
        std::fs::write(path.join("htpasswd"), HTPASSWD).context("write the login")?;
        let config = format!(
            "version: 0.1\nstorage: {{ filesystem: {{ rootdirectory: data }} }}\n\
             http: {{ addr: '127.0.0.1:{port}', secret: tests }}\n{settings}"
        );
        std::fs::write(path.join("config.yml"), config).context("write the settings")?;
        let shown = path.display();
        // The shell of a server lets its background processes ignore the signal that ends them.
        let command = format!(
            "( cd '{shown}' && OTEL_TRACES_EXPORTER=none \
             exec env --default-signal=INT docker-registry serve config.yml >log 2>&1 )"
        );
        let registry = Registry {
            port,
            has_login,
            client: reqwest::Client::builder().no_proxy().build()?,
            _server: Server::start(&command, &path.join("no-such-folder"))?,
            folder,
        };
        registry.until_ready().await?;
        Ok(registry)
    }

    async fn until_ready(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        let url = format!("http://{}/v2/", self.host());
        while self.client.get(&url).send().await.is_err() {
            if Instant::now() > end {
                let log = std::fs::read_to_string(self.folder.path().join("log"));
                bail!("the registry does not answer:\n{}", log.unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Host and port.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Pushes a component as a Wasm artifact, and returns the digest of its manifest.
    pub async fn push_component(&self, name: &str, tag: &str, wasm: &[u8]) -> Result<String> {
        let config =
            json!({ "architecture": "wasm", "os": "wasip2", "layerDigests": [digest_of(wasm)] });
        let config = Part::new("application/vnd.wasm.config.v0+json", config.to_string());
        let layer = Part::new("application/wasm", wasm);
        self.push(name, tag, config, vec![layer]).await
    }

    /// Pushes an artifact, and returns the digest of its manifest.
    pub async fn push(
        &self,
        name: &str,
        tag: &str,
        config: Part,
        layers: Vec<Part>,
    ) -> Result<String> {
        let config = self.push_blob(name, config).await?;
        let mut descriptors = Vec::new();
        for layer in layers {
            descriptors.push(self.push_blob(name, layer).await?);
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors,
        });
        self.push_manifest(name, tag, MANIFEST, &manifest).await
    }

    /// Pushes a manifest, and returns its digest.
    pub async fn push_manifest(
        &self,
        name: &str,
        tag: &str,
        media_type: &str,
        manifest: &Value,
    ) -> Result<String> {
        let bytes = manifest.to_string().into_bytes();
        let digest = digest_of(&bytes);
        let url = format!("http://{}/v2/{name}/manifests/{tag}", self.host());
        let request = self.client.put(url).header(CONTENT_TYPE, media_type);
        self.send(request.body(bytes)).await?;
        Ok(digest)
    }

    /// Pushes a part, and returns its descriptor.
    pub async fn push_blob(&self, name: &str, part: Part) -> Result<Value> {
        let (digest, size) = (digest_of(&part.bytes), part.bytes.len());
        let uploads = format!("http://{}/v2/{name}/blobs/uploads/", self.host());
        let begun = self.send(self.client.post(uploads)).await?;
        let location = begun.headers().get(LOCATION).context("find the upload")?;
        let url = format!("{}&digest={digest}", location.to_str()?);
        let request = self.client.put(url).body(part.bytes);
        let request = request.header(CONTENT_TYPE, "application/octet-stream");
        self.send(request).await?;
        Ok(json!({
            "mediaType": part.media_type, "digest": digest, "size": size,
            "annotations": part.annotations,
        }))
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        let request = match self.has_login {
            true => request.basic_auth(USER, Some(PASSWORD)),
            false => request,
        };
        let response = request.send().await.context("reach the registry")?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        bail!("the registry answered {status}: {}", response.text().await?)
    }

    /// The file in which the registry stores a blob, to damage it.
    pub fn blob_file(&self, digest: &str) -> std::path::PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = "data/docker/registry/v2/blobs/sha256";
        let prefix = hex.get(..2).unwrap_or_default();
        self.folder
            .path()
            .join(blobs)
            .join(prefix)
            .join(hex)
            .join("data")
    }
}

/// A key pair of cosign.
pub struct Signer(KeyPair);

impl Signer {
    pub fn new() -> Result<Self> {
        KeyPair::generate().map(Signer).context("generate a key")
    }

    /// The public key, as the file `cosign.pub` contains it.
    pub fn public_key(&self) -> String {
        self.0.public_key_pem()
    }

    /// The signature of some bytes, as `cosign sign-blob` prints it.
    pub fn sign(&self, bytes: &[u8]) -> Result<String> {
        Ok(STANDARD.encode(self.0.sign(bytes).context("sign")?))
    }

    /// Signs the artifact with this digest, as `cosign sign` does.
    pub async fn sign_artifact(&self, registry: &Registry, name: &str, digest: &str) -> Result<()> {
        self.sign_as(registry, name, digest, digest).await
    }

    /// Signs one artifact, and stores the signature as that of another one.
    pub async fn sign_as(
        &self,
        registry: &Registry,
        name: &str,
        signed: &str,
        stored: &str,
    ) -> Result<()> {
        let payload = json!({
            "critical": {
                "identity": { "docker-reference": format!("{}/{name}", registry.host()) },
                "image": { "docker-manifest-digest": signed },
                "type": "cosign container image signature",
            },
            "optional": null,
        });
        let payload = payload.to_string().into_bytes();
        let signature = self.sign(&payload)?;
        let layer = Part {
            media_type: "application/vnd.dev.cosign.simplesigning.v1+json",
            bytes: payload,
            annotations: json!({ "dev.cosignproject.cosign/signature": signature }),
        };
        let config = Part::new("application/vnd.oci.image.config.v1+json", "{}");
        let tag = format!("{}.sig", stored.replace(':', "-"));
        registry.push(name, &tag, config, vec![layer]).await?;
        Ok(())
    }
}

/// Writes the login of a registry where `docker login` stores it.
pub fn write_login(folder: &Path, registry: &str, password: &str) -> Result<()> {
    let auth = STANDARD.encode(format!("{USER}:{password}"));
    let config = json!({ "auths": { registry: { "auth": auth } } });
    std::fs::create_dir_all(folder).context("create a folder")?;
    std::fs::write(folder.join("config.json"), config.to_string()).context("write a login")
}

/// A component with the same behaviour and another digest.
pub fn variant(wasm: &[u8], note: &str) -> Result<Vec<u8>> {
    let name = note.as_bytes();
    ensure!(name.len() < 100, "the note is too long");
    let size = u8::try_from(name.len())?;
    // A custom section: its id, its size, and a name.
    let section = [&[0, size + 1, size], name].concat();
    Ok([wasm, &section].concat())
}
