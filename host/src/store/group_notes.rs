//! Owners and notes of failure groups.

use anyhow::anyhow;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::db::{Db, Param, Row, Sql, read_row};
use super::rows::Columns;
use super::{Actor, Result, Store, StoreError, shared};
use crate::model::schema::Time;

/// The owner and the note of a failure group. At least one of them is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct GroupNote {
    /// The person or the team that owns the failure.
    pub owner: Option<String>,
    /// The facts about it, as an operator wrote them.
    pub note: Option<String>,
    /// The name of the token that wrote it last.
    pub actor: String,
    /// The name that the client stated.
    pub stated_name: Option<String>,
    /// When it was written last.
    #[schemars(with = "Time")]
    pub at: Timestamp,
}

/// A change of an owner or of a note. `None` keeps it, an empty text removes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupNoteChange {
    /// See [`GroupNote::owner`].
    pub owner: Option<String>,
    /// See [`GroupNote::note`].
    pub note: Option<String>,
}

impl Store {
    /// Changes the owner or the note of a group. Returns both as they are now, `None` if neither is
    /// set.
    ///
    /// # Errors
    /// `Refused` if there is no such group.
    pub async fn note_group(
        &self,
        group: &str,
        change: &GroupNoteChange,
        actor: &Actor,
    ) -> Result<Option<GroupNote>> {
        let mut db = self.write().await?;

        // Of two changes, the second one sees the first.
        if db
            .fetch_optional(LOCK, &[Param::Text(group)])
            .await?
            .is_none()
        {
            return Err(StoreError::Refused(anyhow!("there is no group {group}")));
        }
        let before = find(&mut db, group).await?;
        let merged = |given: &Option<String>, kept: Option<String>| match given {
            Some(text) => {
                Some(shared::printable(text.trim()).into_owned()).filter(|text| !text.is_empty())
            }
            None => kept,
        };
        let (owner, note) = before.map_or((None, None), |before| (before.owner, before.note));
        let (owner, note) = (merged(&change.owner, owner), merged(&change.note, note));

        // Write or delete it.
        if owner.is_none() && note.is_none() {
            db.execute(DELETE, &[Param::Text(group)]).await?;
        } else {
            let stated_name = actor.stated_name.as_deref().map(shared::printable);
            let params = [
                Param::Text(group),
                Param::OptionalText(owner.as_deref()),
                Param::OptionalText(note.as_deref()),
                Param::Text(&actor.name),
                Param::OptionalText(stated_name.as_deref()),
            ];
            db.execute(WRITE, &params).await?;
        }
        let written = find(&mut db, group).await?;
        db.commit().await?;
        Ok(written)
    }
}

async fn find(db: &mut Db, group: &str) -> Result<Option<GroupNote>> {
    let row = db.fetch_optional(FIND, &[Param::Text(group)]).await?;
    let read = |row: &Row| read_row(row, FIND.doing, read);
    Ok(row.as_ref().map(read).transpose()?.flatten())
}

/// The note in a row with the columns of [`FIND`]; `None` where they are null.
pub(super) fn read(row: &impl Columns) -> sqlx::Result<Option<GroupNote>> {
    let Some(actor) = row.get("noted_by")? else {
        return Ok(None);
    };
    Ok(Some(GroupNote {
        owner: row.get("owner")?,
        note: row.get("note")?,
        actor,
        stated_name: row.get("noted_by_stated")?,
        at: row.time("noted_at")?,
    }))
}

const LOCK: Sql = Sql {
    postgres: "select id from oncely.dead_letter_group where id = $1 for no key update",
    sqlite: "select id from oncely_dead_letter_group where id = $1",
    doing: "find a group of dead letters",
};

const FIND: Sql = Sql {
    postgres: "select owner, note, actor as noted_by, stated_name as noted_by_stated,
             (extract(epoch from written_at) * 1000000)::bigint as noted_at
         from oncely.dead_letter_group_note where group_id = $1",
    sqlite: "select owner, note, actor as noted_by, stated_name as noted_by_stated, written_at as noted_at
         from oncely_dead_letter_group_note where group_id = $1",
    doing: "read the note of a group",
};

const WRITE: Sql = Sql {
    postgres: "insert into oncely.dead_letter_group_note (group_id, owner, note, actor, stated_name)
         values ($1, $2, $3, $4, $5)
         on conflict (group_id) do update set owner = excluded.owner, note = excluded.note,
             actor = excluded.actor, stated_name = excluded.stated_name, written_at = excluded.written_at",
    sqlite: "insert into oncely_dead_letter_group_note (group_id, owner, note, actor, stated_name)
         values ($1, $2, $3, $4, $5)
         on conflict (group_id) do update set owner = excluded.owner, note = excluded.note,
             actor = excluded.actor, stated_name = excluded.stated_name, written_at = excluded.written_at",
    doing: "write the note of a group",
};

const DELETE: Sql = Sql {
    postgres: "delete from oncely.dead_letter_group_note where group_id = $1",
    sqlite: "delete from oncely_dead_letter_group_note where group_id = $1",
    doing: "delete the note of a group",
};
