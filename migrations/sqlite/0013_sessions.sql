-- On PostgreSQL the key of the door can be renewed; SQLite has no door.
select 1;
