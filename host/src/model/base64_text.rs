//! Bytes as Base64 text in JSON: `#[serde(with = "base64_text")]`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serializer};

/// Writes bytes as a Base64 string.
pub fn serialize<T: AsRef<[u8]>, S: Serializer>(
    bytes: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

/// Reads bytes from a Base64 string.
pub fn deserialize<'de, T: From<Vec<u8>>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD
        .decode(text)
        .map(T::from)
        .map_err(serde::de::Error::custom)
}

/// The same for optional bytes: `#[serde(with = "base64_text::optional")]`.
pub mod optional {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(
        transparent,
        bound(serialize = "T: AsRef<[u8]>", deserialize = "T: From<Vec<u8>>")
    )]
    struct Text<T>(#[serde(with = "super")] T);

    /// Writes bytes as a Base64 string, and none as null.
    pub fn serialize<T: AsRef<[u8]>, S: Serializer>(
        bytes: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        bytes
            .as_ref()
            .map(|bytes| Text(bytes.as_ref()))
            .serialize(serializer)
    }

    /// Reads bytes from a Base64 string, and none from null.
    pub fn deserialize<'de, T: From<Vec<u8>>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        Ok(Option::<Text<T>>::deserialize(deserializer)?.map(|Text(bytes)| bytes))
    }
}
