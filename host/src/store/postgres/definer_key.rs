//! The key of the definer functions, which the host reads from the database.

use sqlx::Row;

use super::session::{Purpose, Session, Sessions};
use crate::store::Result;
use crate::store::error::Doing as _;

/// Reads the key for definer functions. `exposed` records that workers' statements can read it,
/// too, from now on.
pub(super) async fn load(sessions: &Sessions, exposed: bool) -> Result<()> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    let key = read(&mut session, exposed).await;
    let key = key.doing("read the key for definer functions")?;
    session.commit().await?;
    sessions.set_definer_key(key);
    Ok(())
}

async fn read(session: &mut Session, exposed: bool) -> sqlx::Result<Vec<u8>> {
    if exposed {
        let query = session.query("update oncely.definer_key set exposed = true where not exposed");
        query.execute(session.connection()).await?;
    }
    session
        .query("select key from oncely.definer_key")
        .fetch_one(session.connection())
        .await?
        .try_get(0)
}
