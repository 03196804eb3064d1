-- The platform's own tables; all begin with `oncely_`. Workers' tables stand beside them.
-- Times are microseconds since the Unix epoch, UTC: `datetime(settled_at / 1e6, 'unixepoch')` reads them.
--
-- Words: an *event id* is what dedupes; a *delivery* is one message given to one worker in one transaction;
-- a message is *settled* when the inbox holds a committed record of it, `done` or `dead`, never both.

-- Components, by the SHA-256 of their bytes. Rows are never changed.
create table oncely_component (
    digest     text        constraint component_pk primary key constraint component_digest_is_sha256 check (length(digest) = 64),
    wasm       blob       not null,
    created_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;

-- Deployments: immutable versions of workers. Rows are never changed.
create table oncely_deployment (
    worker     text        not null,
    version    integer     not null constraint deployment_version_counts_from_one check (version > 0),
    digest     text        not null constraint deployment_component references oncely_component,
    manifest   text        not null,
    created_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint deployment_pk primary key (worker, version)
) strict;

-- Workers: which deployment is the active one.
create table oncely_worker (
    name         text        constraint worker_pk primary key,
    version      integer     not null,
    activated_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint worker_deployment foreign key (name, version) references oncely_deployment
) strict;

-- Which migrations of which worker's tables have run. A migration's text may not change afterwards.
create table oncely_worker_migration (
    worker     text        not null,
    name       text        not null,
    sha256     blob       not null,
    applied_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint worker_migration_pk primary key (worker, name)
) strict;

-- The inbox: one row for each event id that a worker settled. It is written in the transaction of the effects, so
-- its presence *is* the statement that they happened (or, for `dead`, that they never will unless redriven).
create table oncely_inbox (
    worker          text        not null,
    event_id        text        not null constraint inbox_event_id_length check (length(cast(event_id as blob)) between 1 and 255),
    state           text        not null constraint inbox_state check (state in ('done', 'dead')),
    payload_sha256  blob       not null,
    stream          text,
    stream_sequence integer,
    settled_at      integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint inbox_pk primary key (worker, event_id)
) strict;
create index oncely_inbox_by_age on oncely_inbox (settled_at);

-- Failed attempts, counted outside the transaction that was rolled back. Infrastructure failures are not attempts.
create table oncely_attempt (
    worker   text        not null,
    event_id text        not null,
    attempt  integer     not null constraint attempt_counts_from_one check (attempt > 0),
    version  integer     not null,
    code     text,
    error    text        not null,
    logs     text        not null,
    at       integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint attempt_pk primary key (worker, event_id, attempt)
) strict;

-- Messages that were being handled alone when their host died. A row is made before such a message is handled and removed
-- afterwards, whatever came of it: what stands here for long, or with a count, is a message that kills hosts.
create table oncely_unfinished (
    worker   text        not null,
    event_id text        not null,
    times    integer     not null constraint unfinished_counts_from_one check (times > 0),
    since    integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint unfinished_pk primary key (worker, event_id)
) strict;

-- Dead letters: the original bytes and headers. One for each event id and payload of a worker.
create table oncely_dead_letter (
    id              integer     constraint dead_letter_pk primary key autoincrement,
    worker          text        not null,
    event_id        text        not null,
    payload_sha256  blob       not null,
    reason          text        not null,
    code            text,
    detail          text        not null,
    attempts        integer     not null,
    version         integer     not null,
    subject         text        not null,
    headers         text        not null,
    body            blob       not null,
    stream          text,
    stream_sequence integer,
    died_at         integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint dead_letter_once unique (worker, event_id, payload_sha256)
) strict;

-- The outbox: what committed and is to be published. No reader walks it by `seq`: rows become visible in another
-- order than their numbers. Readers ask for what is due and unpublished.
create table oncely_outbox (
    seq              integer     constraint outbox_pk primary key autoincrement,
    id               text        not null,
    worker           text        not null,
    event_id         text        not null,
    ordinal          integer     not null,
    subject          text        not null,
    headers          text        not null,
    body             blob       not null,
    ordering_key     text,
    created_at       integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    first_attempt_at integer,
    leased_until     integer not null,
    failures         integer     not null default 0,
    last_error       text,
    published_at     integer,
    stream           text,
    stream_sequence  integer,
    constraint outbox_published_has_a_place check ((published_at is null) = (stream is null) and (stream is null) = (stream_sequence is null))
) strict;
-- What the sweep looks for: unpublished rows whose lease, or delay, has run out.
create index oncely_outbox_unpublished on oncely_outbox (leased_until, seq) where published_at is null;
create index oncely_outbox_published on oncely_outbox (published_at) where published_at is not null;

-- Keyed state of workers, readable as it stands.
create table oncely_state (
    worker     text        not null,
    key        text        not null constraint state_key_length check (length(cast(key as blob)) between 1 and 255),
    value      blob       not null,
    version    integer      not null constraint state_version_counts_from_one check (version > 0),
    updated_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint state_pk primary key (worker, key)
) strict;
