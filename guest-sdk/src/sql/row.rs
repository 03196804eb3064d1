//! Rows of a result, with access to columns by name or by index.

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

    /// The value of a column, by name (`row.get("balance")`) or by index from 0 (`row.get(0)`).
    ///
    /// # Errors
    /// When there is no such column, or its value cannot be read as a `T`: null where `T` is not an
    /// `Option`, text for a number, a number out of range for `T`.
    pub fn get<T: FromValue>(&self, column: impl Column) -> Result<T, ColumnError> {
        let value = self.value(&column)?;
        T::from_value(value).map_err(|reason| ColumnError(format!("column {column}: {reason}")))
    }

    /// The value of a JSON column (or of text that holds JSON), parsed as a `T`.
    ///
    /// # Errors
    /// When there is no such column, it is null, or its JSON does not parse as a `T`.
    pub fn json<T: DeserializeOwned>(&self, column: impl Column) -> Result<T, ColumnError> {
        let value = self.value(&column)?;
        let text = String::from_value(value)
            .map_err(|reason| ColumnError(format!("column {column}: {reason}")))?;
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
                    "no column {column}; the row has: {}",
                    self.columns.join(", ")
                ))
            })
    }
}

/// Identifies a column, by its name or by its index from 0.
pub trait Column: fmt::Display {
    /// The index of the column among `columns`, if it exists.
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
    fn a_missing_column_error_lists_the_columns() {
        let error = row().get::<i64>("amount").unwrap_err();
        assert_eq!(
            error.to_string(),
            "no column amount; the row has: name, balance, tags"
        );
        assert!(row().get::<i64>(3).is_err());
    }

    #[test]
    fn a_type_mismatch_names_both_types() {
        let error = row().get::<i64>("name").unwrap_err();
        assert_eq!(error.to_string(), "column name: text cannot be read as i64");
    }
}
