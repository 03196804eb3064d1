-- Outputs travel under ids that neither a publisher nor a worker can choose or compute: keyed hashes. `outbox.id` is such an
-- id; the readable one stands among the headers, as `Oncely-Output-Id`.

-- The key of these ids; one row. Every host of this database needs it; only the platform's role reads it.
create table oncely.output_key (
    key bytea not null constraint output_key_length check (octet_length(key) = 32)
);
create unique index output_key_is_one on oncely.output_key ((true));
insert into oncely.output_key
select decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex');

-- How often the id of an output changed, because its stream held another message under it.
alter table oncely.outbox
    add column ids_taken integer not null default 0 constraint outbox_ids_taken_are_counted check (ids_taken >= 0);
create index outbox_ids_taken on oncely.outbox (worker) where ids_taken > 0;
