-- Inbox and outbox in parts, by time: what had its time goes with a whole part, by `truncate`, and never row by row. Words:
-- rows are written to the *current* part; *earlier* ones are kept until their last row had its time; then they are empty,
-- and one of the empty ones is the next current one. There are four, made here once and for all.

create table oncely.turn (
    of        text          constraint turn_pk primary key constraint turn_of check (of in ('inbox', 'outbox')),
    part      smallint      not null constraint turn_part check (part between 0 and 3),
    opened_at timestamptz   not null default now(),
    -- Oldest first, each with the time from which nothing was written to it any more.
    earlier   smallint[]    not null default '{}',
    closed_at timestamptz[] not null default '{}',
    constraint turn_earlier check (cardinality(earlier) = cardinality(closed_at) and not part = any (earlier))
);
insert into oncely.turn (of, part) values ('inbox', 0), ('outbox', 0);

alter table oncely.inbox rename to inbox_0;
drop index oncely.inbox_by_age;
alter table oncely.inbox_0
    add column part smallint not null default 0,
    drop constraint inbox_pk;
alter table oncely.inbox_0
    alter column part drop default,
    add constraint inbox_0_pk primary key (worker, event_id, part);
create table oncely.inbox (like oncely.inbox_0 including defaults including constraints) partition by list (part);
alter table oncely.inbox add constraint inbox_pk primary key (worker, event_id, part);
alter table oncely.inbox attach partition oncely.inbox_0 for values in (0);
create table oncely.inbox_1 partition of oncely.inbox for values in (1);
create table oncely.inbox_2 partition of oncely.inbox for values in (2);
create table oncely.inbox_3 partition of oncely.inbox for values in (3);

alter table oncely.outbox rename to outbox_0;
create sequence oncely.outbox_number as bigint;
select setval('oncely.outbox_number', last_value, is_called) from oncely.outbox_seq_seq;
alter table oncely.outbox_0
    alter column seq drop identity,
    drop constraint outbox_pk,
    add column part smallint not null default 0;
alter table oncely.outbox_0
    alter column part drop default,
    alter column seq set default nextval('oncely.outbox_number'),
    add constraint outbox_0_pk primary key (seq, part);
alter index oncely.outbox_unpublished rename to outbox_0_unpublished;
alter index oncely.outbox_published rename to outbox_0_published;
alter index oncely.outbox_line rename to outbox_0_line;
alter index oncely.outbox_behind rename to outbox_0_behind;
alter index oncely.outbox_set_aside rename to outbox_0_set_aside;
create table oncely.outbox (like oncely.outbox_0 including defaults including constraints) partition by list (part);
alter sequence oncely.outbox_number owned by oncely.outbox.seq;
alter table oncely.outbox add constraint outbox_pk primary key (seq, part);
create index outbox_unpublished on oncely.outbox (leased_until, seq) where published_at is null;
create index outbox_published on oncely.outbox (published_at) where published_at is not null;
create index outbox_line on oncely.outbox (worker, ordering_key, (seq + 0))
    where published_at is null and ordering_key is not null;
create index outbox_behind on oncely.outbox (behind) where behind is not null;
create index outbox_set_aside on oncely.outbox (seq) where set_aside_at is not null;
alter table oncely.outbox attach partition oncely.outbox_0 for values in (0);
create table oncely.outbox_1 partition of oncely.outbox for values in (1);
create table oncely.outbox_2 partition of oncely.outbox for values in (2);
create table oncely.outbox_3 partition of oncely.outbox for values in (3);

-- Attempts go by age, too: the events they belong to may have left with a part.
create index attempt_by_age on oncely.attempt (at);

-- The part that the inbox is written to, and the earlier ones, in which event ids may stand. Nobody turns to another part
-- before the transactions that asked have ended: all that claim at the same time write to one and the same part, where its
-- key keeps event ids apart, and what is in earlier parts was committed before. The lock comes before the look.
create function oncely.inbox_parts(out at smallint, out earlier_1 smallint, out earlier_2 smallint, out earlier_3 smallint)
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    lock table oncely.turn in row share mode;
    select part, earlier[1], earlier[2], earlier[3] into strict at, earlier_1, earlier_2, earlier_3
    from oncely.turn where of = 'inbox';
end $$;

-- Settles events as dead that are not settled, and returns them.
create function oncely.settle_dead(
    workers text[], event_ids text[], payloads bytea[], streams text[], sequences bigint[]
) returns table (worker text, event_id text)
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    parts record;
begin
    parts := oncely.inbox_parts();
    return query
    insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, part)
    select worker, event_id, 'dead', payload_sha256, stream, stream_sequence, parts.at
    from unnest($1, $2, $3, $4, $5) as given (worker, event_id, payload_sha256, stream, stream_sequence)
    where parts.earlier_1 is null or not exists (
        select from oncely.inbox where inbox.worker = given.worker and inbox.event_id = given.event_id
            and part in (parts.earlier_1, parts.earlier_2, parts.earlier_3) offset 0)
    order by worker, event_id
    on conflict do nothing
    returning worker, event_id;
end $$;

-- Claims event ids, sorted. `payload_sha256` is that of a record that was there before this statement.
create or replace function oncely_door.claim(
    token bytea, worker text, event_ids text[], payloads bytea[], streams text[], sequences bigint[]
) returns table (event_id text, fresh boolean, payload_sha256 bytea, attempts bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    parts record;
begin
    perform oncely.check_token($1);
    parts := oncely.inbox_parts();
    return query
    with given as materialized (
        select given.*, case when parts.earlier_1 is not null then (
                select payload_sha256 from oncely.inbox where worker = $2 and inbox.event_id = given.event_id
                    and part in (parts.earlier_1, parts.earlier_2, parts.earlier_3)) end as held_before
        from unnest($3, $4, $5, $6) as given (event_id, payload_sha256, stream, stream_sequence)
    ), inserted as (
        insert into oncely.inbox (worker, event_id, state, payload_sha256, stream, stream_sequence, part)
        select $2, event_id, 'done', payload_sha256, stream, stream_sequence, parts.at from given
        where held_before is null order by event_id
        on conflict do nothing
        returning event_id
    )
    select event_id, fresh, case when not fresh then coalesce(held_before, (
            select payload_sha256 from oncely.inbox
            where worker = $2 and inbox.event_id = given.event_id and part = parts.at)) end,
        (select coalesce(max(attempt), 0) from oncely.attempt
         where attempt.worker = $2 and attempt.event_id = given.event_id)::bigint
    from (select *, event_id in (select event_id from inserted) as fresh from given) as given;
end $$;

-- What the inbox holds now.
create or replace function oncely_door.look(token bytea, worker text, event_ids text[])
returns table (event_id text, payload_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    parts record;
begin
    perform oncely.check_token($1);
    parts := oncely.inbox_parts();
    return query
    select held.event_id, held.payload_sha256 from unnest($3) as given (event_id) cross join lateral (
        select * from oncely.inbox where worker = $2 and inbox.event_id = given.event_id
            and part in (parts.at, parts.earlier_1, parts.earlier_2, parts.earlier_3) offset 0
    ) as held;
end $$;

-- Gives claims of this transaction back.
create or replace function oncely_door.unclaim(token bytea, worker text, event_ids text[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    parts record;
    given text;
begin
    perform oncely.check_token($1);
    parts := oncely.inbox_parts();
    foreach given in array $3 loop
        delete from oncely.inbox
        where worker = $2 and event_id = given and part = parts.at and xmin = pg_current_xact_id()::xid;
    end loop;
end $$;

-- Appends outputs in their order. Those that are due and have nobody in trouble before them in the line of their key are
-- leased for `lease` microseconds, and returned with the time; the first of each key with those that are in line before
-- it (`ahead`), which the relay has to have published. The others are left to the sweep: delayed, or behind somebody.
create or replace function oncely_door.append(
    token bytea, workers text[], ids text[], event_ids text[], ordinals integer[], subjects text[], headers text[],
    bodies bytea[], ordering_keys text[], delays bigint[], lease bigint
) returns table (seq bigint, first_attempt_at bigint, ahead bigint[])
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    now constant timestamptz := clock_timestamp();
    line_max constant integer := 256;
    at smallint;
begin
    perform oncely.check_token($1);
    select part into strict at from oncely.turn where of = 'outbox';
    if array_remove($9, null) = '{}' then
        -- Without keys there are no lines.
        return query
        insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body, due_at, leased_until,
            first_attempt_at, part)
        select worker, id, event_id, ordinal, subject, headers, body, now + delay * interval '1 microsecond',
            now + case when delay = 0 then $11 else delay end * interval '1 microsecond',
            case when delay = 0 then now end, at
        from unnest($2, $3, $4, $5, $6, $7, $8, $10) with ordinality
            as given (worker, id, event_id, ordinal, subject, headers, body, delay, place)
        order by place
        returning seq, (extract(epoch from first_attempt_at) * 1000000)::bigint, null::bigint[];
        return;
    end if;
    return query
    with given as materialized (
        select worker, id, event_id, ordinal, subject, headers, body, ordering_key, delay, place,
            delay = 0 and row_number() over (partition by worker, ordering_key, delay = 0 order by place) = 1 as is_first
        from unnest($2, $3, $4, $5, $6, $7, $8, $9, $10) with ordinality
            as given (worker, id, event_id, ordinal, subject, headers, body, ordering_key, delay, place)
    ), line as materialized (
        select given.worker, given.ordering_key, unpublished.seqs, unpublished.in_trouble
        from given, lateral (
            select array_agg(seq) as seqs,
                case
                    when count(*) = line_max then max(seq)
                    else min(coalesce(behind, seq)) filter (where failures > 0 or leased_until <= now
                        or behind is not null or set_aside_at is not null)
                end as in_trouble
            from (
                select seq, behind, set_aside_at, failures, leased_until from oncely.outbox
                where outbox.worker = given.worker and outbox.ordering_key = given.ordering_key
                    and outbox.ordering_key is not null and published_at is null and due_at <= now
                order by seq + 0 desc limit line_max
            ) as in_line
        ) as unpublished
        where given.is_first and given.ordering_key is not null and unpublished.seqs is not null
    ), appended as (
        insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body, ordering_key, due_at, behind,
            leased_until, first_attempt_at, part)
        select worker, id, event_id, ordinal, subject, headers, body, ordering_key,
            now + delay * interval '1 microsecond',
            case when delay = 0 then in_trouble end,
            case
                when delay > 0 then now + delay * interval '1 microsecond'
                when in_trouble is null then now + $11 * interval '1 microsecond'
                else 'infinity'
            end,
            case when delay = 0 and in_trouble is null then now end,
            at
        from given left join line using (worker, ordering_key)
        order by place
        returning seq, worker, ordering_key, first_attempt_at
    )
    select seq, (extract(epoch from first_attempt_at) * 1000000)::bigint,
        case when first_attempt_at is not null
            and seq = min(seq) filter (where first_attempt_at is not null) over (partition by worker, ordering_key)
        then seqs end
    from appended left join line using (worker, ordering_key);
end $$;

revoke all on function oncely.inbox_parts, oncely.settle_dead from public;
