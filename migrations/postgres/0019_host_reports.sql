-- What each host that is alive runs, as JSON. A host writes its row every other second: that this commits also tells it that
-- the database takes writes.
create table oncely.host_report (
    instance   bigint      constraint host_report_pk primary key,
    written_at timestamptz not null default now(),
    -- Counts the reports of the instance.
    number     bigint      not null default 1,
    report     text        not null
) with (fillfactor = 50);
