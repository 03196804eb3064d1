//! Roles of access tokens. Each role includes the ones before it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The name of the host's own token in the activity log. No named token can have it.
pub const HOST_ACTOR: &str = "host";

/// The maximum length of a token's name, in bytes.
const NAME_MAX: usize = 64;

/// The rights of a caller of the control API.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads everything, dead letters and their bodies included. Changes nothing.
    View,
    /// Also pauses workers, handles dead letters and outputs, and publishes messages.
    Operate,
    /// Also changes the code that runs: deploys, rolls back, retires and recovers.
    Deploy,
    /// Also creates and revokes tokens. Only the host's own token has this role.
    Admin,
}

impl Role {
    /// The roles that a named token can have.
    pub const GRANTABLE: [Role; 3] = [Role::View, Role::Operate, Role::Deploy];

    /// The name in the database, in JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::View => "view",
            Role::Operate => "operate",
            Role::Deploy => "deploy",
            Role::Admin => "admin",
        }
    }

    /// The grantable role with this name.
    pub fn parse(text: &str) -> Option<Role> {
        Role::GRANTABLE
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

/// Checks the name of a new token. The error is the reason of a refusal, in words.
pub fn check_token_name(name: &str) -> Result<(), String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._@-".contains(&byte);
    let starts_plain = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if name == HOST_ACTOR {
        return Err(format!(
            "`{HOST_ACTOR}` is the name of the host's own token"
        ));
    }
    if name.len() > NAME_MAX || !starts_plain || !name.bytes().all(is_plain) {
        return Err(format!(
            "a token's name has 1 to {NAME_MAX} letters, digits and `.`, `_`, `@`, `-`, \
             and begins with a letter or a digit"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_includes_the_ones_before_it() {
        let names = Role::GRANTABLE.map(Role::as_str);
        assert_eq!(names, ["view", "operate", "deploy"]);
        assert!(Role::View < Role::Operate && Role::Operate < Role::Deploy);
        assert!(Role::Deploy < Role::Admin && Role::parse("admin").is_none());
    }

    #[test]
    fn token_names_are_short_and_plain() {
        for good in ["ada", "ci-2", "a@b.example", &"x".repeat(64)] {
            assert_eq!(check_token_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "host",
            "-ada",
            "a b",
            "a\nb",
            "ä",
            "a/b",
            &"x".repeat(65),
        ] {
            assert!(check_token_name(bad).is_err(), "{bad:?}");
        }
    }
}
