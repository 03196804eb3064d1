//! The token of the control API: configured, or generated once and kept in the data folder,
//! readable only by its user.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, anyhow};

use crate::config::Secret;
use crate::config::sources::Setting;
use crate::model::hint::WithHint;

/// The name of the token's file in the data folder.
const FILE_NAME: &str = "token";
const LENGTH_MIN: usize = 16;

/// Refuses a token that is easy to guess or cannot be sent in a header.
pub(super) fn check(setting: &Setting) -> anyhow::Result<Secret> {
    let is_valid = setting.value.len() >= LENGTH_MIN
        && setting.value.bytes().all(|byte| byte.is_ascii_graphic());
    if is_valid {
        return Ok(Secret::new(&setting.value));
    }
    let what =
        format!("a token has at least {LENGTH_MIN} characters of printable ASCII without spaces");
    Err(setting.refuse_with_hint(what, "generate one: openssl rand -hex 32".to_owned()))
}

/// The token in `data_dir`; creates both if they do not exist. Hosts that start concurrently agree
/// on one token.
pub fn load_or_create_token(data_dir: &Path) -> anyhow::Result<Secret> {
    if let Some(token) = read_token(data_dir)? {
        return Ok(token);
    }
    let context = || format!("store a token in {}", data_dir.display());
    std::fs::create_dir_all(data_dir).with_context(context)?;
    let mut file = tempfile::NamedTempFile::new_in(data_dir).with_context(context)?;
    let token = hex::encode(rand::random::<[u8; 32]>());
    writeln!(file, "{token}").with_context(context)?;
    match file.persist_noclobber(data_dir.join(FILE_NAME)) {
        Err(error) if error.error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).with_context(context)
        }
        _ => read_token(data_dir)?.with_context(context),
    }
}

/// The token in `data_dir`; `None` if no host has run there yet.
///
/// # Errors
/// The file cannot be read, is empty, or is readable by other users.
pub fn read_token(data_dir: &Path) -> anyhow::Result<Option<Secret>> {
    let path = data_dir.join(FILE_NAME);
    let shown = path.display();
    let metadata = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.with_context(|| format!("check the token {shown}"))?,
    };
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(
            anyhow!("other users can read the token {shown}").hint(format!(
                "restrict it: chmod 600 {shown}; \
             or, if it may have leaked, remove it and restart the host"
            )),
        );
    }
    let token =
        std::fs::read_to_string(&path).with_context(|| format!("read the token {shown}"))?;
    match token.trim() {
        "" => Err(anyhow!("the token {shown} is empty").hint(format!(
            "generate a new one: rm {shown}, then restart the host"
        ))),
        token => Ok(Some(Secret::new(token))),
    }
}
