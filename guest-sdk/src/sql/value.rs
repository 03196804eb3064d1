//! Conversions between Rust types and database values.

use super::Value;

/// Converts to a parameter of a statement.
///
/// Implemented for `bool`, integers that fit into an `i64`, floats, text, bytes, [`Value`] itself,
/// references to these and `Option`s of them (`None` is null). For a decimal, UUID, JSON,
/// timestamp, date or time, build the [`Value`], for example `Value::Decimal("12.50".into())`.
pub trait ToValue {
    /// Converts to a parameter.
    fn to_value(&self) -> Value;
}

/// Converts from the value of a column.
///
/// Implemented for `bool`, integers, `f64`, `String`, `Vec<u8>`, [`Value`] itself and `Option`s of
/// them. It accepts the forms of both PostgreSQL and SQLite: a `bool` is also read from the
/// integers 0 and 1, an integer also from a timestamp (microseconds since the epoch), a `String`
/// from every type with a text form.
pub trait FromValue: Sized {
    /// Converts a value.
    ///
    /// # Errors
    /// A reason, as a half sentence, when the value is null, of another type or out of range.
    fn from_value(value: &Value) -> Result<Self, String>;
}

impl Value {
    /// `value` as a JSON parameter.
    ///
    /// # Errors
    /// When `value` cannot be serialized as JSON.
    pub fn json(value: &impl serde::Serialize) -> Result<Self, serde_json::Error> {
        serde_json::to_string(value).map(Value::Json)
    }

    fn describe(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Boolean(_) => "a boolean",
            Value::Int64(_) => "an integer",
            Value::Float64(_) => "a float",
            Value::Decimal(_) => "a decimal",
            Value::Text(_) => "text",
            Value::Bytes(_) => "bytes",
            Value::Uuid(_) => "a UUID",
            Value::Json(_) => "JSON",
            Value::Timestamp(_) => "a timestamp",
            Value::Date(_) => "a date",
            Value::Time(_) => "a time",
        }
    }

    fn type_error<T>(&self, wanted: &str) -> Result<T, String> {
        Err(match self {
            Value::Null => format!("null cannot be read as {wanted}; use Option<{wanted}>"),
            _ => format!("{} cannot be read as {wanted}", self.describe()),
        })
    }
}

impl<T: ToValue + ?Sized> ToValue for &T {
    fn to_value(&self) -> Value {
        (**self).to_value()
    }
}

impl<T: ToValue> ToValue for Option<T> {
    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, ToValue::to_value)
    }
}

impl ToValue for Value {
    fn to_value(&self) -> Value {
        self.clone()
    }
}

impl FromValue for Value {
    fn from_value(value: &Value) -> Result<Self, String> {
        Ok(value.clone())
    }
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(None),
            value => T::from_value(value).map(Some),
        }
    }
}

/// `ToValue` for a type, and `From` to build a `Value` directly.
macro_rules! parameters {
    ($($type:ty => |$this:ident| $value:expr;)+) => {$(
        impl ToValue for $type {
            fn to_value(&self) -> Value {
                let $this = self;
                $value
            }
        }

        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                value.to_value()
            }
        }
    )+};
}

parameters! {
    bool => |this| Value::Boolean(*this);
    i64 => |this| Value::Int64(*this);
    i32 => |this| Value::Int64(i64::from(*this));
    i16 => |this| Value::Int64(i64::from(*this));
    i8 => |this| Value::Int64(i64::from(*this));
    u32 => |this| Value::Int64(i64::from(*this));
    u16 => |this| Value::Int64(i64::from(*this));
    u8 => |this| Value::Int64(i64::from(*this));
    f64 => |this| Value::Float64(*this);
    f32 => |this| Value::Float64(f64::from(*this));
    String => |this| Value::Text(this.clone());
    Vec<u8> => |this| Value::Bytes(this.clone());
}

impl ToValue for str {
    fn to_value(&self) -> Value {
        Value::Text(self.to_owned())
    }
}

impl ToValue for [u8] {
    fn to_value(&self) -> Value {
        Value::Bytes(self.to_vec())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        text.to_value()
    }
}

impl From<&[u8]> for Value {
    fn from(bytes: &[u8]) -> Self {
        bytes.to_value()
    }
}

impl<T: ToValue> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.to_value()
    }
}

macro_rules! integers {
    ($($type:ident)+) => {$(
        impl FromValue for $type {
            fn from_value(value: &Value) -> Result<Self, String> {
                match value {
                    Value::Int64(number) | Value::Timestamp(number) => $type::try_from(*number)
                        .map_err(|_| format!("{number} is out of range for {}", stringify!($type))),
                    other => other.type_error(stringify!($type)),
                }
            }
        }
    )+};
}

integers! { i64 i32 i16 i8 u64 u32 u16 u8 }

impl FromValue for bool {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Boolean(truth) => Ok(*truth),
            Value::Int64(0) => Ok(false),
            Value::Int64(1) => Ok(true),
            other => other.type_error("bool"),
        }
    }
}

impl FromValue for f64 {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Float64(number) => Ok(*number),
            other => other.type_error("f64"),
        }
    }
}

impl FromValue for String {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Text(text)
            | Value::Decimal(text)
            | Value::Uuid(text)
            | Value::Json(text)
            | Value::Date(text)
            | Value::Time(text) => Ok(text.clone()),
            other => other.type_error("String"),
        }
    }
}

impl FromValue for Vec<u8> {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Bytes(bytes) => Ok(bytes.clone()),
            other => other.type_error("Vec<u8>"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params;

    #[test]
    fn parameters_are_borrowed_and_none_is_null() {
        let name = "alice".to_owned();
        assert_eq!(
            params![
                name,
                &name,
                "x",
                7_u8,
                true,
                None::<i64>,
                Some("y"),
                vec![1_u8]
            ],
            &[
                Value::from(name.as_str()),
                Value::Text(name.clone()),
                Value::from("x"),
                Value::from(7),
                Value::from(true),
                Value::Null,
                Value::from(Some("y")),
                Value::Bytes(vec![1]),
            ]
        );
        assert!(params![].is_empty());
    }

    #[test]
    fn both_databases_forms_of_a_value_are_read() {
        assert_eq!(bool::from_value(&Value::Int64(1)), Ok(true));
        assert_eq!(bool::from_value(&Value::Boolean(true)), Ok(true));
        assert_eq!(i64::from_value(&Value::Timestamp(5)), Ok(5));
        assert_eq!(
            String::from_value(&Value::Decimal("1.50".to_owned())),
            Ok("1.50".to_owned())
        );
    }

    #[test]
    fn a_number_out_of_range_is_an_error() {
        assert_eq!(
            u8::from_value(&Value::Int64(256)),
            Err("256 is out of range for u8".to_owned())
        );
        assert_eq!(
            i64::from_value(&Value::Null),
            Err("null cannot be read as i64; use Option<i64>".to_owned())
        );
        assert_eq!(Option::<i64>::from_value(&Value::Null), Ok(None));
    }
}
