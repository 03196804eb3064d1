//! The challenge of a registry that needs a login: `WWW-Authenticate`.

/// The login that a registry asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password.
    Basic,
    /// A token, which the server `realm` gives for a user and password, or for none.
    Bearer {
        realm: String,
        service: Option<String>,
    },
}

impl Challenge {
    /// Parses the value of the header; `None` if it is of another kind or malformed.
    pub fn parse(value: &str) -> Option<Challenge> {
        let (scheme, rest) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service) = (None, None);
        let mut rest = rest.trim_start();
        while let Some((name, value, after)) = parameter(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                _ => {}
            }
            rest = after;
        }
        Some(Challenge::Bearer {
            realm: realm?,
            service,
        })
    }
}

/// The first `name="value"` of a list, and the rest of the list. A value may lack its quotes.
fn parameter(list: &str) -> Option<(&str, String, &str)> {
    let (name, rest) = list.split_once('=')?;
    let (value, after) = match rest.strip_prefix('"') {
        Some(quoted) => {
            let (value, after) = quoted.split_once('"')?;
            (value, after.split_once(',').map_or("", |(_, after)| after))
        }
        None => rest.split_once(',').unwrap_or((rest, "")),
    };
    Some((name.trim(), value.trim().to_owned(), after.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_of_registries_are_parsed() {
        let bearer = |realm: &str, service: Option<&str>| {
            let (realm, service) = (realm.to_owned(), service.map(str::to_owned));
            Some(Challenge::Bearer { realm, service })
        };
        let realm = "https://auth.example.com/token";
        for (value, expected) in [
            ("Basic realm=\"Registry\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://auth.example.com/token\",service=\"registry, eu\",scope=\"a,b\"",
                bearer(realm, Some("registry, eu")),
            ),
            (
                "bearer scope=x, Realm=https://auth.example.com/token",
                bearer(realm, None),
            ),
            ("Bearer service=\"x\"", None),
            ("Bearer realm=\"unterminated", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(value), expected, "{value}");
        }
    }
}
