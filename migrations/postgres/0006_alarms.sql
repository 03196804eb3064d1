-- Alarms on what waits for too long, and letters grouped by the failure they died of.
--
-- Words: letters that died of the same failure (worker, reason, code, shape of the detail, place of the trap) are one
-- *group*. An *alarm* is raised and cleared; each change is one transaction with the message that tells of it, so several
-- hosts on one database never raise it twice.

-- None for a letter that is older than this column.
alter table oncely.dead_letter add column group_id text;

-- How many letters are open, and since when.
create index dead_letter_open on oncely.dead_letter (worker, died_at) where state = 'open';
create index dead_letter_group_to_do on oncely.dead_letter (group_id) where state in ('open', 'redriven');

-- What letters of a group have in common. How many there are is counted where they are.
create table oncely.letter_group (
    id         text        constraint letter_group_pk primary key,
    worker     text        not null,
    reason     text        not null,
    code       text,
    shape      text        not null,
    place      text,
    first_seen timestamptz not null default now(),
    -- To within a minute: not each death writes it.
    last_seen  timestamptz not null default now()
);

-- One row for each alarm that was ever raised, as it is now. The group is empty but for alarms on a new failure.
create table oncely.alarm (
    worker     text        not null,
    kind       text        not null,
    group_id   text        not null default '',
    -- How often it was raised.
    times      integer     not null constraint alarm_times_count_from_one check (times > 0),
    -- What was measured when it was raised, and what raises it: a count, or milliseconds.
    value      bigint      not null,
    threshold  bigint      not null,
    raised_at  timestamptz not null default now(),
    -- Since when the value is low enough to clear it.
    calm_since timestamptz,
    cleared_at timestamptz,
    constraint alarm_pk primary key (worker, kind, group_id),
    constraint alarm_cleared_is_over check (cleared_at is null or calm_since is null)
);
create index alarm_raised on oncely.alarm (worker) where cleared_at is null;
-- How many new failures raised an alarm lately.
create index alarm_new_failure on oncely.alarm (worker, raised_at) where kind = 'new-failure';
