//! Decoding of the binary messages of the `pgoutput` plugin: rows inserted into the outbox.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes};

use crate::store::{OutboxRow, shared};

/// PostgreSQL counts time in microseconds from the start of the year 2000.
pub(super) const EPOCH_MICROS: i64 = 946_684_800_000_000;

/// Decodes messages of the plugin, with the columns of earlier relation messages.
#[derive(Default)]
pub(super) struct Decoder {
    columns: HashMap<u32, Vec<String>>,
}

impl Decoder {
    /// Decodes one message. Returns the row of an insert.
    ///
    /// # Errors
    /// The message is truncated or malformed.
    pub(super) fn decode(&mut self, mut message: Bytes) -> Result<Option<OutboxRow>> {
        match byte(&mut message)? {
            b'R' => {
                let (relation, columns) =
                    relation(&mut message).context("decode a relation message")?;
                self.columns.insert(relation, columns);
                Ok(None)
            }
            b'I' => {
                let relation = int(&mut message)?;
                let columns = self
                    .columns
                    .get(&relation)
                    .context("find the relation of a row")?;
                ensure!(
                    byte(&mut message)? == b'N',
                    "an insert message has no new row"
                );
                Ok(Some(
                    row(columns, &mut message).context("decode an output from the WAL")?,
                ))
            }
            // Types, origins, and messages that other software writes to the WAL.
            _ => Ok(None),
        }
    }
}

/// A relation: its id and the names of the published columns.
fn relation(message: &mut Bytes) -> Result<(u32, Vec<String>)> {
    let relation = int(message)?;
    let (_schema, _table) = (text(message)?, text(message)?);
    let _identity = byte(message)?;
    let count = short(message)?;
    let mut columns = Vec::with_capacity(count.into());
    for _ in 0..count {
        let _flags = byte(message)?;
        columns.push(text(message)?);
        let (_type, _modifier) = (int(message)?, int(message)?);
    }
    Ok((relation, columns))
}

fn row(columns: &[String], message: &mut Bytes) -> Result<OutboxRow> {
    let count = usize::from(short(message)?);
    ensure!(
        count == columns.len(),
        "a row has {count} values for {} columns",
        columns.len()
    );
    let mut values: HashMap<&str, Bytes> = HashMap::new();
    for column in columns {
        match byte(message)? {
            b'n' => {}
            b'b' => {
                let length = usize::try_from(int(message)?)?;
                ensure!(message.remaining() >= length, "a value is truncated");
                values.insert(column, message.split_to(length));
            }
            other => bail!(
                "the value of {column} has the format `{}`, not binary",
                char::from(other)
            ),
        }
    }
    let mut value = |column: &str| {
        values
            .remove(column)
            .with_context(|| format!("a row lacks {column}"))
    };
    let first_attempt_at = number(&value("first_attempt_at")?)?.saturating_add(EPOCH_MICROS);
    Ok(OutboxRow {
        seq: number(&value("seq")?)?,
        id: string(&value("id")?)?,
        worker: string(&value("worker")?)?,
        subject: string(&value("subject")?)?,
        headers: shared::headers_from_text(&string(&value("headers")?)?)?,
        body: value("body")?,
        ordering_key: value("ordering_key")
            .ok()
            .map(|key| string(&key))
            .transpose()?,
        blocked_by: Vec::new(),
        group: None,
        first_attempt_at: shared::timestamp(first_attempt_at)?,
        failures: 0,
    })
}

fn number(value: &Bytes) -> Result<i64> {
    Ok(i64::from_be_bytes(
        value
            .as_ref()
            .try_into()
            .context("decode an 8-byte number")?,
    ))
}

fn string(value: &Bytes) -> Result<String> {
    String::from_utf8(value.to_vec()).context("decode a text")
}

fn byte(message: &mut Bytes) -> Result<u8> {
    message
        .try_get_u8()
        .context("read a byte of a truncated message")
}

fn short(message: &mut Bytes) -> Result<u16> {
    message
        .try_get_u16()
        .context("read two bytes of a truncated message")
}

fn int(message: &mut Bytes) -> Result<u32> {
    message
        .try_get_u32()
        .context("read four bytes of a truncated message")
}

/// A text with a terminating zero byte.
fn text(message: &mut Bytes) -> Result<String> {
    let end = message
        .iter()
        .position(|byte| *byte == 0)
        .context("find the end of a name")?;
    let name = string(&message.split_to(end))?;
    message.advance(1);
    Ok(name)
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::*;

    const COLUMNS: [&str; 8] = [
        "seq",
        "id",
        "worker",
        "subject",
        "headers",
        "body",
        "ordering_key",
        "first_attempt_at",
    ];

    fn relation_message() -> Bytes {
        let mut message = BytesMut::new();
        message.put_u8(b'R');
        message.put_u32(7);
        message.put_slice(b"oncely\0outbox\0d");
        message.put_u16(COLUMNS.len() as u16);
        for column in COLUMNS {
            message.put_u8(0);
            message.put_slice(column.as_bytes());
            message.put_slice(b"\0\0\0\0\x14\xff\xff\xff\xff");
        }
        message.freeze()
    }

    fn insert_message(key: Option<&str>) -> BytesMut {
        let mut message = BytesMut::new();
        message.put_slice(b"I\0\0\0\x07N");
        message.put_u16(COLUMNS.len() as u16);
        let mut put = |value: Option<&[u8]>| match value {
            None => message.put_u8(b'n'),
            Some(value) => {
                message.put_u8(b'b');
                message.put_u32(value.len() as u32);
                message.put_slice(value);
            }
        };
        put(Some(&42_i64.to_be_bytes()));
        put(Some(b"id"));
        put(Some(b"w"));
        put(Some(b"out.x"));
        put(Some(br#"[["a","b"]]"#));
        put(Some(b"\0\xff"));
        put(key.map(str::as_bytes));
        put(Some(&1_000_000_i64.to_be_bytes()));
        message
    }

    #[test]
    fn a_row_is_read_by_the_names_of_its_columns() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.decode(relation_message()).unwrap(), None);
        let row = decoder
            .decode(insert_message(None).freeze())
            .unwrap()
            .unwrap();
        assert_eq!(
            (row.seq, row.body.as_ref(), row.ordering_key),
            (42, b"\0\xff".as_slice(), None)
        );
        assert_eq!(row.headers, [("a".to_owned(), "b".to_owned())]);
        assert_eq!(row.first_attempt_at.to_string(), "2000-01-01T00:00:01Z");
        let row = decoder
            .decode(insert_message(Some("k")).freeze())
            .unwrap()
            .unwrap();
        assert_eq!(row.ordering_key.as_deref(), Some("k"));
    }

    #[test]
    fn truncated_or_unknown_messages_are_errors() {
        let mut decoder = Decoder::default();
        assert!(decoder.decode(insert_message(None).freeze()).is_err());
        decoder.decode(relation_message()).unwrap();
        let whole = insert_message(Some("k")).freeze();
        for length in 0..whole.len() {
            assert!(
                decoder.decode(whole.slice(..length)).is_err(),
                "{length} bytes were decoded as a row"
            );
        }
        assert_eq!(
            decoder.decode(Bytes::from_static(b"Mwhatever")).unwrap(),
            None
        );
    }
}
