-- The installation: this database and the host on it. Its id stands in the metadata of the consumers and streams that the host
-- makes, so that a host of another database on the same NATS is refused, rather than share the messages with this one.
create table oncely_installation (
    row integer not null constraint installation_pk primary key constraint installation_is_one check (row = 1),
    id  text    not null constraint installation_id_length check (length(id) = 16)
) strict;
insert into oncely_installation values (1, lower(hex(randomblob(8))));

-- Marks: every two seconds while something moves, the host writes a row here, and then the row's name on the stream
-- ONCELY_MARK. A name on the stream that is not here tells that this database was restored to an earlier time; a row that was
-- acknowledged and is not on the stream tells that of the broker.
create table oncely_watermark (
    number          integer constraint watermark_pk primary key autoincrement,
    name            text    not null constraint watermark_name_is_unique unique,
    written_at      integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- Where the streams ended, and up to where each consumer had acknowledged everything, as JSON.
    seen            text    not null,
    -- On ONCELY_MARK; none until the broker has acknowledged it.
    stream_sequence integer
) strict;

-- Outputs that were found on streams when the database had been restored to a time before their publication: they are not
-- published again when their events are handled again.
create table oncely_recovered_output (
    id              text    constraint recovered_output_pk primary key,
    stream          text    not null,
    stream_sequence integer not null,
    recovered_at    integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;
create index oncely_recovered_output_time on oncely_recovered_output (recovered_at);
