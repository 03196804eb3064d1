-- On PostgreSQL the transaction of a delivery runs as a role of the app's own and reaches the platform's tables through
-- functions. SQLite knows no roles: an authorizer on the connection keeps guests out, and nothing changes here.
select 1;
