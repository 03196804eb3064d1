-- The amounts that each account received and paid per day (UTC), in minor units, summed from the
-- events of the ledger.
create table daily_total (
    account  text   not null,
    day      text   not null,
    received integer not null,
    paid     integer not null,
    entries  integer not null,
    constraint daily_total_pk primary key (account, day)
) strict;
