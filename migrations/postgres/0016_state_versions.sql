-- Versions of a key of keyed state only grow, also when it is deleted and set again: a compare-and-set with a version from
-- before the deletion fails. A deleted key keeps its row, without a value and with the version of the deletion. After a
-- day the row is removed, and the worker's floor is raised to its version: a key without a row begins above the floor.

alter table oncely.state alter column value drop not null;
create index state_deleted on oncely.state (updated_at) where value is null;

-- Of each worker, a version that no key without a row has been above.
create table oncely.state_floor (
    worker  text   constraint state_floor_pk primary key,
    version bigint not null constraint state_floor_counts_from_one check (version > 0)
);

-- Each of the keys, with the version that its next one has to follow. The row and the floor are of the same snapshot.
drop function oncely_door.load_state(bytea, text, text[]);
create function oncely_door.load_state(token bytea, worker text, keys text[])
returns table (key text, value bytea, version bigint, has_row boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    select given.key, held.value,
        coalesce(held.version, (select floor.version from oncely.state_floor as floor where floor.worker = $2), 0),
        held.version is not null
    from unnest($3) as given (key) left join lateral (
        select * from oncely.state where worker = $2 and state.key = given.key offset 0
    ) as held on true;
end $$;

-- Writes each key whose row still has the version that was expected, or that has no row and was expected to have none, and
-- returns how many. Keys are locked in their order first, so that two batches wait for each other and do not deadlock.
create or replace function oncely_door.save_state(
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
    ), updated as (
        update oncely.state set value = unmoved.value, version = unmoved.version, updated_at = now()
        from unmoved where state.ctid = unmoved.place
        returning 1
    ), inserted as (
        insert into oncely.state (worker, key, value, version)
        select $2, key, value, version from given where expected is null order by key
        on conflict do nothing
        returning 1
    )
    select (select count(*) from updated) + (select count(*) from inserted) into strict written;
    return written;
end $$;

revoke all on function oncely_door.load_state from public;
