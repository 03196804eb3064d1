-- The installation: this database and the hosts on it. Its id stands in the metadata of the consumers and streams that its hosts
-- make, so that hosts of another database on the same NATS are refused, rather than share the messages with these.
create table oncely.installation (
    id text not null constraint installation_id_form check (id ~ '^[0-9a-f]{16}$')
);
create unique index installation_is_one on oncely.installation ((true));
insert into oncely.installation select substr(replace(gen_random_uuid()::text, '-', ''), 1, 16);

-- Marks: every two seconds while something moves, a host writes a row here, and then the row's name on the stream ONCELY_MARK.
-- A name on the stream that is not here tells that this database was restored to an earlier time; a row that was
-- acknowledged and is not on the stream tells that of the broker.
create table oncely.watermark (
    number          bigint      generated always as identity constraint watermark_pk primary key,
    name            text        not null constraint watermark_name_is_unique unique,
    written_at      timestamptz not null default clock_timestamp(),
    -- Where the streams ended, and up to where each consumer had acknowledged everything, as JSON.
    seen            text        not null,
    -- On ONCELY_MARK; none until the broker has acknowledged it.
    stream_sequence bigint
);

-- Outputs that were found on streams when the database had been restored to a time before their publication: they are not
-- published again when their events are handled again.
create table oncely.recovered_output (
    id              text        constraint recovered_output_pk primary key,
    stream          text        not null,
    stream_sequence bigint      not null,
    recovered_at    timestamptz not null default now()
);
create index recovered_output_time on oncely.recovered_output (recovered_at);
