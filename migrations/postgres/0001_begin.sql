-- The platform's own tables. Workers' tables live in another schema (`app_default`).
--
-- Words: an *event id* is what dedupes; a *delivery* is one message given to one worker in one transaction;
-- a message is *settled* when the inbox holds a committed record of it, `done` or `dead`, never both.

create schema if not exists oncely;
create schema if not exists app_default;

-- Components, by the SHA-256 of their bytes. Rows are never changed.
create table oncely.component (
    digest     text        constraint component_pk primary key constraint component_digest_is_sha256 check (digest ~ '^[0-9a-f]{64}$'),
    wasm       bytea       not null,
    created_at timestamptz not null default now()
);

-- Deployments: immutable versions of workers. Rows are never changed.
create table oncely.deployment (
    worker     text        not null,
    version    integer     not null constraint deployment_version_counts_from_one check (version > 0),
    digest     text        not null constraint deployment_component references oncely.component,
    manifest   text        not null,
    created_at timestamptz not null default now(),
    constraint deployment_pk primary key (worker, version)
);

-- Workers: which deployment is the active one.
create table oncely.worker (
    name         text        constraint worker_pk primary key,
    version      integer     not null,
    activated_at timestamptz not null default now(),
    constraint worker_deployment foreign key (name, version) references oncely.deployment
);

-- Which migrations of which worker's tables have run. A migration's text may not change afterwards.
create table oncely.worker_migration (
    worker     text        not null,
    name       text        not null,
    sha256     bytea       not null,
    applied_at timestamptz not null default now(),
    constraint worker_migration_pk primary key (worker, name)
);

-- The inbox: one row for each event id that a worker settled. It is written in the transaction of the effects, so
-- its presence *is* the statement that they happened (or, for `dead`, that they never will unless redriven).
create table oncely.inbox (
    worker          text        not null,
    event_id        text        not null constraint inbox_event_id_length check (octet_length(event_id) between 1 and 255),
    state           text        not null constraint inbox_state check (state in ('done', 'dead')),
    payload_sha256  bytea       not null,
    stream          text,
    stream_sequence bigint,
    settled_at      timestamptz not null default now(),
    constraint inbox_pk primary key (worker, event_id)
);
-- Small beside an index of rows: records come in the order of time, and only what is old is looked for by it.
create index inbox_by_age on oncely.inbox using brin (settled_at) with (autosummarize = on);

-- Failed attempts, counted outside the transaction that was rolled back. Infrastructure failures are not attempts.
create table oncely.attempt (
    worker   text        not null,
    event_id text        not null,
    attempt  integer     not null constraint attempt_counts_from_one check (attempt > 0),
    version  integer     not null,
    code     text,
    error    text        not null,
    logs     text        not null,
    at       timestamptz not null default now(),
    constraint attempt_pk primary key (worker, event_id, attempt)
);

-- Messages that were being handled alone when their host died. A row is made before such a message is handled and removed
-- afterwards, whatever came of it: what stands here for long, or with a count, is a message that kills hosts.
create table oncely.unfinished (
    worker   text        not null,
    event_id text        not null,
    times    integer     not null constraint unfinished_counts_from_one check (times > 0),
    since    timestamptz not null default now(),
    constraint unfinished_pk primary key (worker, event_id)
);

-- Dead letters: the original bytes and headers. One for each event id and payload of a worker.
create table oncely.dead_letter (
    id              bigint      generated always as identity constraint dead_letter_pk primary key,
    worker          text        not null,
    event_id        text        not null,
    payload_sha256  bytea       not null,
    reason          text        not null,
    code            text,
    detail          text        not null,
    attempts        integer     not null,
    version         integer     not null,
    subject         text        not null,
    headers         text        not null,
    body            bytea       not null,
    stream          text,
    stream_sequence bigint,
    died_at         timestamptz not null default now(),
    constraint dead_letter_once unique (worker, event_id, payload_sha256)
);

-- The outbox: what committed and is to be published. No reader walks it by `seq`: rows become visible in another
-- order than their numbers. Readers ask for what is due and unpublished.
create table oncely.outbox (
    seq              bigint      generated always as identity constraint outbox_pk primary key,
    id               text        not null,
    worker           text        not null,
    event_id         text        not null,
    ordinal          integer     not null,
    subject          text        not null,
    headers          text        not null,
    body             bytea       not null,
    ordering_key     text,
    created_at       timestamptz not null default now(),
    first_attempt_at timestamptz,
    leased_until     timestamptz not null,
    failures         integer     not null default 0,
    last_error       text,
    published_at     timestamptz,
    stream           text,
    stream_sequence  bigint,
    constraint outbox_published_has_a_place check ((published_at is null) = (stream is null) and (stream is null) = (stream_sequence is null))
);
-- What the sweep looks for: unpublished rows whose lease, or delay, has run out.
create index outbox_unpublished on oncely.outbox (leased_until, seq) where published_at is null;
create index outbox_published on oncely.outbox (published_at) where published_at is not null;

-- Keyed state of workers, readable as it stands.
create table oncely.state (
    worker     text        not null,
    key        text        not null constraint state_key_length check (octet_length(key) between 1 and 255),
    value      bytea       not null,
    version    bigint      not null constraint state_version_counts_from_one check (version > 0),
    updated_at timestamptz not null default now(),
    constraint state_pk primary key (worker, key)
) with (fillfactor = 70);
