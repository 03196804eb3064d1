//! The public keys by which components have to be signed.

use super::sources::Setting;
use crate::model::signature::PublicKeys;

/// Reads the file of a host's keys.
pub(super) fn component_keys(setting: &Setting) -> anyhow::Result<PublicKeys> {
    let path = setting.path();
    let text = std::fs::read_to_string(&path)
        .map_err(|error| setting.refuse(format!("{}: {error}", path.display()), "cosign.pub"))?;
    PublicKeys::parse(&text).map_err(|why| {
        let hint = "use the public keys of cosign generate-key-pair, one after another in one file";
        setting.refuse_with_hint(format!("{}: {why}", path.display()), hint.to_owned())
    })
}
