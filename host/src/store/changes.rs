//! The changes of a transaction in workers' tables, for a dry run that is never committed.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Result, StoreError};

/// A row before and after the transaction, as an object with one value per column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RowChange {
    /// The name of the table.
    pub table: String,
    /// `None` for an inserted row.
    pub before: Option<serde_json::Value>,
    /// `None` for a deleted row.
    pub after: Option<serde_json::Value>,
}

/// All changes of a transaction, as far as they are known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RowChanges")]
pub struct Changes {
    /// The changed rows, at most `limit` of each table.
    pub rows: Vec<RowChange>,
    /// Descriptions of changes that `rows` does not contain.
    pub omitted: Vec<String>,
    /// The reason why the database would refuse the commit.
    pub refused: Option<String>,
}

/// All rows of a worker's table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TableRows {
    /// The name of the table.
    pub table: String,
    /// The columns of its primary key; empty if it has none.
    pub key: BTreeSet<String>,
    /// The rows, each as an object with one value per column.
    pub rows: Vec<serde_json::Value>,
}

/// The changed rows between two readings of the tables.
pub fn changed_rows(before: Vec<TableRows>, after: Vec<TableRows>) -> Vec<RowChange> {
    let mut before: BTreeMap<String, Vec<serde_json::Value>> = before
        .into_iter()
        .map(|table| (table.table, table.rows))
        .collect();
    let tables = after.into_iter().flat_map(|table| {
        let old = before.remove(&table.table).unwrap_or_default();
        let (mut old, mut new) = (old, table.rows);
        remove_common(&mut old, &mut new);
        pair(&table.table, &table.key, old, new)
    });
    tables.collect()
}

/// Refuses to read a table with more than `limit` rows.
pub(super) fn check_row_count(table: &str, count: usize, limit: usize) -> Result<()> {
    if count <= limit {
        return Ok(());
    }
    Err(StoreError::Refused(anyhow::anyhow!(
        "the table {table} has more than {limit} rows"
    )))
}

/// Removes the rows that both lists have, as often as both have them.
fn remove_common(before: &mut Vec<serde_json::Value>, after: &mut Vec<serde_json::Value>) {
    after.retain(|row| {
        let same = before.iter().position(|old| old == row);
        same.map(|at| before.swap_remove(at)).is_none()
    });
}

/// Pairs rows before and after by their primary key. Rows without a partner are inserted or
/// deleted.
pub(super) fn pair(
    table: &str,
    key: &BTreeSet<String>,
    before: Vec<serde_json::Value>,
    after: Vec<serde_json::Value>,
) -> Vec<RowChange> {
    let key_of = |row: &serde_json::Value| -> Option<Vec<Option<serde_json::Value>>> {
        (!key.is_empty()).then(|| key.iter().map(|column| row.get(column).cloned()).collect())
    };
    let mut before: Vec<Option<serde_json::Value>> = before.into_iter().map(Some).collect();
    let mut changes = Vec::new();
    for row in after {
        let own = key_of(&row);
        let is_partner = |other: &&mut Option<serde_json::Value>| {
            own.is_some() && other.as_ref().is_some_and(|other| key_of(other) == own)
        };
        let partner = before.iter_mut().find(is_partner).and_then(Option::take);
        if partner.as_ref() != Some(&row) {
            changes.push(RowChange {
                table: table.to_owned(),
                before: partner,
                after: Some(row),
            });
        }
    }
    let gone = |row| RowChange {
        table: table.to_owned(),
        before: Some(row),
        after: None,
    };
    changes.extend(before.into_iter().flatten().map(gone));
    changes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_paired_by_key_and_unchanged_rows_are_omitted() {
        let before = vec![
            json!({"id": 1, "n": 1}),
            json!({"id": 2, "n": 1}),
            json!({"id": 3, "n": 1}),
        ];
        let after = vec![
            json!({"id": 4, "n": 1}),
            json!({"id": 2, "n": 2}),
            json!({"id": 3, "n": 1}),
        ];
        let change = |before: Option<i64>, after: Option<i64>| {
            let row = |id: i64, n: i64| json!({"id": id, "n": n});
            (
                before.map(|id| row(id, 1)),
                after.map(|id| row(id, if id == 2 { 2 } else { 1 })),
            )
        };
        let changes = pair("t", &BTreeSet::from(["id".to_owned()]), before, after);
        let found: Vec<_> = changes
            .into_iter()
            .map(|change| (change.before, change.after))
            .collect();
        assert_eq!(
            found,
            [
                change(None, Some(4)),
                change(Some(2), Some(2)),
                change(Some(1), None)
            ]
        );
        assert_eq!(
            pair(
                "t",
                &BTreeSet::new(),
                vec![json!({"n": 1})],
                vec![json!({"n": 1})]
            )
            .len(),
            2
        );
    }
}
