-- A letter that is put back keeps its event id: its record in the inbox stays `dead` until its worker claims the event, and is
-- taken up in the transaction that handles it. SQLite needs no functions for that.
select 1;
