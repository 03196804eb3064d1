-- A letter that is put back keeps its event id: its record in the inbox stays `dead` until its worker claims the event, and is
-- taken up in the transaction that handles it. So there is no moment in which another body finds the id free.

-- Lets this transaction claim an event that was put back. The lock comes before the look at the letter: whoever had to wait
-- sees what became of it.
create function oncely_door.take_up(token bytea, worker text, event_id text, payload bytea) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    perform from oncely.inbox where inbox.worker = $2 and inbox.event_id = $3 for update;
    delete from oncely.inbox
    where inbox.worker = $2 and inbox.event_id = $3 and state = 'dead' and payload_sha256 = $4 and exists (
        select from oncely.dead_letter as letter where letter.worker = $2 and letter.event_id = $3
            and letter.payload_sha256 = $4 and letter.state = 'redriven');
end $$;

-- As before; but what was put back is dead again.
create or replace function oncely_door.unclaim(token bytea, worker text, event_ids text[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    parts record;
    given text;
begin
    perform oncely.check_token($1);
    parts := oncely.inbox_parts();
    foreach given in array $3 loop
        update oncely.inbox set state = 'dead'
        where worker = $2 and event_id = given and part = parts.at and xmin = pg_current_xact_id()::xid and exists (
            select from oncely.dead_letter as letter where letter.worker = $2 and letter.event_id = given
                and letter.payload_sha256 = inbox.payload_sha256 and letter.state = 'redriven');
        if not found then
            delete from oncely.inbox
            where worker = $2 and event_id = given and part = parts.at and xmin = pg_current_xact_id()::xid;
        end if;
    end loop;
end $$;

revoke all on function oncely_door.take_up from public;
