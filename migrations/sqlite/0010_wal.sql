-- The relay on PostgreSQL can read what committed from the database's log instead of polling for it. SQLite has no log that
-- others may read, one host and nothing to poll over a network: there is nothing to change here.
select 1;
