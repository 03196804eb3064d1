//! Database privileges for guests' SQL: a login role per app, which owns nothing and can only read
//! and write the app's tables.
//!
//! Any statement can undo `set role`, but not the login role of its session. So guests get
//! connections of their own. In their transactions, the host reaches the platform's tables through
//! the definer functions of `migrations/postgres/0001_baseline.sql`.

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row, raw_sql};

use super::errors;
use super::session::{Purpose, Session, Sessions};
use crate::model::hint::WithHint;
use crate::store::inspection::RoleFacts;

/// PostgreSQL truncates longer names.
const NAME_BYTES_MAX: usize = 63;

/// Functions with effects beyond the transaction, or on other sessions.
const UNSAFE_FUNCTIONS: &str = "^(set_config|pg_sleep.*|pg_advisory_.*|pg_try_advisory_.*|pg_notify|lo_.*|loread|lowrite\
    |pg_logical_emit_message|pg_cancel_backend|pg_terminate_backend|pg_export_snapshot|pg_stat_get_activity|dblink.*)$";

/// The login of guests' sessions.
#[derive(Clone)]
pub(in crate::store) struct Login {
    pub role: String,
    pub password: String,
    /// The role that owns the app's tables; it cannot log in.
    owner: String,
}

/// Creates or updates the app's roles. With `reset_password`, the login role gets its stored
/// password even if it exists.
pub(super) async fn set_up(sessions: &Sessions, reset_password: bool) -> anyhow::Result<Login> {
    let mut session = sessions.begin(Purpose::Platform).await?;
    // The names of the roles, under the lock of all hosts.
    let database = lock(&mut session).await.context("wait for other hosts")?;
    let [role, owner] = roles_of(&database);

    // The roles.
    let reset_password = reset_password
        || renew_key(&mut session)
            .await
            .context("renew the key and the password")?;
    let password = ensure_login(&mut session, &role, reset_password).await?;
    ensure_owner(&mut session, &owner).await?;
    check_role(&mut session, &role).await?;
    for member_of in [&role, &owner] {
        grant_membership(&mut session, member_of).await?;
    }

    // Their privileges.
    for grant in grants(&role, &owner, &database) {
        run(&mut session, &grant)
            .await
            .with_context(|| format!("run `{grant}`"))?;
    }
    transfer_ownership(&mut session, &owner)
        .await
        .context("transfer the app's tables to their owner")?;
    grant_tables(&mut session, &role)
        .await
        .context("grant the app's tables to its role")?;
    let remaining = revoke_excess(&mut session, &role, &owner, &database)
        .await
        .context("revoke excess privileges")?;
    session.commit().await.context("commit the roles")?;
    if !remaining.is_empty() {
        tracing::warn!(
            privileges = remaining.join(", "),
            "guests' SQL keeps privileges that only a superuser can revoke; \
             only the statement filter prevents their use; see docs/configuration.md"
        );
    }
    Ok(Login {
        role,
        password,
        owner,
    })
}

impl Login {
    /// The statement that makes objects created later in the transaction belong to the app's owner.
    pub(super) fn become_owner(&self) -> String {
        format!("set local role {};", quoted(&self.owner))
    }
}

/// Inspects the app's roles without changing them.
pub(super) async fn inspect(session: &mut Session) -> anyhow::Result<RoleFacts> {
    let row = session
        .query("select current_database()::text")
        .fetch_one(session.connection())
        .await
        .context("read the database's name")?;
    let [role, owner] = roles_of(&row.try_get::<String, _>(0)?);
    let query = session.query("select count(*) = 2 from pg_roles where rolname in ($1, $2)");
    let query = query.bind(&role).bind(&owner);
    let row = query.fetch_one(session.connection()).await;
    let exist: bool = row.context("find the app's roles")?.try_get(0)?;
    if !exist {
        return Ok(RoleFacts {
            login: role,
            ..RoleFacts::default()
        });
    }
    let has_attributes = check_role(session, &role).await.is_err();
    let missing = missing_grants(session, &role, &owner)
        .await
        .context("compare the grants of the app's roles")?;
    let excess = excess_privileges(session, &role)
        .await
        .context("read the privileges of PUBLIC")?;
    let excess = excess.iter().map(|row| row.try_get("name"));
    Ok(RoleFacts {
        login: role,
        exist,
        has_attributes,
        missing,
        excess: excess.collect::<sqlx::Result<_>>()?,
    })
}

/// The grants of [`grants`] and [`grant_tables`] that the roles lack, as statements.
async fn missing_grants(
    session: &mut Session,
    role: &str,
    owner: &str,
) -> sqlx::Result<Vec<String>> {
    let query = session.query(
        "select format('grant usage on schema %I to %I', nspname, $1) from pg_namespace
         where nspname in ('app_default', 'oncely_definer') and not has_schema_privilege($1, oid, 'usage')
         union all select format('grant usage, create on schema app_default to %I', $2)
         where not (has_schema_privilege($2, 'app_default', 'usage') and has_schema_privilege($2, 'app_default', 'create'))
         union all select format('grant execute on function %s to %I', oid::regprocedure, $1) from pg_proc
         where pronamespace = 'oncely_definer'::regnamespace and not has_function_privilege($1, oid, 'execute')
         union all select format('grant select, insert, update, delete on %s to %I', oid::regclass, $1) from pg_class
         where relnamespace = 'app_default'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f')
             and pg_has_role(relowner, 'usage')
             and not (has_table_privilege($1, oid, 'select') and has_table_privilege($1, oid, 'insert')
                 and has_table_privilege($1, oid, 'update') and has_table_privilege($1, oid, 'delete'))
         union all select format('grant usage, select on sequence %s to %I', oid::regclass, $1) from pg_class
         where relnamespace = 'app_default'::regnamespace and pg_has_role(relowner, 'usage')
             and case when relkind = 'S' then not has_sequence_privilege($1, oid, 'usage') else false end
         union all select format('grant %I to %I', name, current_user) from unnest(array[$1, $2]) as name
         where not pg_has_role(name, 'usage')",
    );
    let rows = query
        .bind(role)
        .bind(owner)
        .fetch_all(session.connection())
        .await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

/// Locks out other hosts, and returns the database's name.
async fn lock(session: &mut Session) -> sqlx::Result<String> {
    let query = session
        .query("select current_database()::text from pg_advisory_xact_lock(hashtextextended('oncely migrates', 0))");
    query.fetch_one(session.connection()).await?.try_get(0)
}

/// The names of the roles that belong to a database.
pub(super) fn roles_of(database: &str) -> [String; 2] {
    ["oncely_app_default_", "oncely_owner_default_"].map(|prefix| role_name(prefix, database))
}

/// Roles are global to the cluster, so their names contain the database.
fn role_name(prefix: &str, database: &str) -> String {
    let name = format!("{prefix}{database}");
    if name.len() <= NAME_BYTES_MAX {
        return name;
    }
    let digest = hex::encode(Sha256::digest(database.as_bytes()));
    let short: String = database
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(20)
        .collect();
    let digest = digest.get(..16).unwrap_or_default();
    format!("{prefix}{short}_{digest}")
}

/// Renews the key for definer functions and the password, if workers' SQL could read them because
/// it ran as the host's role.
async fn renew_key(session: &mut Session) -> sqlx::Result<bool> {
    let renewed = session
        .query("select oncely.renew_definer_key()")
        .fetch_one(session.connection())
        .await?
        .try_get(0)?;
    if renewed {
        tracing::info!("renewed the key for definer functions, which workers' SQL could read");
    }
    Ok(renewed)
}

async fn ensure_login(
    session: &mut Session,
    role: &str,
    reset_password: bool,
) -> anyhow::Result<String> {
    let query = session.query("select oncely.ensure_login($1, $2)");
    query
        .bind(role)
        .bind(reset_password)
        .execute(session.connection())
        .await
        .map_err(|error| refused(error, role))?;
    let query = session.query("select password from oncely.app_login where role = $1");
    let row = query
        .bind(role)
        .fetch_one(session.connection())
        .await
        .context("read the password of the app's role")?;
    row.try_get(0)
        .context("read the password of the app's role")
}

fn refused(error: sqlx::Error, role: &str) -> anyhow::Error {
    let is_privilege = errors::is_insufficient_privilege(&error);
    let error =
        anyhow::Error::new(error).context(format!("create the role {role} for guests' SQL"));
    if !is_privilege {
        return error;
    }
    error.hint(
        "allow the database user to create roles (`alter role … createrole`), \
         or set guest_sql = \"trusted\": guests' SQL then runs as the host's own database user, \
         and only the statement filter keeps it from the platform's tables",
    )
}

async fn ensure_owner(session: &mut Session, owner: &str) -> anyhow::Result<()> {
    let query = session.query("select exists (select from pg_roles where rolname = $1)");
    let row = query
        .bind(owner)
        .fetch_one(session.connection())
        .await
        .context("find the owner role of the app's tables")?;
    if !row.try_get::<bool, _>(0)? {
        let create = format!(
            "create role {} nologin nosuperuser noinherit nocreatedb nocreaterole",
            quoted(owner)
        );
        run(session, &create)
            .await
            .map_err(|error| refused(error, owner))?;
    }
    Ok(())
}

/// Checks that the role has no more than its own grants, as someone may have changed it.
async fn check_role(session: &mut Session, role: &str) -> anyhow::Result<()> {
    let query = session.query(
        "select rolsuper or rolcreatedb or rolcreaterole or rolreplication or rolbypassrls
             or exists (select from pg_auth_members where member = pg_roles.oid)
         from pg_roles where rolname = $1",
    );
    let row = query
        .bind(role)
        .fetch_one(session.connection())
        .await
        .context("read the app's role")?;
    ensure!(
        !row.try_get::<bool, _>(0)?,
        "the role {role} for guests' SQL has attributes or memberships; remove them, then restart"
    );
    Ok(())
}

/// The grants and session settings of the roles. They are idempotent.
fn grants(role: &str, owner: &str, database: &str) -> Vec<String> {
    let (role, owner, database) = (quoted(role), quoted(owner), quoted(database));
    let mut grants = vec![
        // Outside of the host's transactions, the session is read-only.
        format!("alter role {role} in database {database} set default_transaction_read_only = on"),
        format!("alter role {role} in database {database} set search_path = app_default, pg_temp"),
        format!("alter role {role} in database {database} set statement_timeout = '60s'"),
        format!(
            "alter role {role} in database {database} set idle_in_transaction_session_timeout = '10min'"
        ),
        format!("grant usage on schema app_default, oncely_definer to {role}"),
        format!("grant execute on all functions in schema oncely_definer to {role}"),
        format!("grant usage, create on schema app_default to {owner}"),
    ];
    for maker in [format!("for role {owner} "), String::new()] {
        let default = format!("alter default privileges {maker}in schema app_default grant");
        grants.push(format!(
            "{default} select, insert, update, delete on tables to {role}"
        ));
        grants.push(format!("{default} usage, select on sequences to {role}"));
    }
    grants
}

/// Makes the host a member of a role: it acts as the owner in migrations, and terminates hanging
/// sessions of the login role.
async fn grant_membership(session: &mut Session, role: &str) -> anyhow::Result<()> {
    // From PostgreSQL 16 on, the creator of a role is a member without permission to use it.
    let query = session.query("select pg_has_role($1, 'usage')");
    let row = query
        .bind(role)
        .fetch_one(session.connection())
        .await
        .context("read the roles of the host")?;
    if row.try_get(0)? {
        return Ok(());
    }
    run(session, &format!("grant {} to current_user", quoted(role)))
        .await
        .with_context(|| format!("join the role {role}"))
}

/// Transfers tables of the host, created under `guest_sql = "trusted"`, to the owner.
async fn transfer_ownership(session: &mut Session, owner: &str) -> anyhow::Result<()> {
    let query = session.query(
        "select format('alter %s %s owner to ', case relkind when 'v' then 'view' when 'm' then 'materialized view'
                 when 'S' then 'sequence' else 'table' end, pg_class.oid::regclass)
         from pg_class
         where relnamespace = 'app_default'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'S')
             and relowner = current_user::regrole and not exists (
                 select from pg_depend where objid = pg_class.oid and deptype in ('a', 'i', 'e')
                     and classid = 'pg_class'::regclass and refclassid in ('pg_class'::regclass, 'pg_extension'::regclass))
         union all
         select format('alter routine %s owner to ', oid::regprocedure) from pg_proc
         where pronamespace = 'app_default'::regnamespace and proowner = current_user::regrole",
    );
    for row in query.fetch_all(session.connection()).await? {
        let statement = row.try_get::<String, _>(0)? + &quoted(owner);
        run(session, &statement).await?;
    }
    Ok(())
}

/// Grants the login role access to existing tables. Later ones have it by default privileges.
async fn grant_tables(session: &mut Session, role: &str) -> anyhow::Result<()> {
    let query = session.query(
        "select format('grant %s %s to ', case relkind when 'S' then 'usage, select on sequence'
                 else 'select, insert, update, delete on table' end, oid::regclass)
         from pg_class
         where relnamespace = 'app_default'::regnamespace and pg_has_role(relowner, 'usage')
             and case when relkind in ('r', 'p', 'v', 'm', 'f') then not has_table_privilege($1, oid, 'insert')
                 when relkind = 'S' then not has_sequence_privilege($1, oid, 'usage') else false end",
    );
    for row in query.bind(role).fetch_all(session.connection()).await? {
        let statement = row.try_get::<String, _>(0)? + &quoted(role);
        run(session, &statement).await?;
    }
    Ok(())
}

/// Revokes from PUBLIC the privileges that guests could misuse. Returns the remaining ones: the
/// host can only revoke privileges that its database user granted.
async fn revoke_excess(
    session: &mut Session,
    role: &str,
    owner: &str,
    database: &str,
) -> anyhow::Result<Vec<String>> {
    let before = excess_privileges(session, role).await?;
    for row in &before {
        let (what, back): (String, Option<String>) = (row.try_get("what")?, row.try_get("back")?);
        let what = what.replace("{database}", &quoted(database));
        let back = back
            .map(|to| format!("grant {what} to {};", to.replace("{owner}", &quoted(owner))))
            .unwrap_or_default();
        if run(
            session,
            &format!("savepoint before; revoke {what} from public; {back}"),
        )
        .await
        .is_err()
        {
            run(session, "rollback to savepoint before").await?;
        }
    }
    let name = |row: &PgRow| row.try_get::<String, _>("name");
    let remaining = excess_privileges(session, role)
        .await?
        .iter()
        .map(name)
        .collect::<sqlx::Result<Vec<_>>>()?;

    // PostgreSQL reports a revoke without permission only as a notice, so compare before and after.
    let mut revoked = before.iter().map(name).collect::<sqlx::Result<Vec<_>>>()?;
    revoked.retain(|right| !remaining.contains(right));
    if !revoked.is_empty() {
        tracing::info!(
            privileges = revoked.join(", "),
            "revoked from PUBLIC, to keep them from guests"
        );
    }
    Ok(remaining)
}

/// The privileges that the login role has only through PUBLIC: `what` to revoke, the roles that get
/// it `back`, and its `name` for display.
async fn excess_privileges(session: &mut Session, role: &str) -> sqlx::Result<Vec<PgRow>> {
    let query = session.query(
        "select 'temporary on database {database}' as what, null as back, 'temporary tables' as name
         where has_database_privilege($1, current_database(), 'temporary')
         union all select 'create on schema public', null, 'tables in the schema public'
         where exists (select from pg_namespace where nspname = 'public')
             and has_schema_privilege($1, 'public', 'create')
         union all select 'usage on language ' || quote_ident(lanname), 'current_user, {owner}', 'the language ' || lanname
         from pg_language where lanpltrusted and has_language_privilege($1, oid, 'usage')
         union all select 'update on pg_catalog.pg_settings', null, 'updates of pg_settings'
         where has_table_privilege($1, 'pg_catalog.pg_settings', 'update')
         union all select 'execute on function ' || oid::regprocedure,
             case proname when 'pg_stat_get_activity' then 'current_user, pg_monitor' else 'current_user' end, proname::text
         from pg_proc where proname ~ $2 and has_function_privilege($1, oid, 'execute')",
    );
    query
        .bind(role)
        .bind(UNSAFE_FUNCTIONS)
        .fetch_all(session.connection())
        .await
}

async fn run(session: &mut Session, statement: &str) -> sqlx::Result<()> {
    raw_sql(AssertSqlSafe(statement))
        .execute(session.connection())
        .await?;
    Ok(())
}

/// A quoted identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
