//! Outputs that a recovery found on their streams: no host sends them again.

use super::RelayState;
use crate::store::{OutboxRow, Published, Store, StoreError};

/// Splits outputs into those to send and those that a recovery found on their streams.
///
/// Bodies are not compared. A rerun of a handler may produce a different body, and only the host
/// can publish under such an id.
///
/// # Errors
/// The database cannot be read.
pub(super) async fn split(
    store: &Store,
    state: &RelayState,
    rows: Vec<OutboxRow>,
) -> Result<(Vec<OutboxRow>, Vec<Published>), StoreError> {
    if rows.is_empty() || !state.checks_recovered() {
        return Ok((rows, Vec::new()));
    }
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    let mut places = store.find_recovered(&ids).await?;
    let (mut to_send, mut already_published) = (Vec::new(), Vec::new());
    for row in rows {
        match places.remove(&row.id) {
            Some((stream, stream_sequence)) => already_published.push(Published {
                seq: row.seq,
                stream,
                stream_sequence,
            }),
            None => to_send.push(row),
        }
    }
    Ok((to_send, already_published))
}
