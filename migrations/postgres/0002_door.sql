-- The door: how the transaction of a delivery, which runs as the app's own role, reaches the platform's tables.
--
-- A worker's statements run in the same session as the host's own ones, so the role alone cannot tell them apart. The
-- functions of the door therefore ask for a *token*: a code over the transaction's id, made with a key that only the
-- platform's role can read. The host sends it as a bound parameter. A guest cannot make one, finds it in no text of a
-- statement, and could use one that it found somewhere neither in another transaction nor after this one.

create schema oncely_door;

-- The key of the tokens; one row.
create table oncely.door_key (
    key bytea not null constraint door_key_length check (octet_length(key) = 32)
);
create unique index door_key_is_one on oncely.door_key ((true));
insert into oncely.door_key
select decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex');

-- The roles that apps log in as. Every host of this database needs the password; nobody but the platform's role reads it.
create table oncely.app_login (
    role       text        constraint app_login_pk primary key,
    password   text        not null default replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''),
    created_at timestamptz not null default now()
);

-- The token of this transaction for a purpose: sha256(key, sha256(key, purpose:transaction)).
create function oncely.tx_token(purpose text) returns bytea
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    secret bytea;
begin
    select key into strict secret from oncely.door_key;
    return sha256(secret || sha256(secret || convert_to(purpose || ':' || pg_current_xact_id()::text, 'UTF8')));
end $$;

create function oncely.check_token(token bytea) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if token is distinct from oncely.tx_token('door') then
        raise exception using errcode = 'ONC01', message = 'only the host may use the platform''s functions';
    end if;
end $$;

-- Every transaction of a guest's session leaves a mark that is looked at when it commits; see `refuse_early_commit`. The
-- marks are deleted as they are made: what remains is the look.
create unlogged table oncely.mark (
    xid xid8 not null
);

create function oncely.refuse_early_commit() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if current_setting('oncely.finish', true) is distinct from encode(oncely.tx_token('finish'), 'hex') then
        raise exception using errcode = 'ONC02', message = 'only the host ends the transaction of a delivery';
    end if;
    return null;
end $$;

-- The host shows a second token right before it commits. A commit that a guest sends fails and takes everything back.
create constraint trigger mark_is_committed_by_the_host after insert on oncely.mark
    deferrable initially deferred for each row execute function oncely.refuse_early_commit();

create function oncely_door.guard() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    place tid;
begin
    insert into oncely.mark values (pg_current_xact_id()) returning ctid into place;
    delete from oncely.mark where ctid = place;
end $$;

-- The functions below are planned once for each session: planning anew costs more than what they do for a small batch. Plans
-- stay while tables grow from nothing, so the statements are written in a way that leaves no choice but to look each row up
-- by its key (a subquery, or a lateral one, for each): of a join a plan might be kept that reads the whole table, which was
-- right when it held ten rows.

-- Claims event ids, sorted. `payload_sha256` is that of a record that was there before this statement.
create function oncely_door.claim(
    token bytea, worker text, event_ids text[], payloads bytea[], streams text[], sequences bigint[]
) returns table (event_id text, fresh boolean, payload_sha256 bytea, attempts bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    with given as (
        select * from unnest($3, $4, $5, $6) as given (event_id, payload_sha256, stream, stream_sequence)
    ), inserted as (
        insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence)
        select $2, event_id, 'done', payload_sha256, stream, stream_sequence from given order by event_id
        on conflict do nothing
        returning event_id
    )
    select event_id, fresh, case when not fresh then
            (select payload_sha256 from oncely.inbox where worker = $2 and inbox.event_id = given.event_id) end,
        (select coalesce(max(attempt), 0) from oncely.attempt
         where attempt.worker = $2 and attempt.event_id = given.event_id)::bigint
    from (select event_id, event_id in (select event_id from inserted) as fresh from given) as given;
end $$;

-- What the inbox holds now.
create function oncely_door.look(token bytea, worker text, event_ids text[])
returns table (event_id text, payload_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    select held.event_id, held.payload_sha256 from unnest($3) as given (event_id) cross join lateral (
        select * from oncely.inbox where worker = $2 and inbox.event_id = given.event_id offset 0
    ) as held;
end $$;

-- Gives claims of this transaction back.
create function oncely_door.unclaim(token bytea, worker text, event_ids text[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    given text;
begin
    perform oncely.check_token($1);
    foreach given in array $3 loop
        delete from oncely.inbox where worker = $2 and event_id = given and xmin = pg_current_xact_id()::xid;
    end loop;
end $$;

create function oncely_door.load_state(token bytea, worker text, keys text[])
returns table (key text, value bytea, version bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    select held.key, held.value, held.version from unnest($3) as given (key)
        cross join lateral (select * from oncely.state where worker = $2 and state.key = given.key offset 0) as held;
end $$;

-- Writes each key that still has the version that was expected, and returns how many. Keys are locked in their order
-- first, so that two batches wait for each other and do not deadlock.
create function oncely_door.save_state(
    token bytea, worker text, keys text[], expected bigint[], new_values bytea[], versions bigint[]
) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    written bigint;
begin
    perform oncely.check_token($1);
    with given as (
        select * from unnest($3, $4, $5, $6) as given (key, expected, value, version)
    ), unmoved as materialized (
        select given.*, held.place from (select * from given where expected is not null order by key) as given
            cross join lateral (
                select ctid as place, state.version from oncely.state where worker = $2 and state.key = given.key for update
            ) as held
        where held.version = given.expected
    ), deleted as (
        delete from oncely.state using unmoved where state.ctid = unmoved.place and unmoved.value is null
        returning 1
    ), updated as (
        update oncely.state set value = unmoved.value, version = unmoved.version, updated_at = now()
        from unmoved where state.ctid = unmoved.place and unmoved.value is not null
        returning 1
    ), inserted as (
        insert into oncely.state (worker, key, value, version)
        select $2, key, value, version from given where expected is null order by key
        on conflict do nothing
        returning 1
    )
    select (select count(*) from deleted) + (select count(*) from updated) + (select count(*) from inserted)
    into strict written;
    return written;
end $$;

-- Appends outputs in their order. Those without a delay are leased for `lease` microseconds, and returned with the time.
create function oncely_door.append(
    token bytea, workers text[], ids text[], event_ids text[], ordinals integer[], subjects text[], headers text[],
    bodies bytea[], ordering_keys text[], delays bigint[], lease bigint
) returns table (seq bigint, first_attempt_at bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    with clock as (select clock_timestamp() as now)
    insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body, ordering_key, leased_until,
        first_attempt_at)
    select worker, id, event_id, ordinal, subject, headers, body, ordering_key,
        now + case when delay = 0 then $11 else delay end * interval '1 microsecond',
        case when delay = 0 then now end
    from clock, unnest($2, $3, $4, $5, $6, $7, $8, $9, $10) with ordinality
        as given (worker, id, event_id, ordinal, subject, headers, body, ordering_key, delay, place)
    order by place
    returning seq, (extract(epoch from first_attempt_at) * 1000000)::bigint;
end $$;

-- Makes the app's login role and gives it the password that is kept for it, if either is new or `again` asks for it. The
-- password stands in no statement that a client sends, so a log of statements does not show it.
create function oncely.keep_login(login text, again boolean) returns void
language plpgsql set search_path = pg_catalog, pg_temp set password_encryption = 'scram-sha-256' as $$
declare
    is_new boolean := not exists (select from pg_roles where rolname = login);
begin
    if is_new then
        execute format('create role %I login nosuperuser noinherit nocreatedb nocreaterole', login);
    end if;
    insert into oncely.app_login (role) values (login) on conflict do nothing;
    if found or is_new or again then
        execute format('alter role %I password %L', login, (select password from oncely.app_login where role = login));
    end if;
end $$;

revoke all on all functions in schema oncely from public;
revoke all on all functions in schema oncely_door from public;
