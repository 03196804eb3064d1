-- The session of a delivery is shared by the host's statements and the worker's, and the key of the door is renewed once it may
-- be known.

-- Whether workers' statements could read the key: they ran as the host's own role (`guest_sql = "trusted"`). The key before this
-- one tells a host that still holds it from a statement that made a token up.
alter table oncely.door_key
    add column exposed  boolean not null default false,
    add column previous bytea;

-- A new key, and a new password of the app's role, if workers could read the old ones. Returns whether it was so.
create function oncely.renew_door_key() returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    update oncely.door_key
    set previous = key, exposed = false,
        key = decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex')
    where exposed;
    if not found then
        return false;
    end if;
    update oncely.app_login set password = replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '');
    return true;
end $$;

-- Raises the error for a token that does not fit this transaction: ONC04 for that of a host that holds the key before this one.
create function oncely.refuse_token(token bytea, purpose text, code text, why text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    secret bytea;
begin
    select previous into strict secret from oncely.door_key;
    if token = sha256(secret || sha256(secret || convert_to(purpose || ':' || pg_current_xact_id()::text, 'UTF8'))) then
        raise exception using errcode = 'ONC04', message = 'the key of the door was renewed';
    end if;
    raise exception using errcode = code, message = why;
end $$;

-- As before; and what the host sends is read as it was written only as long as no statement changed the encoding.
create or replace function oncely.check_token(token bytea) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if token is distinct from oncely.tx_token('door') then
        perform oncely.refuse_token(token, 'door', 'ONC01', 'only the host may use the platform''s functions');
    end if;
    if pg_client_encoding() <> 'UTF8' then
        raise exception using errcode = 'ONC03', message = 'a statement changed the encoding of the session';
    end if;
end $$;

create or replace function oncely.refuse_early_commit() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    shown text := current_setting('oncely.finish', true);
begin
    if shown is distinct from encode(oncely.tx_token('finish'), 'hex') then
        perform oncely.refuse_token(
            case when shown ~ '^[0-9a-f]{64}$' then decode(shown, 'hex') end, 'finish', 'ONC02',
            'only the host ends the transaction of a delivery');
    end if;
    return null;
end $$;

revoke all on all functions in schema oncely from public;
