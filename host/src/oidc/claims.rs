//! The claims about a person: the name in the activity log, the name for display, the role.

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use crate::config::OidcSettings;
use crate::model::role::Role;

/// The longest subject, as OpenID Connect limits it, in bytes.
const SUBJECT_MAX: usize = 255;

/// The most values of a claim that a refusal shows.
const SHOWN_MAX: usize = 20;

/// A person that a provider vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// `oidc:ISSUER:SUBJECT`. It stays the same when the person gets another name or e-mail
    /// address, and belongs to no other one.
    pub actor: String,
    /// A verified e-mail address, else a name. The person may be able to change it.
    pub shown: Option<String>,
    /// The highest role of the values; `None` if no value has one.
    pub role: Option<Role>,
    /// The values of the claim, for a refusal.
    pub values: Vec<String>,
}

impl Person {
    /// Reads the claims of a verified ID token.
    ///
    /// # Errors
    /// The subject is not one of OpenID Connect.
    pub(super) fn of(claims: &Map<String, Value>, settings: &OidcSettings) -> Result<Person> {
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let subject = text("sub").unwrap_or_default();
        let is_plain = subject.bytes().all(|byte| byte.is_ascii_graphic());
        if subject.is_empty() || subject.len() > SUBJECT_MAX || !is_plain {
            bail!("the subject is not 1 to {SUBJECT_MAX} bytes of printable ASCII");
        }
        let is_verified = claims.get("email_verified") == Some(&Value::Bool(true));
        let email = text("email").filter(|_| is_verified);
        let shown = email.or(text("name")).or(text("preferred_username"));
        let values = find(claims, &settings.claim).map_or_else(Vec::new, values);
        let roles = settings.roles.iter();
        let role = roles
            .filter(|(value, _)| values.contains(value))
            .map(|(_, role)| *role)
            .max();
        Ok(Person {
            actor: format!("oidc:{}:{subject}", settings.issuer_short()),
            shown: shown.map(str::to_owned),
            role,
            values: values.into_iter().take(SHOWN_MAX).collect(),
        })
    }
}

/// The claim with this name, or at this JSON pointer.
pub(super) fn find<'c>(claims: &'c Map<String, Value>, claim: &str) -> Option<&'c Value> {
    if let Some(pointer) = claim.strip_prefix('/') {
        let (first, rest) = pointer.split_once('/').unwrap_or((pointer, ""));
        let found = claims.get(&first.replace("~1", "/").replace("~0", "~"))?;
        let rest = if rest.is_empty() {
            String::new()
        } else {
            format!("/{rest}")
        };
        return found.pointer(&rest);
    }
    claims.get(claim)
}

/// A text, a list of texts, or the keys of an object.
fn values(claim: &Value) -> Vec<String> {
    match claim {
        Value::String(text) => vec![text.clone()],
        Value::Array(all) => all
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        Value::Object(fields) => fields.keys().cloned().collect(),
        _ => Vec::new(),
    }
}

/// Adds claims from the answer about the user. It replaces none.
///
/// # Errors
/// The answer is about another user.
pub(super) fn add(claims: &mut Map<String, Value>, more: Map<String, Value>) -> Result<()> {
    if more.get("sub") != claims.get("sub") {
        bail!("the provider's answer about the user is about another one");
    }
    for (name, value) in more {
        claims.entry(name).or_insert(value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn person(claim: &str, claims: Value) -> Result<Person> {
        let settings = OidcSettings {
            issuer: "https://login.example.com/realms/ops/".to_owned(),
            client_id: "oncely".to_owned(),
            client_secret: None,
            client_secret_file: None,
            scopes: Vec::new(),
            claim: claim.to_owned(),
            roles: vec![
                ("ops".to_owned(), Role::Operate),
                ("all".to_owned(), Role::View),
            ],
            session: Duration::from_secs(60),
        };
        Person::of(claims.as_object().unwrap(), &settings)
    }

    #[test]
    fn a_person_is_the_subject_and_not_the_address() {
        let found = person(
            "groups",
            json!({"sub": "a|1", "email": "host", "name": "Ada"}),
        );
        let found = found.unwrap();
        assert_eq!(found.actor, "oidc:login.example.com/realms/ops:a|1");
        assert_eq!(found.shown.as_deref(), Some("Ada"));
        let verified = json!({"sub": "a", "email": "ada@a.example", "email_verified": true});
        assert_eq!(
            person("groups", verified).unwrap().shown.as_deref(),
            Some("ada@a.example")
        );
        for subject in ["", "a b", "a\nb", "ä", &"x".repeat(256)] {
            assert!(
                person("groups", json!({ "sub": subject })).is_err(),
                "{subject:?}"
            );
        }
        assert!(person("groups", json!({ "sub": 7 })).is_err());
    }

    #[test]
    fn no_value_without_a_mapping_has_a_role() {
        let role = |claim: &str, claims: Value| person(claim, claims).unwrap().role;
        let groups = |groups: Value| role("groups", json!({"sub": "a", "groups": groups}));
        assert_eq!(groups(json!(["all", "ops", "x"])), Some(Role::Operate));
        assert_eq!(groups(json!("all")), Some(Role::View));
        assert_eq!(groups(json!({"ops": {"a": "b"}})), Some(Role::Operate));
        for none in [
            json!(["Ops", "ops "]),
            json!([]),
            json!(true),
            json!([["ops"]]),
            Value::Null,
        ] {
            assert_eq!(groups(none.clone()), None, "{none}");
        }
        assert_eq!(role("groups", json!({"sub": "a", "roles": ["ops"]})), None);
        let nested =
            json!({"sub": "a", "realm_access": {"roles": ["ops"]}, "https://a/r": ["all"]});
        assert_eq!(
            role("/realm_access/roles", nested.clone()),
            Some(Role::Operate)
        );
        assert_eq!(role("https://a/r", nested.clone()), Some(Role::View));
        assert_eq!(role("/realm_access/none", nested), None);
    }

    #[test]
    fn claims_about_another_user_are_refused_and_none_is_replaced() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let mut claims = map(json!({"sub": "a", "email": "x"}));
        add(
            &mut claims,
            map(json!({"sub": "a", "email": "y", "groups": "ops"})),
        )
        .unwrap();
        assert_eq!(
            Value::Object(claims.clone()),
            json!({"sub": "a", "email": "x", "groups": "ops"})
        );
        assert!(add(&mut claims, map(json!({"sub": "b"}))).is_err());
        assert!(add(&mut claims, Map::new()).is_err());
    }
}
