//! One row of a result, its columns found by name or by place.

use std::fmt;
use std::rc::Rc;

use serde::de::DeserializeOwned;

use super::{FromValue, Value};
use crate::bindings::oncely::worker::sql::RowSet;

/// One row of a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    columns: Rc<[String]>,
    values: Vec<Value>,
}

impl Row {
    pub(super) fn from_row_set(row_set: RowSet) -> Vec<Row> {
        let columns: Rc<[String]> = row_set.columns.into();
        row_set
            .rows
            .into_iter()
            .map(|values| Row {
                columns: Rc::clone(&columns),
                values,
            })
            .collect()
    }

    /// The value of a column, by name (`row.get("balance")`) or by place from 0 (`row.get(0)`).
    ///
    /// # Errors
    /// When there is no such column, or its value cannot be a `T`: null where `T` is not an `Option`, text where a
    /// number is wanted, a number too large for `T`.
    pub fn get<T: FromValue>(&self, column: impl Column) -> Result<T, ColumnError> {
        let value = self.value(&column)?;
        T::from_value(value).map_err(|why| ColumnError(format!("column {column}: {why}")))
    }

    /// The value of a JSON column (or of text that holds JSON), read as a `T`.
    ///
    /// # Errors
    /// When there is no such column, it is null, or it does not hold the JSON that `T` expects.
    pub fn json<T: DeserializeOwned>(&self, column: impl Column) -> Result<T, ColumnError> {
        let value = self.value(&column)?;
        let text = String::from_value(value)
            .map_err(|why| ColumnError(format!("column {column}: {why}")))?;
        serde_json::from_str(&text)
            .map_err(|error| ColumnError(format!("column {column}: {error}")))
    }

    /// The names of the columns, in order.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The values, in the order of the columns.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    fn value(&self, column: &impl Column) -> Result<&Value, ColumnError> {
        column
            .index(&self.columns)
            .and_then(|index| self.values.get(index))
            .ok_or_else(|| {
                ColumnError(format!(
                    "there is no column {column}; the row has: {}",
                    self.columns.join(", ")
                ))
            })
    }
}

/// What names a column: its name or its place from 0.
pub trait Column: fmt::Display {
    /// The column's place among `columns`, if it is there.
    fn index(&self, columns: &[String]) -> Option<usize>;
}

impl Column for &str {
    fn index(&self, columns: &[String]) -> Option<usize> {
        columns.iter().position(|name| name == self)
    }
}

impl Column for usize {
    fn index(&self, columns: &[String]) -> Option<usize> {
        (*self < columns.len()).then_some(*self)
    }
}

/// Why a column could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnError(String);

impl fmt::Display for ColumnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ColumnError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        let row_set = RowSet {
            columns: vec!["name".to_owned(), "balance".to_owned(), "tags".to_owned()],
            rows: vec![vec![
                Value::Text("alice".to_owned()),
                Value::Int64(7),
                Value::Json("[\"a\"]".to_owned()),
            ]],
        };
        Row::from_row_set(row_set).remove(0)
    }

    #[test]
    fn columns_are_found_by_name_and_by_index() {
        assert_eq!(row().get::<String>("name").unwrap(), "alice");
        assert_eq!(row().get::<i64>(1).unwrap(), 7);
        assert_eq!(row().json::<Vec<String>>("tags").unwrap(), ["a"]);
    }

    #[test]
    fn a_missing_column_names_those_there_are() {
        let error = row().get::<i64>("amount").unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no column amount; the row has: name, balance, tags"
        );
        assert!(row().get::<i64>(3).is_err());
    }

    #[test]
    fn a_value_of_another_type_says_which_it_is() {
        let error = row().get::<i64>("name").unwrap_err();
        assert_eq!(
            error.to_string(),
            "column name: it holds text, which cannot be read as i64"
        );
    }
}
