//! The wall around guests' statements: what SQLite itself refuses while one of them is prepared or runs.
//!
//! The statement filter reads a statement's text; this does not depend on its verdict. SQLite asks the authorizer about each
//! thing a statement would do, also through views and triggers, and only reading and writing workers' own tables is
//! granted. Limits keep a single value, statement or expression from growing without bound.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libsqlite3_sys as ffi;
use sqlx::sqlite::LockedSqliteHandle;

/// What SQLite may allocate, in bytes, in the whole process: a statement that wants more fails.
const HEAP_BYTES: i64 = 512 * 1024 * 1024;

/// What a guest's statement may grow to. SQLite's own limits hold for statements of the house.
const LIMITS: [(c_int, c_int); 11] = [
    // A text, blob or row, in bytes.
    (ffi::SQLITE_LIMIT_LENGTH, 32 * 1024 * 1024),
    (ffi::SQLITE_LIMIT_SQL_LENGTH, 256 * 1024),
    (ffi::SQLITE_LIMIT_COLUMN, 500),
    (ffi::SQLITE_LIMIT_EXPR_DEPTH, 100),
    (ffi::SQLITE_LIMIT_COMPOUND_SELECT, 100),
    (ffi::SQLITE_LIMIT_VDBE_OP, 250_000),
    (ffi::SQLITE_LIMIT_FUNCTION_ARG, 100),
    (ffi::SQLITE_LIMIT_ATTACHED, 0),
    (ffi::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200),
    (ffi::SQLITE_LIMIT_VARIABLE_NUMBER, 10_000),
    (ffi::SQLITE_LIMIT_TRIGGER_DEPTH, 20),
];

/// Beginnings of the names of tables, also virtual ones, that are not for workers.
const DENIED_PREFIXES: [&str; 3] = ["oncely_", "sqlite_", "pragma_"];
/// Virtual tables that show the pages of the file and how statements are run.
const DENIED_TABLES: [&str; 3] = ["dbstat", "bytecode", "tables_used"];
const DENIED_FUNCTIONS: [&str; 2] = ["load_extension", "fts3_tokenizer"];

/// Under this name a connection owns what its authorizer looks at.
const CLIENT_DATA: &CStr = c"oncely authorizer";

/// The wall of one connection. It stands only while it is raised.
pub(super) struct Authorizer {
    /// Whether a guest's statement is being prepared or run.
    is_active: Arc<AtomicBool>,
    /// The connection's limits for statements of the house, as (limit, value).
    platform_limits: Vec<(c_int, c_int)>,
}

impl Authorizer {
    /// Builds the wall of a connection, lowered.
    pub(super) fn install(handle: &mut LockedSqliteHandle<'_>) -> sqlx::Result<Self> {
        let db = handle.as_raw_handle().as_ptr();
        let is_active = Arc::new(AtomicBool::new(false));
        let owned = Arc::into_raw(Arc::clone(&is_active))
            .cast_mut()
            .cast::<c_void>();
        // SAFETY: `db` is open and, as long as `handle` is held, used by nobody else. `owned` is one reference count that
        // the connection takes over: SQLite gives it to `release` exactly once, when the connection has been closed or at
        // once if it cannot keep it. Until then the authorizer may look at it.
        let results = unsafe {
            let kept = ffi::sqlite3_set_clientdata(db, CLIENT_DATA.as_ptr(), owned, Some(release));
            let authorized = match kept {
                ffi::SQLITE_OK => ffi::sqlite3_set_authorizer(db, Some(authorize), owned),
                failed => failed,
            };
            ffi::sqlite3_hard_heap_limit64(HEAP_BYTES);
            [
                kept,
                authorized,
                configure(db, ffi::SQLITE_DBCONFIG_DEFENSIVE, 1),
            ]
            .into_iter()
            .chain([configure(db, ffi::SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)])
            .chain([configure(db, ffi::SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 0)])
            .find(|result| *result != ffi::SQLITE_OK)
        };
        if let Some(failed) = results {
            return Err(sqlx::Error::Configuration(
                format!("SQLite refused its guards (code {failed})").into(),
            ));
        }
        // SAFETY: as above; a negative value only asks for the present one.
        let present = |limit| unsafe { ffi::sqlite3_limit(db, limit, -1) };
        let platform_limits = LIMITS
            .iter()
            .map(|(limit, _)| (*limit, present(*limit)))
            .collect();
        Ok(Authorizer {
            is_active,
            platform_limits,
        })
    }

    /// From now on statements are a guest's.
    pub(super) fn activate(&self, handle: &mut LockedSqliteHandle<'_>) {
        set_limits(handle, &LIMITS);
        self.is_active.store(true, Ordering::Release);
    }

    /// From now on statements are the house's. Returns whether the transaction is still open.
    pub(super) fn deactivate(&self, handle: &mut LockedSqliteHandle<'_>) -> bool {
        self.is_active.store(false, Ordering::Release);
        set_limits(handle, &self.platform_limits);
        // SAFETY: the connection is open, and `handle` keeps everybody else away from it.
        unsafe { ffi::sqlite3_get_autocommit(handle.as_raw_handle().as_ptr()) == 0 }
    }
}

fn set_limits(handle: &mut LockedSqliteHandle<'_>, limits: &[(c_int, c_int)]) {
    let db = handle.as_raw_handle().as_ptr();
    for (limit, value) in limits {
        // SAFETY: the connection is open, and `handle` keeps everybody else away from it.
        unsafe { ffi::sqlite3_limit(db, *limit, *value) };
    }
}

/// Switches an option on or off.
///
/// # Safety
/// `db` must be open, and `option` one of those that take a flag and the place for an answer.
unsafe fn configure(db: *mut ffi::sqlite3, option: c_int, on: c_int) -> c_int {
    // SAFETY: the caller's; a null place means that no answer is wanted.
    unsafe { ffi::sqlite3_db_config(db, option, on, std::ptr::null_mut::<c_int>()) }
}

/// Gives up the reference that the connection held.
unsafe extern "C" fn release(is_active: *mut c_void) {
    // SAFETY: it is the pointer that `install` made of an `Arc`, and SQLite calls this once.
    drop(unsafe { Arc::from_raw(is_active.cast_const().cast::<AtomicBool>()) });
}

/// Answers SQLite's question whether a statement may do something. It neither panics nor touches the connection.
unsafe extern "C" fn authorize(
    is_active: *mut c_void,
    action: c_int,
    first: *const c_char,
    second: *const c_char,
    _database: *const c_char,
    _trigger: *const c_char,
) -> c_int {
    // SAFETY: the connection owns a reference to the flag, and gives it up only once it is closed.
    let is_active = unsafe { &*is_active.cast_const().cast::<AtomicBool>() };
    if !is_active.load(Ordering::Acquire) {
        return ffi::SQLITE_OK;
    }
    // SAFETY: SQLite passes null or a text that ends in NUL and lives until this returns.
    let (first, second) = unsafe { (text(first), text(second)) };
    if is_granted(action, first, second) {
        ffi::SQLITE_OK
    } else {
        ffi::SQLITE_DENY
    }
}

/// # Safety
/// `text` must be null or end in NUL, and live as long as what is returned.
unsafe fn text<'t>(text: *const c_char) -> &'t [u8] {
    // SAFETY: the caller's.
    if text.is_null() {
        &[]
    } else {
        unsafe { CStr::from_ptr(text) }.to_bytes()
    }
}

/// Whether a guest may do this. What is not named here is denied: transactions, savepoints, schema changes, `attach`,
/// `detach`, `vacuum`, `analyze`, `reindex`, pragmas.
fn is_granted(action: c_int, first: &[u8], second: &[u8]) -> bool {
    match action {
        ffi::SQLITE_SELECT | ffi::SQLITE_RECURSIVE => true,
        ffi::SQLITE_READ | ffi::SQLITE_INSERT | ffi::SQLITE_UPDATE | ffi::SQLITE_DELETE => {
            !is_denied_table(first)
        }
        ffi::SQLITE_FUNCTION => !DENIED_FUNCTIONS
            .iter()
            .any(|name| name.as_bytes().eq_ignore_ascii_case(second)),
        // Full-text tables ask it of themselves.
        ffi::SQLITE_PRAGMA => first.eq_ignore_ascii_case(b"data_version"),
        _ => false,
    }
}

fn is_denied_table(name: &[u8]) -> bool {
    let begins = |with: &&str| {
        name.get(..with.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(with.as_bytes()))
    };
    DENIED_PREFIXES.iter().any(begins)
        || DENIED_TABLES
            .iter()
            .any(|table| table.as_bytes().eq_ignore_ascii_case(name))
}
