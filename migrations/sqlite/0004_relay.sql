-- The relay keeps the order of a key whatever fails. Words: an unpublished output that is due is *in line*. Those of one
-- worker and ordering key go one after the other: where one cannot go, the later ones wait *behind* it, leased to nobody.
-- One that can never go as things are is *set aside* until a person retries or drops it; its key is held meanwhile.

-- When it is to be published: its commit and its delay. What is due later is not in line yet.
alter table oncely_outbox add column due_at integer not null default 0;
-- The number of the output it waits for.
alter table oncely_outbox add column behind integer
    constraint outbox_published_waits_for_nothing check (published_at is null or behind is null);
alter table oncely_outbox add column set_aside_at integer
    constraint outbox_published_is_not_set_aside check (published_at is null or set_aside_at is null);

update oncely_outbox set due_at = coalesce(first_attempt_at, leased_until);

-- The line of a key.
create index oncely_outbox_line on oncely_outbox (worker, ordering_key, seq)
    where published_at is null and ordering_key is not null;
create index oncely_outbox_behind on oncely_outbox (behind) where behind is not null;
create index oncely_outbox_set_aside on oncely_outbox (seq) where set_aside_at is not null;

-- Outputs that a person dropped; they were never published. Rows are never changed.
create table oncely_dropped_output (
    seq          integer constraint dropped_output_pk primary key,
    id           text    not null,
    worker       text    not null,
    event_id     text    not null,
    ordinal      integer not null,
    subject      text    not null,
    headers      text    not null,
    body         blob    not null,
    ordering_key text,
    created_at   integer not null,
    due_at       integer not null,
    failures     integer not null,
    last_error   text,
    set_aside_at integer not null,
    note         text    not null,
    dropped_at   integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;
