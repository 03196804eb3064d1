-- Outputs travel under ids that neither a publisher nor a worker can choose or compute: keyed hashes. `oncely_outbox.id` is
-- such an id; the readable one stands among the headers, as `Oncely-Output-Id`.

-- The key of these ids; one row.
create table oncely_output_key (
    row integer not null constraint output_key_pk primary key constraint output_key_is_one check (row = 1),
    key blob    not null constraint output_key_length check (length(key) = 32)
) strict;
insert into oncely_output_key values (1, randomblob(32));

-- How often the id of an output changed, because its stream held another message under it.
alter table oncely_outbox
    add column ids_taken integer not null default 0 constraint outbox_ids_taken_are_counted check (ids_taken >= 0);
create index oncely_outbox_ids_taken on oncely_outbox (worker) where ids_taken > 0;
