//! The control API's token: configured, or made once and kept in the data folder for this user alone.

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

/// Refuses a token that could be guessed or cannot be sent in a header.
pub(super) fn check(setting: &Setting) -> anyhow::Result<Secret> {
    let is_valid = setting.value.len() >= LENGTH_MIN
        && setting.value.bytes().all(|byte| byte.is_ascii_graphic());
    if is_valid {
        return Ok(Secret::new(&setting.value));
    }
    let what =
        format!("a token has at least {LENGTH_MIN} characters, printable ASCII without space");
    Err(setting.refuse_with_hint(what, "make one: openssl rand -hex 32".to_owned()))
}

/// The token kept in `data_dir`; makes both when they are not there yet. Hosts that start at the same moment agree.
pub fn load_or_create_token(data_dir: &Path) -> anyhow::Result<Secret> {
    if let Some(token) = read_token(data_dir)? {
        return Ok(token);
    }
    let context = || format!("keep a token in {}", data_dir.display());
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

/// The token kept in `data_dir`; none when no host has run there yet.
pub fn read_token(data_dir: &Path) -> anyhow::Result<Option<Secret>> {
    let path = data_dir.join(FILE_NAME);
    let shown = path.display();
    let metadata = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.with_context(|| format!("look at the token {shown}"))?,
    };
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(anyhow!("other users can read the token {shown}")
            .hint(format!("if they may not know it, remove it and start the host again; else: chmod 600 {shown}")));
    }
    let token =
        std::fs::read_to_string(&path).with_context(|| format!("read the token {shown}"))?;
    match token.trim() {
        "" => {
            Err(anyhow!("the token {shown} is empty")
                .hint(format!("have a new one made: rm {shown}")))
        }
        token => Ok(Some(Secret::new(token))),
    }
}
