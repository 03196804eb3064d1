-- Versions of a key of keyed state only grow, also when it is deleted and set again: a compare-and-set with a version from
-- before the deletion fails. A deleted key keeps its row, without a value and with the version of the deletion. After a
-- day the row is removed, and the worker's floor is raised to its version: a key without a row begins above the floor.

create table oncely_state_with_deletions (
    worker     text        not null,
    key        text        not null constraint state_key_length check (length(cast(key as blob)) between 1 and 255),
    value      blob,
    version    integer      not null constraint state_version_counts_from_one check (version > 0),
    updated_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint state_pk primary key (worker, key)
) strict;
insert into oncely_state_with_deletions (worker, key, value, version, updated_at)
    select worker, key, value, version, updated_at from oncely_state;
drop table oncely_state;
alter table oncely_state_with_deletions rename to oncely_state;
create index oncely_state_deleted on oncely_state (updated_at) where value is null;

-- Of each worker, a version that no key without a row has been above.
create table oncely_state_floor (
    worker  text    not null constraint state_floor_pk primary key,
    version integer not null constraint state_floor_counts_from_one check (version > 0)
) strict;
