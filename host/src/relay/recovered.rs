//! After a recovery: outputs that were found on their streams are not sent again, whoever finds them in the outbox.

use super::RelayState;
use crate::store::{OutboxRow, Published, Store, StoreError};

/// Takes out of some outputs those that a recovery found, and says where they are. Bodies are not compared: a handler may
/// give another one when it runs again, and nobody else could have published under such an id before.
pub(super) async fn split(
    store: &dyn Store,
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
