-- Requests over HTTP: what was answered to an idempotency key, in the transaction of the effects. There is no row for a
-- request that is being handled: its transaction holds a lock in its place, which goes with it whatever happens.

alter table oncely.turn
    drop constraint turn_of,
    add constraint turn_of check (of in ('inbox', 'outbox', 'request'));
insert into oncely.turn (of, part) values ('request', 0);

create table oncely.request (
    worker      text        not null,
    -- Of the manifest, such as `/accounts/{id}/transfers`.
    route       text        not null,
    -- Who asked, as a digest; empty for one that nobody vouches for.
    caller      text        not null,
    key         text        not null,
    -- SHA-256 over method, path, query, content type and body.
    fingerprint bytea       not null constraint request_fingerprint_length check (octet_length(fingerprint) = 32),
    status      integer     not null constraint request_status check (status between 200 and 599),
    headers     text        not null,
    body        bytea       not null,
    answered_at timestamptz not null default clock_timestamp(),
    expires_at  timestamptz not null,
    part        smallint    not null,
    constraint request_pk primary key (worker, route, caller, key, part)
) partition by list (part);
create table oncely.request_0 partition of oncely.request for values in (0);
create table oncely.request_1 partition of oncely.request for values in (1);
create table oncely.request_2 partition of oncely.request for values in (2);
create table oncely.request_3 partition of oncely.request for values in (3);

-- The part that requests are written to, and the earlier ones; see `inbox_parts`.
create function oncely.request_parts(out at smallint, out earlier smallint[])
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    lock table oncely.turn in row share mode;
    select turn.part, turn.earlier into strict at, earlier from oncely.turn where of = 'request';
end $$;

-- Takes the lock of a key for this transaction, and returns what was answered before, if it was. When another transaction
-- has the lock, says so, and whether that one handles another request: its lock on the fingerprint tells.
create function oncely_door.claim_request(
    token bytea, worker text, route text, caller text, key text, fingerprint bytea
) returns table (in_flight boolean, other boolean, status integer, headers text, body bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    name constant text := concat_ws(e'\x1f', $2, $3, $4, $5);
    mine constant integer := hashtext(encode($6, 'hex'));
    parts record;
begin
    perform oncely.check_token($1);
    parts := oncely.request_parts();
    if not pg_try_advisory_xact_lock(hashtextextended(name, 0)) then
        return query
        select true, exists (
            select from pg_locks
            where locktype = 'advisory' and objsubid = 2 and granted
                and database = (select oid from pg_database where datname = current_database())
                and classid = (hashtext(name)::bigint & 4294967295)::oid
                and objid <> (mine::bigint & 4294967295)::oid),
            null::integer, null::text, null::bytea;
        return;
    end if;
    perform pg_advisory_xact_lock_shared(hashtext(name), mine);
    return query
    select false, fingerprint <> $6, status, headers, body from oncely.request
    where worker = $2 and route = $3 and caller = $4 and key = $5
        and part = any (parts.earlier || parts.at) and expires_at > clock_timestamp();
end $$;

-- Keeps what was answered, for so many microseconds. An answer that had its time makes room; one that had not is a conflict.
create function oncely_door.answer_request(
    token bytea, worker text, route text, caller text, key text, fingerprint bytea,
    status integer, headers text, body bytea, keep bigint
) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    now constant timestamptz := clock_timestamp();
    parts record;
begin
    perform oncely.check_token($1);
    parts := oncely.request_parts();
    insert into oncely.request as held
        (worker, route, caller, key, fingerprint, status, headers, body, answered_at, expires_at, part)
    values ($2, $3, $4, $5, $6, $7, $8, $9, now, now + $10 * interval '1 microsecond', parts.at)
    on conflict (worker, route, caller, key, part) do update
        set fingerprint = excluded.fingerprint, status = excluded.status, headers = excluded.headers,
            body = excluded.body, answered_at = excluded.answered_at, expires_at = excluded.expires_at
        where held.expires_at <= now;
    return found;
end $$;

revoke all on function oncely.request_parts from public;
