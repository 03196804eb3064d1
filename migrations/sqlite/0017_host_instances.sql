-- The instance of the host, one for each start, that leased an output. SQLite has one host: what an instance before this one
-- had leased is free as soon as the next one starts.
alter table oncely_outbox add column leased_by integer;
