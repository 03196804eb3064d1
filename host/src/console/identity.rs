//! Who uses the console: sessions, and codes that log in once.
//!
//! Sessions and codes are kept in memory, as digests. A restart of the host ends all of them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::api::Caller;

/// How long a session lasts.
pub const SESSION_LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);

/// How long a code for one login is valid.
const CODE_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// The most sessions, and the most codes. A new one replaces the one that ends first.
const KEPT_MAX: usize = 1000;

type Sha256Digest = [u8; 32];

/// One login. Its forms carry `csrf`, which no other site knows.
#[derive(Debug, Clone)]
pub struct Session {
    /// The holder of the token that logged in.
    pub caller: Caller,
    pub csrf: String,
    /// The name that the person put under an action last.
    pub actor: Option<String>,
    /// The result of the last action, shown once.
    flash: Option<Flash>,
}

/// The result of an action, for the next page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flash {
    pub is_error: bool,
    pub text: String,
}

/// All sessions and codes.
#[derive(Default)]
pub struct Sessions {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    sessions: HashMap<Sha256Digest, (Instant, Session)>,
    codes: HashMap<Sha256Digest, (Instant, Caller)>,
    /// The states of completed logins with a provider.
    used: HashMap<Sha256Digest, (Instant, ())>,
}

impl Sessions {
    /// Begins a session. Returns its id, 256 random bits.
    pub fn begin(&self, caller: Caller, now: Instant) -> String {
        self.begin_for(caller, SESSION_LIFETIME, now)
    }

    /// Like [`Sessions::begin`], for a session of this length.
    pub fn begin_for(&self, caller: Caller, lifetime: Duration, now: Instant) -> String {
        let id = random();
        let session = Session {
            caller,
            csrf: random(),
            actor: None,
            flash: None,
        };
        insert(
            &mut self.lock().sessions,
            digest(&id),
            now + lifetime,
            session,
            now,
        );
        id
    }

    /// The session with this id, with its flash, which is taken out if `takes_flash`.
    pub fn find(
        &self,
        id: &str,
        takes_flash: bool,
        now: Instant,
    ) -> Option<(Session, Option<Flash>)> {
        let mut kept = self.lock();
        let (end, session) = kept.sessions.get_mut(&digest(id))?;
        if *end <= now {
            return None;
        }
        let flash = if takes_flash {
            session.flash.take()
        } else {
            None
        };
        Some((session.clone(), flash))
    }

    /// Sets the message for the next page of a session, and the name under its actions.
    pub fn leave(&self, id: &str, flash: Flash, actor: Option<String>) {
        if let Some((_, session)) = self.lock().sessions.get_mut(&digest(id)) {
            session.flash = Some(flash);
            session.actor = actor.or(session.actor.take());
        }
    }

    /// Ends a session.
    pub fn end(&self, id: &str) {
        self.lock().sessions.remove(&digest(id));
    }

    /// A code that logs in once, within an hour.
    pub fn code(&self, caller: Caller, now: Instant) -> String {
        let code = random();
        let end = now + CODE_LIFETIME;
        insert(&mut self.lock().codes, digest(&code), end, caller, now);
        code
    }

    /// Uses up a code.
    pub fn redeem(&self, code: &str, now: Instant) -> Option<Caller> {
        let (end, caller) = self.lock().codes.remove(&digest(code))?;
        (end > now).then_some(caller)
    }

    /// Uses up a text that is valid until `end`. Whether it was not used before.
    pub fn use_once(&self, text: &str, end: Instant, now: Instant) -> bool {
        let mut kept = self.lock();
        let is_new = !kept.used.contains_key(&digest(text));
        insert(&mut kept.used, digest(text), end, (), now);
        is_new
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Inserts a value. Expired ones are removed, and at the limit the one that ends first.
fn insert<T>(
    values: &mut HashMap<Sha256Digest, (Instant, T)>,
    key: Sha256Digest,
    end: Instant,
    value: T,
    now: Instant,
) {
    values.retain(|_, (end, _)| *end > now);
    if values.len() >= KEPT_MAX {
        let first = values.iter().min_by_key(|(_, (end, _))| *end);
        if let Some(first) = first.map(|(key, _)| *key) {
            values.remove(&first);
        }
    }
    values.insert(key, (end, value));
}

fn digest(secret: &str) -> Sha256Digest {
    Sha256::digest(secret.as_bytes()).into()
}

/// 256 random bits in hex.
fn random() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_after_its_lifetime_and_by_logout() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let id = sessions.begin(Caller::host(), now);
        assert_eq!(id.len(), 64);
        assert!(sessions.find(&id, false, now).is_some());
        assert!(sessions.find("another", false, now).is_none());
        let end = now + SESSION_LIFETIME;
        assert!(sessions.find(&id, false, end).is_none());
        sessions.end(&id);
        assert!(sessions.find(&id, false, now).is_none());
    }

    #[test]
    fn a_session_can_be_shorter_and_a_text_is_used_once() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let minute = Duration::from_secs(60);
        let id = sessions.begin_for(Caller::host(), minute, now);
        assert!(sessions.find(&id, false, now).is_some());
        assert!(sessions.find(&id, false, now + minute).is_none());
        assert!(sessions.use_once("a", now + minute, now));
        assert!(!sessions.use_once("a", now + minute, now));
        assert!(sessions.use_once("b", now + minute, now));
    }

    #[test]
    fn a_code_logs_in_once_and_within_an_hour() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let code = sessions.code(Caller::host(), now);
        assert!(sessions.redeem(&code, now).is_some());
        assert!(sessions.redeem(&code, now).is_none());
        let late = sessions.code(Caller::host(), now);
        assert!(sessions.redeem(&late, now + CODE_LIFETIME).is_none());
    }

    #[test]
    fn sessions_are_bounded_and_a_flash_is_shown_once() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let first = sessions.begin(Caller::host(), now);
        for nth in 1..=KEPT_MAX as u64 {
            sessions.begin(Caller::host(), now + Duration::from_millis(nth));
        }
        assert_eq!(sessions.lock().sessions.len(), KEPT_MAX);
        assert!(sessions.find(&first, false, now).is_none());

        let id = sessions.begin(Caller::host(), now);
        let flash = Flash {
            is_error: false,
            text: "done".to_owned(),
        };
        sessions.leave(&id, flash.clone(), Some("ada".to_owned()));
        let (session, shown) = sessions.find(&id, true, now).unwrap();
        assert_eq!(
            (session.actor.as_deref(), shown),
            (Some("ada"), Some(flash))
        );
        assert!(sessions.find(&id, true, now).unwrap().1.is_none());
    }
}
