-- Alarms on what waits for too long, and letters grouped by the failure they died of.
--
-- Words: letters that died of the same failure (worker, reason, code, shape of the detail, place of the trap) are one
-- *group*. An *alarm* is raised and cleared; each change is one transaction with the message that tells of it, so it is
-- never raised twice.

-- None for a letter that is older than this column.
alter table oncely_dead_letter add column group_id text;

-- How many letters are open, and since when.
create index oncely_dead_letter_open on oncely_dead_letter (worker, died_at) where state = 'open';
create index oncely_dead_letter_group_to_do on oncely_dead_letter (group_id) where state in ('open', 'redriven');

-- What letters of a group have in common. How many there are is counted where they are.
create table oncely_letter_group (
    id         text    constraint letter_group_pk primary key,
    worker     text    not null,
    reason     text    not null,
    code       text,
    shape      text    not null,
    place      text,
    first_seen integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- To within a minute: not each death writes it.
    last_seen  integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;

-- One row for each alarm that was ever raised, as it is now. The group is empty but for alarms on a new failure.
create table oncely_alarm (
    worker     text    not null,
    kind       text    not null,
    group_id   text    not null default '',
    -- How often it was raised.
    times      integer not null constraint alarm_times_count_from_one check (times > 0),
    -- What was measured when it was raised, and what raises it: a count, or milliseconds.
    value      integer not null,
    threshold  integer not null,
    raised_at  integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- Since when the value is low enough to clear it.
    calm_since integer,
    cleared_at integer,
    constraint alarm_pk primary key (worker, kind, group_id),
    constraint alarm_cleared_is_over check (cleared_at is null or calm_since is null)
) strict;
create index oncely_alarm_raised on oncely_alarm (worker) where cleared_at is null;
-- How many new failures raised an alarm lately.
create index oncely_alarm_new_failure on oncely_alarm (worker, raised_at) where kind = 'new-failure';
