//! Views of a configuration for `oncely doctor`: the settings that all hosts of a database should
//! share, and the files with secrets.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{GuestSql, HostConfig, HostFlags, KeepInbox, Login, RelayMode};
use crate::model::units::{format_duration, format_size};

impl HostFlags {
    /// Whether a flag selects other servers, another folder or another file than by default.
    pub fn sets_servers(&self) -> bool {
        let flags = [
            &self.database,
            &self.nats,
            &self.nats_context,
            &self.data_dir,
        ];
        self.config.is_some() || flags.iter().any(|flag| flag.is_some())
    }
}

impl HostConfig {
    /// The settings that should be equal on all hosts of one database, without secrets.
    pub fn shared_settings(&self) -> BTreeMap<String, String> {
        let guest_sql = match self.guest_sql {
            GuestSql::Restricted => "restricted",
            GuestSql::Trusted => "trusted",
        };
        let keep_inbox = match self.keep_inbox {
            KeepInbox::Auto => "auto".to_owned(),
            KeepInbox::For(time) => format_duration(time),
        };
        let relay = match self.relay {
            None => "unset",
            Some(RelayMode::Poll) => "poll",
            Some(RelayMode::Wal) => "wal",
        };
        let replicas = self.stream_replicas;
        let cache = self.cache.shared.as_ref();
        let keys = match self.component_keys {
            None => "none",
            Some(_) => "set",
        };
        let settings = [
            ("guest_sql", guest_sql.to_owned()),
            ("keep_inbox", keep_inbox),
            ("keep_outputs", format_duration(self.keep_outputs)),
            ("keep_receipts", format_duration(self.keep_receipts)),
            (
                "receipts",
                self.receipts
                    .map_or_else(|| "off".to_owned(), format_duration),
            ),
            ("relay", relay.to_owned()),
            ("relay_slot_max", format_size(self.relay_slot_max)),
            (
                "stream_replicas",
                replicas.map_or_else(|| "auto".to_owned(), |count| count.to_string()),
            ),
            (
                "cache_url",
                cache.map_or_else(|| "none".to_owned(), super::CacheUrl::redacted),
            ),
            ("component_keys", keys.to_owned()),
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        settings
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }

    /// The files that contain secrets: credentials and keys for NATS, and the configuration file if
    /// it names a secret.
    pub fn secret_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        match &self.nats.login {
            Login::Nkey(path) | Login::Credentials(path) => files.push(path.clone()),
            Login::Jwt { seed, .. } => files.extend(seed.clone()),
            Login::None | Login::Password { .. } | Login::Token(_) => {}
        }
        files.extend(
            self.nats
                .context
                .as_ref()
                .map(|context| context.file().to_owned()),
        );
        files.extend(
            self.nats
                .client_certificate
                .as_ref()
                .map(|(_, key)| key.clone()),
        );
        files.extend(
            self.oidc
                .iter()
                .filter_map(|oidc| oidc.client_secret_file.clone()),
        );
        files.extend(self.file_with_secrets.clone());
        files
    }
}
