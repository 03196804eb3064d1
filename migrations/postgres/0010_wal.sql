-- Outputs that are published from the log. Words: an output goes *by polling* when a host leases its row and marks it, and *by
-- the log* (the write-ahead log, read through a logical replication slot) when one host, the *reader*, is sent it in the
-- order of the commits and notes in bulk what became of it, so that its row is written once and never again. The *position*
-- is how far the reader has come: whatever committed before it by the log is published, or goes by polling since.

-- How new outputs go, one row. All transactions that append look here, so that all hosts agree. `entering`: a slot is being
-- made, and they still go by polling. `leaving`: they go by polling again; those in the log are brought over.
create table oncely.relay (
    mode       text        not null constraint relay_mode check (mode in ('poll', 'entering', 'wal', 'leaving')),
    -- What the host that started last asked for, or what was fallen back to, and why.
    wanted     text        not null constraint relay_wanted check (wanted in ('poll', 'wal')),
    why        text,
    changed_at timestamptz not null default now(),
    -- Of `leaving`: when all transactions before this one have ended, nobody appends to the log any more.
    left_at    xid8
);
create unique index relay_is_one on oncely.relay ((true));
insert into oncely.relay (mode, wanted) values ('poll', 'poll');

-- Where the reader is, one row; it is written several times a second, and read by nobody who appends. While nothing goes by
-- the log everything that did is through.
create table oncely.relay_position (
    -- Grows with each reader: what an earlier one has yet to write is refused.
    reader          bigint      not null default 0,
    lsn             pg_lsn      not null default 'FFFFFFFF/FFFFFFFF',
    -- All outputs by the log with numbers up to this are before the position. There may be more of them.
    through         bigint      not null default 9223372036854775807,
    -- Whatever committed before this time is before the position.
    published_until timestamptz not null default now(),
    recorded_at     timestamptz not null default now()
) with (fillfactor = 10);
create unique index relay_position_is_one on oncely.relay_position ((true));
insert into oncely.relay_position default values;

-- What was published from the log: one row for each stream and step of the reader, kept for longer than the outputs are.
create table oncely.relay_record (
    number        bigint      generated always as identity constraint relay_record_pk primary key,
    stream        text        not null,
    seqs          bigint[]    not null,
    sequences     bigint[]    not null,
    last_seq      bigint      not null,
    last_sequence bigint      not null,
    published_at  timestamptz not null default now(),
    constraint relay_record_pairs check (cardinality(seqs) = cardinality(sequences) and cardinality(seqs) > 0)
);
create index relay_record_by_seq on oncely.relay_record (last_seq);
create index relay_record_by_age on oncely.relay_record (published_at);

alter table oncely.outbox
    -- Who is in charge of the row. One by the log is leased to nobody and looks unpublished for ever.
    add column via        text not null default 'poll' constraint outbox_via check (via in ('poll', 'wal')),
    -- It goes by polling, and may have to wait for others of its key that go by the log: until the position is here.
    add column not_before pg_lsn,
    add constraint outbox_by_log_has_no_place check (via = 'poll' or (published_at is null and behind is null));

-- As before, but for what goes by the log.
drop index oncely.outbox_unpublished;
create index outbox_unpublished on oncely.outbox (leased_until, seq) where published_at is null and via = 'poll';
drop index oncely.outbox_line;
create index outbox_line on oncely.outbox (worker, ordering_key, (seq + 0))
    where published_at is null and ordering_key is not null and via = 'poll';

-- The highest number that an output was given.
create function oncely.last_output() returns bigint
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select coalesce(pg_sequence_last_value(pg_get_serial_sequence('oncely.outbox', 'seq')::regclass), 0);
$$;

-- Outputs by the log that are not known to be published. Found by their numbers, however large the outbox is.
create function oncely.in_log() returns table (seq bigint, worker text, due_at timestamptz)
language plpgsql stable set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan set enable_seqscan = off set jit = off as $$
#variable_conflict use_column
declare
    passed bigint;
begin
    select through into strict passed from oncely.relay_position;
    return query
    select outbox.seq, outbox.worker, outbox.due_at
    from oncely.outbox left join (
        select unnest(seqs) as seq from oncely.relay_record where last_seq > passed
    ) as published on published.seq = outbox.seq
    where outbox.seq > passed and outbox.via = 'wal' and published.seq is null;
end $$;

-- Where an output by the log was published, if that is recorded. May be part of a larger statement, so it names no settings.
create function oncely.recorded(output bigint) returns table (stream text, stream_sequence bigint, published_at timestamptz)
language sql stable as $$
    select record.stream, record.sequences[pg_catalog.array_position(record.seqs, $1)], record.published_at
    from oncely.relay_record as record
    where record.last_seq operator(pg_catalog.>=) $1 and $1 operator(pg_catalog.=) any (record.seqs)
    order by record.last_seq limit 1;
$$;

-- Whether everything by the log is published, or goes by polling since, that committed before a place in the log.
create function oncely.log_is_through(upto pg_lsn) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
    select lsn >= upto from oncely.relay_position;
$$;

-- What is true now. The number comes before the transactions: whoever was given one up to it began before `next`.
create function oncely.log_mark(
    out at timestamptz, out log_end pg_lsn, out last_output bigint, out ended xid8, out next xid8
) language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    at := clock_timestamp();
    last_output := oncely.last_output();
    ended := pg_snapshot_xmin(pg_current_snapshot());
    next := pg_snapshot_xmax(pg_current_snapshot());
    -- After them: what has ended by then stands before it.
    log_end := pg_current_wal_insert_lsn();
end $$;

-- Appends outputs in their order. Those that are due and have nobody in trouble before them in the line of their key are
-- leased for `lease` microseconds, and returned with the time; the first of each key with those that are in line before
-- it (`ahead`), which the relay has to have published. The others are left to the sweep: delayed, or behind somebody.
--
-- While outputs go by the log, those that are due and have nobody before them in line go there, and are leased to nobody. A
-- line that polling has begun it also ends: whoever comes to it waits for what the last one there waits for, or for that
-- one. What goes by polling then has to wait for what is in the log before it.
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
    relay_mode text;
    by_log boolean;
    -- Whether outputs may be in the log, and what committed so far is there before this.
    log_is_used boolean;
    log_end pg_lsn;
    at smallint;
begin
    perform oncely.check_token($1);
    select part into strict at from oncely.turn where of = 'outbox';
    select mode into strict relay_mode from oncely.relay;
    by_log := relay_mode = 'wal';
    log_is_used := relay_mode in ('wal', 'leaving');
    if array_remove($9, null) = '{}' then
        -- Without keys there are no lines.
        return query
        insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body, due_at, leased_until,
            first_attempt_at, via, part)
        select worker, id, event_id, ordinal, subject, headers, body, now + delay * interval '1 microsecond',
            case when delay = 0 and by_log then 'infinity'
                else now + case when delay = 0 then $11 else delay end * interval '1 microsecond' end,
            case when delay = 0 then now end,
            case when delay = 0 and by_log then 'wal' else 'poll' end, at
        from unnest($2, $3, $4, $5, $6, $7, $8, $10) with ordinality
            as given (worker, id, event_id, ordinal, subject, headers, body, delay, place)
        order by place
        returning seq, case when via = 'poll' then (extract(epoch from first_attempt_at) * 1000000)::bigint end,
            null::bigint[];
        return;
    end if;
    if log_is_used then
        log_end := pg_current_wal_insert_lsn();
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
                    -- All that wait for the same go on together.
                    when by_log or count(*) = line_max then (array_agg(coalesce(behind, seq) order by seq desc))[1]
                    else min(coalesce(behind, seq)) filter (where failures > 0 or leased_until <= now
                        or behind is not null or set_aside_at is not null)
                end as in_trouble
            from (
                select seq, behind, set_aside_at, failures, leased_until from oncely.outbox
                where outbox.worker = given.worker and outbox.ordering_key = given.ordering_key
                    and outbox.ordering_key is not null and published_at is null and via = 'poll' and due_at <= now
                order by seq + 0 desc limit line_max
            ) as in_line
        ) as unpublished
        where given.is_first and given.ordering_key is not null and unpublished.seqs is not null
    ), judged as materialized (
        select *, delay = 0 and by_log and in_trouble is null as goes_by_log,
            log_is_used and ordering_key is not null as minds_log
        from given left join line using (worker, ordering_key)
    ), appended as (
        insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body, ordering_key, due_at, behind,
            leased_until, first_attempt_at, via, not_before, part)
        select worker, id, event_id, ordinal, subject, headers, body, ordering_key,
            now + delay * interval '1 microsecond',
            case when delay = 0 then in_trouble end,
            case
                when goes_by_log then 'infinity'
                when delay > 0 then now + delay * interval '1 microsecond'
                when in_trouble is not null then 'infinity'
                when minds_log then now
                else now + $11 * interval '1 microsecond'
            end,
            case when delay = 0 and in_trouble is null and (goes_by_log or not minds_log) then now end,
            case when goes_by_log then 'wal' else 'poll' end,
            case when not goes_by_log and minds_log then log_end end,
            at
        from judged
        order by place
        returning seq, worker, ordering_key, first_attempt_at, via
    )
    select seq, case when via = 'poll' then (extract(epoch from first_attempt_at) * 1000000)::bigint end,
        case when first_attempt_at is not null and via = 'poll'
            and seq = min(seq) filter (where first_attempt_at is not null) over (partition by worker, ordering_key)
        then seqs end
    from appended left join line using (worker, ordering_key);
end $$;

revoke all on function oncely_door.append, oncely.last_output, oncely.in_log, oncely.recorded, oncely.log_is_through, oncely.log_mark
    from public;
