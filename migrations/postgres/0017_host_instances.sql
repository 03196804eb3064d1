-- Hosts that are alive. Each start of a host is an *instance*; it renews its lease every other second, on the database's
-- clock. When the lease of an instance has run out the other hosts take over from it: they end its sessions, which bear its id
-- in their name, and with them its transactions and locks; then they release what it had leased.

create table oncely.host_instance (
    id          bigint      constraint host_instance_pk primary key,
    started_at  timestamptz not null default clock_timestamp(),
    lease_until timestamptz not null
) with (fillfactor = 50);

-- The instance that leased an output. A transaction of the host says which one it is of, in a setting of its own; a guest
-- that changed it could do no more than have an output published later, or by another host.
alter table oncely.outbox add column leased_by bigint;
alter table oncely.outbox alter column leased_by set default nullif(current_setting('oncely.instance', true), '')::bigint;
