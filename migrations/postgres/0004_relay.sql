-- The relay keeps the order of a key whatever fails. Words: an unpublished output that is due is *in line*. Those of one
-- worker and ordering key go one after the other: where one cannot go, the later ones wait *behind* it, leased to nobody.
-- One that can never go as things are is *set aside* until a person retries or drops it; its key is held meanwhile.

alter table oncely.outbox
    -- When it is to be published: its commit and its delay. What is due later is not in line yet.
    add column due_at timestamptz not null default now(),
    -- The number of the output it waits for.
    add column behind bigint,
    add column set_aside_at timestamptz,
    add constraint outbox_published_waits_for_nothing
        check (published_at is null or (behind is null and set_aside_at is null));

update oncely.outbox set due_at = coalesce(first_attempt_at, leased_until) where published_at is null;

-- The line of a key. Whoever asks for the order of `seq + 0` gets it from this index or by sorting: of `seq` a plan might
-- walk the primary key through all that is published.
create index outbox_line on oncely.outbox (worker, ordering_key, (seq + 0))
    where published_at is null and ordering_key is not null;
create index outbox_behind on oncely.outbox (behind) where behind is not null;
create index outbox_set_aside on oncely.outbox (seq) where set_aside_at is not null;

-- Outputs that a person dropped; they were never published. Rows are never changed.
create table oncely.dropped_output (
    seq          bigint      constraint dropped_output_pk primary key,
    id           text        not null,
    worker       text        not null,
    event_id     text        not null,
    ordinal      integer     not null,
    subject      text        not null,
    headers      text        not null,
    body         bytea       not null,
    ordering_key text,
    created_at   timestamptz not null,
    due_at       timestamptz not null,
    failures     integer     not null,
    last_error   text,
    set_aside_at timestamptz not null,
    note         text        not null,
    dropped_at   timestamptz not null default now()
);

drop function oncely_door.append(bytea, text[], text[], text[], integer[], text[], text[], bytea[], text[], bigint[], bigint);

-- Appends outputs in their order. Those that are due and have nobody in trouble before them in the line of their key are
-- leased for `lease` microseconds, and returned with the time; the first of each key with those that are in line before
-- it (`ahead`), which the relay has to have published. The others are left to the sweep: delayed, or behind somebody.
create function oncely_door.append(
    token bytea, workers text[], ids text[], event_ids text[], ordinals integer[], subjects text[], headers text[],
    bodies bytea[], ordering_keys text[], delays bigint[], lease bigint
) returns table (seq bigint, first_attempt_at bigint, ahead bigint[])
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    now constant timestamptz := clock_timestamp();
    line_max constant integer := 256;
begin
    perform oncely.check_token($1);
    if array_remove($9, null) = '{}' then
        -- Without keys there are no lines.
        return query
        insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body, due_at, leased_until,
            first_attempt_at)
        select worker, id, event_id, ordinal, subject, headers, body, now + delay * interval '1 microsecond',
            now + case when delay = 0 then $11 else delay end * interval '1 microsecond',
            case when delay = 0 then now end
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
            leased_until, first_attempt_at)
        select worker, id, event_id, ordinal, subject, headers, body, ordering_key,
            now + delay * interval '1 microsecond',
            case when delay = 0 then in_trouble end,
            case
                when delay > 0 then now + delay * interval '1 microsecond'
                when in_trouble is null then now + $11 * interval '1 microsecond'
                else 'infinity'
            end,
            case when delay = 0 and in_trouble is null then now end
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

revoke all on function oncely_door.append from public;
