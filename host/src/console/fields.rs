//! The fields of a form or of a query.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::response::Response;

/// Names and values, in order. A name may repeat.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(Vec<(String, String)>);

impl Fields {
    /// Decodes `application/x-www-form-urlencoded`.
    pub fn parse(encoded: &[u8]) -> Self {
        Fields(form_urlencoded::parse(encoded).into_owned().collect())
    }

    /// The value of a field, unless it is empty. White space at the ends counts for nothing.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.raw(name)
            .map(str::trim)
            .filter(|value| !value.is_empty())
    }

    /// The value of a field, unchanged.
    pub fn raw(&self, name: &str) -> Option<&str> {
        let mut fields = self.0.iter();
        let found = fields.find(|(field, _)| field == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The values of a field that may repeat, in order.
    pub fn all<'f>(&'f self, name: &'f str) -> impl Iterator<Item = &'f str> {
        let fields = self.0.iter().filter(move |(field, _)| field == name);
        fields.map(|(_, value)| value.trim())
    }

    /// All names and values, in order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Like [`Fields::get`], owned.
    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(str::to_owned)
    }

    /// A number; `None` if it is none.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.get(name).and_then(|value| value.parse().ok())
    }

    /// Whether a checkbox is set.
    pub fn is_set(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The same fields with another value of one of them; `None` removes it.
    pub fn with(&self, name: &str, value: Option<&str>) -> Fields {
        let others = self.0.iter().filter(|(field, _)| field != name).cloned();
        let new = value.map(|value| (name.to_owned(), value.to_owned()));
        Fields(others.chain(new).collect())
    }

    /// The encoded query, with `?` unless it is empty.
    pub fn query(&self) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let mut query = form_urlencoded::Serializer::for_suffix("?".to_owned(), 1);
        query.extend_pairs(&self.0);
        query.finish()
    }
}

impl FromIterator<(String, String)> for Fields {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        Fields(pairs.into_iter().collect())
    }
}

/// The fields of a checked form; see [`guard`](super::guard).
impl<S: Sync> FromRequestParts<S> for Fields {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        Ok(parts.extensions.get().cloned().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_decoded_and_encoded_again() {
        let fields = Fields::parse(b"worker=a%26b&note=+x+&empty=&body=%0D%0A");
        assert_eq!(fields.get("worker"), Some("a&b"));
        assert_eq!(fields.get("note"), Some("x"));
        assert_eq!((fields.get("empty"), fields.get("none")), (None, None));
        let ids = Fields::parse(b"id=1&x=y&id=2");
        assert_eq!(ids.all("id").collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(fields.raw("body"), Some("\r\n"));
        let next = Fields::parse(b"a=1&b=2")
            .with("b", None)
            .with("c", Some("x y"));
        assert_eq!(next.query(), "?a=1&c=x+y");
        assert_eq!(Fields::default().query(), "");
    }
}
