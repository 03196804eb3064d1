//! The reference of a component in a registry.

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Digest;

/// The beginning of a reference in a manifest.
const SCHEME: &str = "oci://";

/// The lengths of names and tags, as the specification of registries has them.
const REPOSITORY_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// A component in a registry, such as `oci://registry.example.com/team/worker:1.2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    /// The host, with its port if it has one.
    pub registry: String,
    /// The repository, such as `team/worker`.
    pub repository: String,
    /// A tag, which can be moved. It is only a note if there is a digest.
    pub tag: Option<String>,
    /// The digest of the manifest. A deployed reference has one.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Whether the source of a component is a reference, valid or not, and no path.
    pub fn is_reference(source: &str) -> bool {
        source.starts_with(SCHEME)
    }

    /// The same reference, fixed to the manifest with this digest.
    pub fn pinned(&self, digest: Digest) -> Reference {
        Reference {
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// The name under which the registry is asked for the manifest: the digest, else the tag.
    pub fn manifest_name(&self) -> String {
        let digest = self.digest.as_ref().map(Digest::to_string);
        digest.or_else(|| self.tag.clone()).unwrap_or_default()
    }

    /// Whether the registry is on this machine. Such a registry is reached without TLS.
    pub fn is_on_this_machine(&self) -> bool {
        let (host, _) = split_port(&self.registry);
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// The reference without `oci://`, as other tools expect it.
    pub fn name(&self) -> String {
        let mut name = format!("{}/{}", self.registry, self.repository);
        if let Some(tag) = &self.tag {
            name.push_str(&format!(":{tag}"));
        }
        if let Some(digest) = &self.digest {
            name.push_str(&format!("@{digest}"));
        }
        name
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.name())
    }
}

impl TryFrom<String> for Reference {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let refuse = |why: &str| Err(format!("`{}` {why}", text.escape_debug()));
        let Some(name) = text.strip_prefix(SCHEME) else {
            return refuse("does not begin with oci://");
        };
        let (name, digest) = match name.split_once('@') {
            Some((name, digest)) => (name, Some(Digest::try_from(digest.to_owned())?)),
            None => (name, None),
        };
        let Some((registry, path)) = name.split_once('/') else {
            return refuse("names no repository after the registry");
        };
        let (repository, tag) = match path.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path, None),
        };
        if !is_registry(registry) {
            return refuse("does not name a registry by its host");
        }
        if !is_repository(repository) {
            return refuse("has an invalid repository: names of a-z, 0-9, `.`, `_` and `-`");
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return refuse("has an invalid tag");
        }
        if tag.is_none() && digest.is_none() {
            return refuse("has neither a digest nor a tag");
        }
        Ok(Reference {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

/// Splits `host:port`; an address of IPv6 is in brackets.
fn split_port(registry: &str) -> (&str, Option<&str>) {
    match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    }
}

fn is_registry(registry: &str) -> bool {
    let (host, port) = split_port(registry);
    let is_address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .is_some_and(|address| address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()));
    let is_label = |label: &str| {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && label.bytes().all(is_allowed)
    };
    (is_address || host.split('.').all(is_label))
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Whether each part consists of `a` to `z` and digits, with separators between them.
fn is_repository(repository: &str) -> bool {
    let is_part = |part: &str| {
        let is_inner = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
        let is_outer = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        part.bytes().all(is_inner)
            && is_outer(part.bytes().next())
            && is_outer(part.bytes().next_back())
            && !part.contains("..")
    };
    repository.len() <= REPOSITORY_MAX && repository.split('/').all(is_part)
}

fn is_tag(tag: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=TAG_MAX).contains(&tag.len())
        && tag.bytes().all(is_allowed)
        && !tag.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Reference, String> {
        Reference::try_from(text.to_owned())
    }

    #[test]
    fn references_have_a_registry_a_repository_and_a_tag_or_digest() {
        let digest = Digest::of(b"x");
        let both = format!("oci://127.0.0.1:5000/team/the-worker_2:1.2@{digest}");
        let reference = parse(&both).unwrap();
        assert_eq!(reference.registry, "127.0.0.1:5000");
        assert_eq!(reference.repository, "team/the-worker_2");
        assert_eq!(reference.tag.as_deref(), Some("1.2"));
        assert_eq!(reference.digest, Some(digest.clone()));
        assert_eq!(reference.to_string(), both);
        assert_eq!(reference.manifest_name(), digest.to_string());

        let tag = parse("oci://registry.example.com/worker:1.2").unwrap();
        assert_eq!(
            (tag.manifest_name().as_str(), tag.digest.as_ref()),
            ("1.2", None)
        );
        assert_eq!(tag.pinned(digest.clone()).digest, Some(digest));
    }

    #[test]
    fn invalid_references_are_refused_with_the_reason() {
        for (text, why) in [
            ("registry.example.com/a:1", "does not begin with oci://"),
            ("oci://registry.example.com:1", "names no repository"),
            ("oci:///a:1", "does not name a registry"),
            ("oci://user@registry.example.com/a:1", "is not a digest"),
            (
                "oci://registry.example.com:x/a:1",
                "does not name a registry",
            ),
            ("oci://registry.example.com/A:1", "invalid repository"),
            ("oci://registry.example.com/a/../b:1", "invalid repository"),
            ("oci://registry.example.com/a//b:1", "invalid repository"),
            ("oci://registry.example.com/a:1:2", "invalid tag"),
            ("oci://registry.example.com/a:", "invalid tag"),
            ("oci://registry.example.com/a?b:1", "invalid repository"),
            ("oci://registry.example.com/a", "neither a digest nor a tag"),
            ("oci://registry.example.com/a@sha256:12", "is not a digest"),
            ("oci://registry.example.com/a@md5:12", "is not a digest"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn registries_on_this_machine_are_recognized() {
        for (registry, expected) in [
            ("localhost:5000", true),
            ("127.0.0.2", true),
            ("[::1]:5000", true),
            ("registry.example.com", false),
            ("localhost.example.com", false),
            ("10.0.0.1:5000", false),
        ] {
            let reference = parse(&format!("oci://{registry}/a:1")).unwrap();
            assert_eq!(reference.is_on_this_machine(), expected, "{registry}");
        }
    }
}
