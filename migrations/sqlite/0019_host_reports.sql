-- What the host runs, as JSON. It writes this row every other second: that this commits also tells it that the database takes
-- writes.
create table oncely_host_report (
    row        integer not null constraint host_report_pk primary key constraint host_report_is_one check (row = 1),
    written_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- Counts the reports.
    number     integer not null default 1,
    report     text    not null
) strict;
