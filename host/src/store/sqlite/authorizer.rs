//! The authorizer of guest statements, enforced by SQLite while one is prepared or run.
//!
//! The statement filter checks the text of a statement. The authorizer does not depend on its
//! verdict. SQLite calls it for each action of a statement, also within views and triggers. It
//! grants only reads and writes of workers' own tables. Limits keep a single value, statement or
//! expression from growing without bound.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libsqlite3_sys as ffi;
use sqlx::sqlite::LockedSqliteHandle;

/// The memory that SQLite may allocate in the whole process, in bytes. A statement that needs more
/// fails.
const HEAP_BYTES: i64 = 512 * 1024 * 1024;

/// The limits of a guest's statement. SQLite's own limits hold for statements of the platform.
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

/// Prefixes of tables, also virtual ones, that are not available to workers.
const DENIED_PREFIXES: [&str; 3] = ["oncely_", "sqlite_", "pragma_"];
/// Virtual tables that expose the pages of the file and the execution of statements.
const DENIED_TABLES: [&str; 3] = ["dbstat", "bytecode", "tables_used"];
const DENIED_FUNCTIONS: [&str; 2] = ["load_extension", "fts3_tokenizer"];

/// The name under which a connection owns the flag of its authorizer.
const CLIENT_DATA: &CStr = c"oncely authorizer";

/// The authorizer of one connection. It denies nothing while it is inactive.
pub(super) struct Authorizer {
    /// Whether a guest's statement is being prepared or run.
    is_active: Arc<AtomicBool>,
    /// The connection's limits for statements of the platform, as (limit, value).
    platform_limits: Vec<(c_int, c_int)>,
}

impl Authorizer {
    /// Installs the authorizer of a connection, inactive.
    pub(super) fn install(handle: &mut LockedSqliteHandle<'_>) -> sqlx::Result<Self> {
        let db = handle.as_raw_handle().as_ptr();
        let is_active = Arc::new(AtomicBool::new(false));
        let owned = Arc::into_raw(Arc::clone(&is_active))
            .cast_mut()
            .cast::<c_void>();
        // SAFETY: `db` is open, and `handle` keeps all other users away from it. `owned` is one
        // reference count that the connection takes over. SQLite passes it to `release` exactly
        // once: when the connection has been closed, or at once if the connection cannot keep it.
        // Until then the authorizer may read it.
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
                format!("SQLite refused the authorizer or its settings (code {failed})").into(),
            ));
        }
        // SAFETY: as above. A negative value only reads the present limit.
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

    /// Applies the authorizer and the guest limits to the statements that follow.
    pub(super) fn activate(&self, handle: &mut LockedSqliteHandle<'_>) {
        set_limits(handle, &LIMITS);
        self.is_active.store(true, Ordering::Release);
    }

    /// Lifts the authorizer and the guest limits. Returns whether the transaction is still open.
    pub(super) fn deactivate(&self, handle: &mut LockedSqliteHandle<'_>) -> bool {
        self.is_active.store(false, Ordering::Release);
        set_limits(handle, &self.platform_limits);
        // SAFETY: the connection is open, and `handle` keeps all other users away from it.
        unsafe { ffi::sqlite3_get_autocommit(handle.as_raw_handle().as_ptr()) == 0 }
    }
}

fn set_limits(handle: &mut LockedSqliteHandle<'_>, limits: &[(c_int, c_int)]) {
    let db = handle.as_raw_handle().as_ptr();
    for (limit, value) in limits {
        // SAFETY: the connection is open, and `handle` keeps all other users away from it.
        unsafe { ffi::sqlite3_limit(db, *limit, *value) };
    }
}

/// Switches an option on or off.
///
/// # Safety
///
/// `db` must be open, and `option` must take a flag and the place for a result.
unsafe fn configure(db: *mut ffi::sqlite3, option: c_int, on: c_int) -> c_int {
    // SAFETY: upheld by the caller. A null place means that no result is wanted.
    unsafe { ffi::sqlite3_db_config(db, option, on, std::ptr::null_mut::<c_int>()) }
}

/// Drops the reference that the connection held.
unsafe extern "C" fn release(is_active: *mut c_void) {
    // SAFETY: `install` made this pointer from an `Arc`, and SQLite calls this once.
    drop(unsafe { Arc::from_raw(is_active.cast_const().cast::<AtomicBool>()) });
}

/// Grants or denies one action of a statement. It neither panics nor touches the connection.
unsafe extern "C" fn authorize(
    is_active: *mut c_void,
    action: c_int,
    first: *const c_char,
    second: *const c_char,
    _database: *const c_char,
    _trigger: *const c_char,
) -> c_int {
    // SAFETY: the connection owns a reference to the flag, and drops it only once it is closed.
    let is_active = unsafe { &*is_active.cast_const().cast::<AtomicBool>() };
    if !is_active.load(Ordering::Acquire) {
        return ffi::SQLITE_OK;
    }
    // SAFETY: SQLite passes null, or a text that ends in NUL and lives until this returns.
    let (first, second) = unsafe { (text(first), text(second)) };
    if is_granted(action, first, second) {
        ffi::SQLITE_OK
    } else {
        ffi::SQLITE_DENY
    }
}

/// # Safety
///
/// `text` must be null or end in NUL, and live as long as the returned slice.
unsafe fn text<'t>(text: *const c_char) -> &'t [u8] {
    // SAFETY: upheld by the caller.
    if text.is_null() {
        &[]
    } else {
        unsafe { CStr::from_ptr(text) }.to_bytes()
    }
}

/// Whether a guest may do this. All other actions are denied: transactions, savepoints, schema
/// changes, `attach`, `detach`, `vacuum`, `analyze`, `reindex`, pragmas.
fn is_granted(action: c_int, first: &[u8], second: &[u8]) -> bool {
    match action {
        ffi::SQLITE_SELECT | ffi::SQLITE_RECURSIVE => true,
        ffi::SQLITE_READ | ffi::SQLITE_INSERT | ffi::SQLITE_UPDATE | ffi::SQLITE_DELETE => {
            !is_denied_table(first)
        }
        ffi::SQLITE_FUNCTION => !DENIED_FUNCTIONS
            .iter()
            .any(|name| name.as_bytes().eq_ignore_ascii_case(second)),
        // Full-text tables use it internally.
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
