-- The schema of the platform, in the schema `oncely`. Tables of the workers live in `app_default`.
--
-- Terms:
-- * An *event id* is the deduplication key of a message. It is unique per worker.
-- * A *delivery* is one message handled by one worker in one transaction.
-- * An event is *settled* once the inbox holds a committed row for it: `done` or `dead`, never
--   both.
-- * An *output* is a message that a delivery publishes. It is written to the outbox first.
-- * A *dead letter* is a message that its worker cannot handle. A *redrive* sends it again.
--
-- The inbox, the outbox and the requests are partitioned by time, see `partition_rotation`.
-- Functions for the transactions of guests are in the schema `oncely_definer`, see the last
-- section.

create schema if not exists oncely;
create schema if not exists app_default;
create schema oncely_definer;


-- Deployments -------------------------------------------------------------------------------------

-- A compiled component, stored under the SHA-256 of its bytes. Rows are immutable.
create table oncely.component (
    digest     text        constraint component_pk primary key
        constraint component_digest_is_sha256 check (digest ~ '^[0-9a-f]{64}$'),
    wasm       bytea       not null,
    created_at timestamptz not null default now()
);

-- The signature with which a component was deployed, as JSON. A host with keys checks it at each
-- start of the component.
create table oncely.component_signature (
    digest    text constraint component_signature_pk primary key
        constraint component_signature_component references oncely.component,
    signature text not null
);

-- One version of a worker: a component and its manifest. Rows are immutable.
create table oncely.deployment (
    worker     text        not null,
    version    integer     not null constraint deployment_version_positive check (version > 0),
    digest     text        not null constraint deployment_component references oncely.component,
    manifest   text        not null,
    created_at timestamptz not null default now(),
    constraint deployment_pk primary key (worker, version)
);

-- A worker and its active version.
create table oncely.worker (
    name         text        constraint worker_pk primary key,
    version      integer     not null,
    activated_at timestamptz not null default now(),
    constraint worker_deployment foreign key (name, version) references oncely.deployment
);

-- A paused worker: no host pulls messages for it or handles its requests. Its redeployment changes
-- nothing; its retirement ends the pause.
create table oncely.worker_pause (
    worker    text        constraint worker_pause_pk primary key
        constraint worker_pause_worker references oncely.worker on delete cascade,
    -- Distinguishes this pause from earlier ones of the worker.
    paused_at timestamptz not null default clock_timestamp(),
    actor     text        not null,
    note      text
);

-- An applied migration of a worker's own tables. Its text must not change afterwards.
create table oncely.worker_migration (
    worker     text        not null,
    name       text        not null,
    sha256     bytea       not null,
    applied_at timestamptz not null default now(),
    constraint worker_migration_pk primary key (worker, name)
);


-- Partition rotation ------------------------------------------------------------------------------

-- The rotation of one partitioned table. Expired rows leave by `truncate` of a whole partition.
-- Each table has four partitions. New rows go to the current one. The earlier ones are kept until
-- their last row expires, then they are truncated. A truncated partition becomes current again.
create table oncely.partition_rotation (
    table_name text          constraint partition_rotation_pk primary key
        constraint partition_rotation_table check (table_name in ('inbox', 'outbox', 'request')),
    -- The current partition, and the time since which it is current.
    partition  smallint      not null
        constraint partition_rotation_partition check (partition between 0 and 3),
    opened_at  timestamptz   not null default now(),
    -- The earlier partitions, oldest first, each with the time of its last write.
    earlier    smallint[]    not null default '{}',
    closed_at  timestamptz[] not null default '{}',
    constraint partition_rotation_earlier check (
        cardinality(earlier) = cardinality(closed_at) and not partition = any (earlier))
);
insert into oncely.partition_rotation (table_name, partition)
values ('inbox', 0), ('outbox', 0), ('request', 0);


-- Inbox -------------------------------------------------------------------------------------------

-- A settled event of a worker. The row is written in the transaction of the effects.
-- `done`: the effects are committed. `dead`: they never will be, unless the event is redriven.
-- `skipped`: they never will be, because an operator skipped the event. See `activity`.
create table oncely.inbox (
    worker          text        not null,
    event_id        text        not null
        constraint inbox_event_id_length check (octet_length(event_id) between 1 and 255),
    state           text        not null
        constraint inbox_state check (state in ('done', 'dead', 'skipped')),
    payload_sha256  bytea       not null,
    -- The position of the message; null for a message without a stream.
    stream          text,
    stream_sequence bigint,
    settled_at      timestamptz not null default now(),
    partition       smallint    not null,
    -- Forbids an event id twice in one partition. `inbox_partitions` covers the other ones.
    constraint inbox_pk primary key (worker, event_id, partition)
) partition by list (partition);
-- Checkpoints read recent rows. The index is cheap: it has one entry for 16 pages, written later.
create index inbox_by_age on oncely.inbox using brin (settled_at)
    with (pages_per_range = 16, autosummarize = on);
create table oncely.inbox_0 partition of oncely.inbox for values in (0);
create table oncely.inbox_1 partition of oncely.inbox for values in (1);
create table oncely.inbox_2 partition of oncely.inbox for values in (2);
create table oncely.inbox_3 partition of oncely.inbox for values in (3);

-- A failed attempt. It is written outside the transaction of the delivery, which is rolled back.
-- Infrastructure failures are not attempts.
create table oncely.attempt (
    worker   text        not null,
    event_id text        not null,
    attempt  integer     not null constraint attempt_number_positive check (attempt > 0),
    version  integer     not null,
    code     text,
    error    text        not null,
    logs     text        not null,
    at       timestamptz not null default now(),
    constraint attempt_pk primary key (worker, event_id, attempt)
);
-- Attempts are deleted by age. Their events may have left the inbox before.
create index attempt_by_age on oncely.attempt (at);

-- The recording of the last failed attempt at an event, as JSON: input, host calls, host results.
-- It contains the data of the message and of all rows that the handler read. It is deleted when the
-- event is settled as `done`, when its dead letter is closed, and with its attempt.
create table oncely.recording (
    worker    text    not null,
    event_id  text    not null,
    attempt   integer not null constraint recording_attempt_positive check (attempt > 0),
    -- SHA-256 over the recording without its times. Two attempts in a row with the same digest are
    -- a deterministic failure. Null when equality would not imply that.
    digest    bytea   constraint recording_digest_is_sha256 check (length(digest) = 32),
    recording bytea   not null,
    constraint recording_pk primary key (worker, event_id),
    constraint recording_attempt foreign key (worker, event_id, attempt)
        references oncely.attempt on delete cascade
);

-- A crash marker. It is written before a message is handled alone, and deleted afterwards.
-- A marker that remains belongs to a message during which the host died.
create table oncely.crash_marker (
    worker           text        not null,
    event_id         text        not null,
    -- The number of times that handling was started and not finished.
    starts           integer     not null
        constraint crash_marker_starts_positive check (starts > 0),
    first_started_at timestamptz not null default now(),
    constraint crash_marker_pk primary key (worker, event_id)
);


-- Dead letters ------------------------------------------------------------------------------------

-- A dead letter with its original headers and body.
--
-- `open`: it waits for an operator. `redriven`: it was sent to its worker again, and the inbox
-- knows the result. `done`: its event took effect after a redrive; copied from the inbox later, to
-- keep deliveries cheap. `resolved` and `dropped`: closed by an operator.
create table oncely.dead_letter (
    id              bigint      generated always as identity constraint dead_letter_pk primary key,
    worker          text        not null,
    event_id        text        not null,
    payload_sha256  bytea       not null,
    state           text        not null default 'open' constraint dead_letter_state
        check (state in ('open', 'redriven', 'done', 'resolved', 'dropped')),
    reason          text        not null,
    code            text,
    detail          text        not null,
    -- See `dead_letter_group`.
    group_id        text,
    -- The number of failed attempts, and the version of the worker at the last one.
    attempts        integer     not null,
    version         integer     not null,
    subject         text        not null,
    headers         text        not null,
    body            bytea       not null,
    -- The position of the message, and the time at which its stream stored it.
    stream          text,
    stream_sequence bigint,
    stored_at       timestamptz,
    -- The last time it was dead-lettered, and the first time if it was redriven since.
    died_at         timestamptz not null default now(),
    first_died_at   timestamptz,
    -- The number of redrives.
    generation      integer     not null default 0
        constraint dead_letter_generation check (generation >= 0),
    -- The number of failed attempts before the last redrive. Later ones have their own budget.
    attempts_before integer     not null default 0,
    -- The last time an operator redrove or closed it.
    last_action_at  timestamptz,
    constraint dead_letter_once_per_payload unique (worker, event_id, payload_sha256)
);
-- Listings and alarms. Small, however many dead letters are closed.
create index dead_letter_unresolved on oncely.dead_letter (id) where state in ('open', 'redriven');
create index dead_letter_open on oncely.dead_letter (worker, died_at) where state = 'open';
create index dead_letter_unresolved_by_group on oncely.dead_letter (group_id)
    where state in ('open', 'redriven');
-- Audits of a time.
create index dead_letter_by_age on oncely.dead_letter (died_at);

-- A failure that dead letters have in common: worker, reason, code, shape of the detail, and place
-- of the trap. The dead letters of a group are counted in `dead_letter`.
create table oncely.dead_letter_group (
    id         text        constraint dead_letter_group_pk primary key,
    worker     text        not null,
    reason     text        not null,
    code       text,
    shape      text        not null,
    place      text,
    first_seen timestamptz not null default now(),
    -- Accurate to a minute: not every dead letter updates it.
    last_seen  timestamptz not null default now()
);

-- The owner and the note of a group, as an operator wrote them last. Kept like the group itself: it
-- may come back.
create table oncely.dead_letter_group_note (
    group_id    text        constraint dead_letter_group_note_pk primary key
        constraint dead_letter_group_note_group references oncely.dead_letter_group,
    owner       text,
    note        text,
    actor       text        not null,
    stated_name text,
    written_at  timestamptz not null default now(),
    constraint dead_letter_group_note_not_empty check (owner is not null or note is not null)
);

-- A corrected body of a dead letter. The original never changes. A redrive sends the last edit.
create table oncely.dead_letter_edit (
    dead_letter_id bigint      not null
        constraint dead_letter_edit_dead_letter references oncely.dead_letter,
    edit           integer     not null
        constraint dead_letter_edit_number_positive check (edit > 0),
    body           bytea       not null,
    actor          text        not null,
    note           text        not null,
    at             timestamptz not null default now(),
    constraint dead_letter_edit_pk primary key (dead_letter_id, edit)
);

-- An action of an operator on a dead letter.
create table oncely.dead_letter_audit (
    seq            bigint      generated always as identity
        constraint dead_letter_audit_pk primary key,
    dead_letter_id bigint      not null
        constraint dead_letter_audit_dead_letter references oncely.dead_letter,
    action         text        not null constraint dead_letter_audit_action
        check (action in ('redrive', 'edit', 'resolve', 'drop')),
    generation     integer     not null,
    -- The name of the access token, and the name that the client states.
    actor          text        not null,
    stated_name    text,
    note           text,
    at             timestamptz not null default now()
);
create index dead_letter_audit_by_dead_letter on oncely.dead_letter_audit (dead_letter_id);

create function oncely.refuse_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    raise exception 'the table % is append-only', tg_table_name;
end $$;
create trigger dead_letter_audit_append_only
    before update or delete on oncely.dead_letter_audit
    for each row execute function oncely.refuse_change();
create trigger dead_letter_edit_append_only
    before update or delete on oncely.dead_letter_edit
    for each row execute function oncely.refuse_change();

-- A redrive of many dead letters, which runs on the hosts. One host at a time has leased it. Each
-- chunk is one transaction with the redrives, so another host continues exactly where one died.
create table oncely.redrive_job (
    id           bigint      generated always as identity
        constraint redrive_job_pk primary key,
    state        text        not null default 'running' constraint redrive_job_state
        check (state in ('running', 'paused', 'cancelled', 'done')),
    -- Dead letters per second; 0 for no limit.
    rate         integer     not null constraint redrive_job_rate_not_negative check (rate >= 0),
    -- Whether dead letters that are closed or in progress are redriven, too.
    again        boolean     not null,
    -- The number of dead letters, of those redriven so far, and of those refused.
    total        bigint      not null,
    redriven     bigint      not null default 0,
    refused      bigint      not null default 0,
    actor        text        not null,
    stated_name  text,
    note         text,
    created_at   timestamptz not null default now(),
    -- The end: all are processed, or it was cancelled.
    ended_at     timestamptz,
    -- The last failure of the host that runs it; null after a success.
    error        text,
    leased_by    bigint,
    leased_until timestamptz,
    constraint redrive_job_ended check ((ended_at is null) = (state in ('running', 'paused')))
);
create index redrive_job_running on oncely.redrive_job (id) where state = 'running';

-- A dead letter of a job. `result` is null until it is processed.
create table oncely.redrive_job_item (
    job_id         bigint not null
        constraint redrive_job_item_job references oncely.redrive_job on delete cascade,
    position       bigint not null,
    dead_letter_id bigint not null,
    -- The number of redrives when the job was created. It is refused if that has changed since.
    generation     integer,
    -- The preconditions of a plan, as JSON; null without a plan.
    preconditions  text,
    result         text constraint redrive_job_item_result check (result in ('redriven', 'refused')),
    -- The reason of a refusal.
    why            text,
    constraint redrive_job_item_pk primary key (job_id, position),
    constraint redrive_job_item_refused_has_reason check ((why is null) = (result is distinct from 'refused'))
);
create index redrive_job_item_open on oncely.redrive_job_item (job_id, position)
    where result is null;
create index redrive_job_item_refused on oncely.redrive_job_item (job_id, position)
    where result = 'refused';


-- Outbox ------------------------------------------------------------------------------------------

-- A committed output. Rows become visible in another order than their numbers, so no reader scans
-- the table by `seq`. Readers select rows that are due and unpublished.
--
-- Outputs of one worker with the same ordering key form a *per-key queue* and are published one
-- after another. An output that has to wait is *blocked* and leased to no host. An output with a
-- permanent failure is *parked* until an operator retries or drops it. It blocks its queue
-- meanwhile.
create table oncely.outbox (
    seq              bigserial   not null,
    -- The message id on the wire: a keyed hash, see `output_key`. The readable id is a header.
    id               text        not null,
    worker           text        not null,
    event_id         text        not null,
    ordinal          integer     not null,
    subject          text        not null,
    headers          text        not null,
    body             bytea       not null,
    ordering_key     text,
    created_at       timestamptz not null default now(),
    -- The time of the commit plus the delay of the output.
    due_at           timestamptz not null default now(),

    -- `poll`: a host leases the row, publishes it and updates it. `group`: a host leases the row's
    -- `outbox_group`, publishes all outputs of it and writes a `relay_record`. `wal`: the WAL
    -- reader publishes it and writes a `relay_record`. Rows that are not `poll` are never updated:
    -- they are leased to no host and stay unpublished in this table.
    via              text        not null default 'poll'
        constraint outbox_via check (via in ('poll', 'group', 'wal')),
    -- For `poll`: earlier outputs of the queue may be in the WAL, up to this position.
    not_before_lsn   pg_lsn,
    -- The lease. `leased_by` is the host instance, see `host_instance`. A guest that changes the
    -- setting can only delay its own outputs.
    leased_until     timestamptz not null,
    leased_by        bigint
        default nullif(current_setting('oncely.instance', true), '')::bigint,
    -- The `seq` of the output that blocks this one.
    blocked_by       bigint,
    parked_at        timestamptz,
    first_attempt_at timestamptz,
    failures         integer     not null default 0,
    last_error       text,
    -- The number of id changes. An id changes when its stream holds another message under it.
    ids_taken        integer     not null default 0
        constraint outbox_ids_taken_not_negative check (ids_taken >= 0),

    published_at     timestamptz,
    stream           text,
    stream_sequence  bigint,
    partition        smallint    not null,
    constraint outbox_pk primary key (seq, partition),
    constraint outbox_published_has_stream_position check (
        (published_at is null) = (stream is null) and (stream is null) = (stream_sequence is null)),
    constraint outbox_published_not_blocked_or_parked check (
        published_at is null or (blocked_by is null and parked_at is null)),
    constraint outbox_only_polled_published_or_blocked check (
        via = 'poll' or (published_at is null and blocked_by is null))
) partition by list (partition);
-- The poller: unpublished rows whose lease or delay has ended.
create index outbox_unpublished on oncely.outbox (leased_until, seq)
    where published_at is null and via = 'poll';
create index outbox_published on oncely.outbox (published_at) where published_at is not null;
-- Checkpoints read the outputs of recent transactions, see `inbox_by_age`.
create index outbox_by_age on oncely.outbox using brin (created_at)
    with (pages_per_range = 16, autosummarize = on);
-- The per-key queue. Queries order by `seq + 0`, which this index or a sort provides. For a plain
-- `seq` the planner may scan the primary key through all published rows.
create index outbox_key_queue on oncely.outbox (worker, ordering_key, (seq + 0))
    where published_at is null and ordering_key is not null and via = 'poll';
create index outbox_blocked on oncely.outbox (blocked_by) where blocked_by is not null;
create index outbox_parked on oncely.outbox (seq) where parked_at is not null;
create index outbox_ids_taken on oncely.outbox (worker) where ids_taken > 0;
create table oncely.outbox_0 partition of oncely.outbox for values in (0);
create table oncely.outbox_1 partition of oncely.outbox for values in (1);
create table oncely.outbox_2 partition of oncely.outbox for values in (2);
create table oncely.outbox_3 partition of oncely.outbox for values in (3);

-- Outputs that one transaction appended, due at once and without an ordering key, with one lease
-- for all of them. The row is deleted when each of them is published or failed: the places of the
-- published ones are in a `relay_record`, and failed ones continue as `poll`.
create table oncely.outbox_group (
    -- The lowest of `seqs`.
    number       bigint      constraint outbox_group_pk primary key,
    worker       text        not null,
    seqs         bigint[]    not null constraint outbox_group_seqs check (cardinality(seqs) > 0),
    created_at   timestamptz not null default now(),
    leased_until timestamptz not null,
    leased_by    bigint
        default nullif(current_setting('oncely.instance', true), '')::bigint
);
create index outbox_group_leased_until on oncely.outbox_group (leased_until);

-- A parked output that an operator dropped. It was never published. Rows are immutable.
create table oncely.dropped_output (
    seq          bigint      constraint dropped_output_pk primary key,
    id           text        not null,
    worker       text        not null,
    event_id     text        not null,
    ordinal      integer     not null,
    subject      text        not null,
    headers      text        not null,
    body         bytea       not null,
    ordering_key text,
    created_at   timestamptz not null,
    due_at       timestamptz not null,
    failures     integer     not null,
    last_error   text,
    parked_at    timestamptz not null,
    note         text        not null,
    dropped_at   timestamptz not null default now()
);

-- An output that a recovery found on its stream, after the database was restored to a time before
-- its publication. It is not published again when its event is handled again.
create table oncely.recovered_output (
    id              text        constraint recovered_output_pk primary key,
    stream          text        not null,
    stream_sequence bigint      not null,
    recovered_at    timestamptz not null default now()
);
create index recovered_output_by_age on oncely.recovered_output (recovered_at);

-- The key of the message ids of outputs. Publishers and workers can neither choose nor compute
-- these ids. All hosts of this database use the key; only the platform's role can read it.
create table oncely.output_key (
    key bytea not null constraint output_key_length check (octet_length(key) = 32)
);
create unique index output_key_single_row on oncely.output_key ((true));
insert into oncely.output_key
select decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex');


-- Relay -------------------------------------------------------------------------------------------

-- The relay mode, one row. Every transaction that appends outputs reads it, so all hosts agree.
--
-- `poll`: hosts lease rows of the outbox. `wal`: one host, the *reader*, receives the outputs
-- through a logical replication slot in commit order, and records publications in bulk. `entering`:
-- the slot is being created; new outputs still use `poll`. `leaving`: new outputs use `poll` again,
-- and the unpublished ones in the WAL are moved over.
create table oncely.relay (
    mode           text        not null
        constraint relay_mode check (mode in ('poll', 'entering', 'wal', 'leaving')),
    -- The mode requested by the last started host, or the fallback and its reason.
    requested_mode text        not null
        constraint relay_requested_mode check (requested_mode in ('poll', 'wal')),
    reason         text,
    changed_at     timestamptz not null default now(),
    -- For `leaving`: no output is added to the WAL once all transactions before this one have
    -- ended.
    leave_horizon  xid8
);
create unique index relay_single_row on oncely.relay ((true));
insert into oncely.relay (mode, requested_mode) values ('poll', 'poll');

-- The position of the WAL reader, one row. It is updated several times per second; transactions
-- that append outputs do not read it. The initial values mean that nothing in the WAL is
-- unpublished.
create table oncely.relay_position (
    -- Fencing token: increases with each reader. Updates by an earlier reader are refused.
    reader_epoch    bigint      not null default 0,
    -- Outputs committed before this position are published, or moved to `poll`.
    lsn             pg_lsn      not null default 'FFFFFFFF/FFFFFFFF',
    -- The same as a `seq`: true for all WAL outputs up to it, and possibly for some later ones.
    published_seq   bigint      not null default 9223372036854775807,
    -- The same as a commit time.
    published_until timestamptz not null default now(),
    recorded_at     timestamptz not null default now()
) with (fillfactor = 10);
create unique index relay_position_single_row on oncely.relay_position ((true));
insert into oncely.relay_position default values;

-- A batch of outputs, of groups or from the WAL, that were published to one stream. `seqs` and
-- `sequences` are parallel arrays: numbers in the outbox, and positions on the stream. Kept longer
-- than the outputs.
create table oncely.relay_record (
    number        bigint      generated always as identity constraint relay_record_pk primary key,
    stream        text        not null,
    seqs          bigint[]    not null,
    sequences     bigint[]    not null,
    last_seq      bigint      not null,
    last_sequence bigint      not null,
    published_at  timestamptz not null default now(),
    constraint relay_record_pairs check (
        cardinality(seqs) = cardinality(sequences) and cardinality(seqs) > 0)
);
create index relay_record_by_seq on oncely.relay_record (last_seq);
create index relay_record_by_age on oncely.relay_record (published_at);


-- State -------------------------------------------------------------------------------------------

-- A key of a worker's state. Versions of a key never decrease, not even across a deletion, so that
-- a compare-and-set with an old version fails. A deleted key keeps its row for a day: `value` is
-- null, `version` is that of the deletion.
create table oncely.state (
    worker     text        not null,
    -- Sorted by bytes, so that keys with a prefix can be listed in order.
    key        text        collate "C" not null
        constraint state_key_length check (octet_length(key) between 1 and 255),
    value      bytea,
    version    bigint      not null constraint state_version_positive check (version > 0),
    updated_at timestamptz not null default now(),
    constraint state_pk primary key (worker, key)
) with (fillfactor = 70);
create index state_deleted on oncely.state (updated_at) where value is null;

-- The highest version of a worker's removed keys. A key without a row starts above it.
create table oncely.state_version_floor (
    worker  text   constraint state_version_floor_pk primary key,
    version bigint not null constraint state_version_floor_positive check (version > 0)
);


-- Requests ----------------------------------------------------------------------------------------

-- The response to an HTTP request with an idempotency key. The row is written in the transaction of
-- the effects. A request in flight has no row, only an advisory lock of its transaction.
create table oncely.request (
    worker      text        not null,
    -- The route in the manifest, such as `/accounts/{id}/transfers`.
    route       text        not null,
    -- A digest of the caller's identity; empty for an unauthenticated caller.
    caller      text        not null,
    key         text        not null,
    -- SHA-256 over method, path, query, content type and body.
    fingerprint bytea       not null
        constraint request_fingerprint_length check (octet_length(fingerprint) = 32),
    status      integer     not null constraint request_status check (status between 200 and 599),
    headers     text        not null,
    body        bytea       not null,
    answered_at timestamptz not null default clock_timestamp(),
    expires_at  timestamptz not null,
    partition   smallint    not null,
    constraint request_pk primary key (worker, route, caller, key, partition)
) partition by list (partition);
create table oncely.request_0 partition of oncely.request for values in (0);
create table oncely.request_1 partition of oncely.request for values in (1);
create table oncely.request_2 partition of oncely.request for values in (2);
create table oncely.request_3 partition of oncely.request for values in (3);


-- Alarms ------------------------------------------------------------------------------------------

-- The current state of an alarm that was raised at least once. Every change is one transaction with
-- its notification, so several hosts on one database never raise an alarm twice.
create table oncely.alarm (
    worker      text        not null,
    kind        text        not null,
    -- See `dead_letter_group`. Empty, except for alarms on new failures.
    group_id    text        not null default '',
    -- The number of times it was raised.
    times       integer     not null constraint alarm_times_positive check (times > 0),
    -- The measured value when it was raised, and the threshold: a count, or milliseconds.
    value       bigint      not null,
    threshold   bigint      not null,
    raised_at   timestamptz not null default now(),
    -- The time since which the value is low enough to clear the alarm.
    below_since timestamptz,
    cleared_at  timestamptz,
    constraint alarm_pk primary key (worker, kind, group_id),
    constraint alarm_cleared_has_no_below_since check (cleared_at is null or below_since is null)
);
create index alarm_raised on oncely.alarm (worker) where cleared_at is null;
-- The rate limit of alarms on new failures.
create index alarm_new_failure on oncely.alarm (worker, raised_at) where kind = 'new-failure';


-- Access ------------------------------------------------------------------------------------------

-- A named token of the control API. Only its SHA-256 is stored. Rows are never deleted: activities
-- refer to them.
create table oncely.access_token (
    id         bigint      generated always as identity
        constraint access_token_pk primary key,
    name       text        not null
        constraint access_token_name_is_not_the_host check (name <> 'host'),
    sha256     bytea       not null constraint access_token_sha256_unique unique
        constraint access_token_sha256_length check (length(sha256) = 32),
    role       text        not null
        constraint access_token_role check (role in ('view', 'operate', 'deploy')),
    created_by text        not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_by text,
    revoked_at timestamptz,
    constraint access_token_revoked_by_actor check ((revoked_at is null) = (revoked_by is null))
);
-- A name stands for one token at a time.
create unique index access_token_name_unique on oncely.access_token (name)
    where revoked_at is null;

-- A change that was requested of the control API. It is written before the change begins.
create table oncely.activity (
    id          bigint      generated always as identity constraint activity_pk primary key,
    at          timestamptz not null default now(),
    -- The name of the token, and the token; null for the host's own token, whose name is `host`.
    actor       text        not null,
    token_id    bigint      constraint activity_token references oncely.access_token,
    -- The name that the client states.
    stated_name text,
    verb        text        not null,
    worker      text,
    object      text        not null,
    -- The parameters, as JSON.
    details     text        not null
);
create index activity_by_worker on oncely.activity (worker, id) where worker is not null;
create index activity_by_actor on oncely.activity (actor, id);

-- The result of an activity. Without one, the host ended meanwhile and the change may be complete.
create table oncely.activity_outcome (
    activity_id bigint      constraint activity_outcome_pk primary key
        constraint activity_outcome_activity references oncely.activity,
    at          timestamptz not null default clock_timestamp(),
    outcome     text        not null
        constraint activity_outcome_known check (outcome in ('done', 'failed')),
    error       text,
    -- The result, as JSON. For skipped messages, it names each sequence.
    details     text        not null,
    constraint activity_outcome_failed_has_error check ((outcome = 'failed') = (error is not null))
);
-- Checkpoints read recent rows.
create index activity_by_age on oncely.activity (at);
create index activity_outcome_by_age on oncely.activity_outcome (at);
create trigger activity_append_only
    before update or delete on oncely.activity
    for each row execute function oncely.refuse_change();
create trigger activity_outcome_append_only
    before update or delete on oncely.activity_outcome
    for each row execute function oncely.refuse_change();


-- Receipts ----------------------------------------------------------------------------------------

-- A checkpoint: a set of leaves, made from rows that were settled since the one before. `root` is
-- that of a tree over them (RFC 9162), `hash` covers all columns, so checkpoints are a chain. Rows
-- are immutable and never deleted.
create table oncely.checkpoint (
    number       bigint      constraint checkpoint_pk primary key
        constraint checkpoint_number_positive check (number > 0),
    installation text        not null,
    hash         text        not null constraint checkpoint_hash_length check (length(hash) = 64),
    -- The hash of the checkpoint before; null for the first one.
    previous     text,
    closed_at    timestamptz not null,
    leaves       bigint      not null,
    root         text        not null,
    constraint checkpoint_first_has_no_previous check ((previous is null) = (number = 1))
);
create index checkpoint_by_age on oncely.checkpoint (closed_at);
create trigger checkpoint_append_only
    before update or delete on oncely.checkpoint
    for each row execute function oncely.refuse_change();

-- Leaves of a checkpoint: 1024, or fewer in its last block. `leaves` is compressed lines of JSON,
-- `root` that of their subtree. A row is in the first checkpoint that saw it, and its leaf stays
-- after the row has left. Blocks are deleted after a time.
create table oncely.checkpoint_block (
    checkpoint bigint      not null
        constraint checkpoint_block_checkpoint references oncely.checkpoint,
    block      bigint      not null,
    -- The earliest and the latest time of its leaves.
    from_at    timestamptz not null,
    until_at   timestamptz not null,
    root       bytea       not null constraint checkpoint_block_root check (length(root) = 32),
    leaves     bytea       not null,
    constraint checkpoint_block_pk primary key (checkpoint, block)
);
create index checkpoint_block_by_age on oncely.checkpoint_block (until_at);

-- The state of the next checkpoint, one row, written when receipts are first turned on. Rows before
-- the three times are in checkpoints. Rows after them may be: transactions commit late.
create table oncely.checkpoint_head (
    began_at        timestamptz not null,
    -- The last checkpoint, 0 and null for none.
    number          bigint      not null default 0,
    hash            text,
    events_from     timestamptz not null,
    outputs_from    timestamptz not null,
    activities_from timestamptz not null,
    -- Outputs up to this number belong to events that are in checkpoints. Only used by SQLite.
    outbox_seq      bigint      not null default 0,
    -- The last time that a host read new rows, and its lease while it does.
    checked_at      timestamptz not null,
    leased_until    timestamptz not null
);
create unique index checkpoint_head_single_row on oncely.checkpoint_head ((true));


-- Hosts -------------------------------------------------------------------------------------------

-- The installation: this database and its hosts, one row. Consumers and streams carry its id in
-- their metadata. Hosts of another database on the same NATS server are refused.
create table oncely.installation (
    id text not null constraint installation_id_form check (id ~ '^[0-9a-f]{16}$')
);
create unique index installation_single_row on oncely.installation ((true));
insert into oncely.installation select substr(replace(gen_random_uuid()::text, '-', ''), 1, 16);

-- A running host. Each start of a host is an instance, which renews its lease on the database's
-- clock. After the lease of an instance ends, another host takes over: it terminates the sessions
-- of the instance, found by the id in their name, and then releases its leases of outputs.
create table oncely.host_instance (
    id          bigint      constraint host_instance_pk primary key,
    started_at  timestamptz not null default clock_timestamp(),
    lease_until timestamptz not null
) with (fillfactor = 50);

-- The last report of a running host, as JSON. The host writes it every two seconds. A successful
-- commit also shows that the database accepts writes.
create table oncely.host_report (
    instance   bigint      constraint host_report_pk primary key,
    written_at timestamptz not null default now(),
    -- Counts the reports of the instance.
    number     bigint      not null default 1,
    report     text        not null
) with (fillfactor = 50);

-- The last 100 audits of the books. One without an end runs, or its host ended meanwhile.
create table oncely.audit_run (
    id          bigint      generated always as identity constraint audit_run_pk primary key,
    -- The window; `worker` is null for all workers.
    worker      text,
    since       timestamptz not null,
    is_repair   boolean     not null,
    -- The host that runs it, as in its reports.
    host        text        not null,
    actor       text        not null,
    stated_name text,
    started_at  timestamptz not null default now(),
    ended_at    timestamptz,
    -- The report as JSON with the first differences, the number of all, and of those repaired.
    report      text,
    differences bigint,
    repaired    bigint,
    -- The reason of a failure.
    error       text,
    constraint audit_run_ended_has_result check (
        (ended_at is null) = (report is null and error is null)
        and (report is null) = (differences is null and repaired is null)
        and (report is null or error is null))
);

-- The history of a worker: counts and lag of five minutes, for the charts of the console. A ring:
-- each worker has at most 2016 rows, those of a week. A week later a row is used again. `bucket` is
-- the number of its five minutes since the Unix epoch.
create table oncely.worker_history (
    worker  text    not null,
    slot    integer not null constraint worker_history_slot check (slot between 0 and 2015),
    bucket  bigint  not null
        constraint worker_history_slot_of_bucket check (slot = bucket % 2016),
    -- Handled events, failed attempts that are retried, and dead letters, of all hosts.
    done    bigint  not null,
    retries bigint  not null,
    dead    bigint  not null,
    -- The highest age of the oldest unhandled message, in milliseconds.
    lag_ms  bigint  not null,
    -- Counts of calls by their time, as a JSON array: see `host/src/model/call_times.rs`.
    calls   text    not null default '[]',
    constraint worker_history_pk primary key (worker, slot)
) with (fillfactor = 50);

-- A watermark, for the detection of restores. Under load a host inserts a row every two seconds,
-- then publishes its name. A published name without a row: the database was restored to an earlier
-- time. An acknowledged row without a message: the broker was.
create table oncely.watermark (
    number          bigint      generated always as identity constraint watermark_pk primary key,
    name            text        not null constraint watermark_name_is_unique unique,
    written_at      timestamptz not null default clock_timestamp(),
    -- The ends of the streams and the ack floors of the consumers, as JSON.
    broker_state    text        not null,
    -- The position of the published name; null until the broker has acknowledged it.
    stream_sequence bigint
);


-- Keys and logins ---------------------------------------------------------------------------------

-- The key of the tokens for definer functions, one row.
create table oncely.definer_key (
    key          bytea   not null constraint definer_key_length check (octet_length(key) = 32),
    -- Statements of workers could read the key: they ran as the host's role (`guest_sql =
    -- "trusted"`).
    exposed      boolean not null default false,
    -- The key before the last renewal. It separates a host with an outdated key from a forged
    -- token.
    previous_key bytea
);
create unique index definer_key_single_row on oncely.definer_key ((true));
insert into oncely.definer_key
select decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex');

-- A login role of an app. All hosts of this database use the password; only the platform's role can
-- read it.
create table oncely.app_login (
    role       text        constraint app_login_pk primary key,
    password   text        not null
        default replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''),
    created_at timestamptz not null default now()
);

-- Replaces the key and the passwords, if workers could read them. Returns whether it did.
create function oncely.renew_definer_key() returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    update oncely.definer_key
    set previous_key = key, exposed = false,
        key = decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex')
    where exposed;
    if not found then
        return false;
    end if;
    update oncely.app_login
    set password = replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '');
    return true;
end $$;

-- Creates the login role of an app. Sets its password if role or password is new, or on request. No
-- statement of a client contains the password, so a statement log does not show it.
create function oncely.ensure_login(login text, reset_password boolean) returns void
language plpgsql
set search_path = pg_catalog, pg_temp set password_encryption = 'scram-sha-256' as $$
declare
    is_new boolean := not exists (select from pg_roles where rolname = login);
begin
    if is_new then
        execute format(
            'create role %I login nosuperuser noinherit nocreatedb nocreaterole', login);
    end if;
    insert into oncely.app_login (role) values (login) on conflict do nothing;
    if found or is_new or reset_password then
        execute format('alter role %I password %L', login,
            (select password from oncely.app_login where role = login));
    end if;
end $$;


-- Functions of the platform's role ----------------------------------------------------------------

-- The current partition of the inbox and the earlier ones, all of which may hold an event id.
--
-- The lock keeps the current partition until the end of the transaction. So concurrent claims write
-- to the same partition, whose primary key detects duplicates, and rows of earlier partitions are
-- already committed. The lock is taken before the read.
create function oncely.inbox_partitions(
    out current smallint, out earlier_1 smallint, out earlier_2 smallint, out earlier_3 smallint
) language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    lock table oncely.partition_rotation in row share mode;
    select partition, earlier[1], earlier[2], earlier[3]
    into strict current, earlier_1, earlier_2, earlier_3
    from oncely.partition_rotation where table_name = 'inbox';
end $$;

-- The same for requests.
create function oncely.request_partitions(out current smallint, out earlier smallint[])
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    lock table oncely.partition_rotation in row share mode;
    select partition_rotation.partition, partition_rotation.earlier into strict current, earlier
    from oncely.partition_rotation where table_name = 'request';
end $$;

-- Settles events as dead, except those that are settled. Returns the new ones.
create function oncely.settle_dead(
    workers text[], event_ids text[], payloads bytea[], streams text[], sequences bigint[]
) returns table (worker text, event_id text)
language plpgsql set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    partitions record;
begin
    partitions := oncely.inbox_partitions();
    return query
    insert into oncely.inbox
        (worker, event_id, state, payload_sha256, stream, stream_sequence, partition)
    select worker, event_id, 'dead', payload_sha256, stream, stream_sequence, partitions.current
    from unnest($1, $2, $3, $4, $5)
        as given (worker, event_id, payload_sha256, stream, stream_sequence)
    where partitions.earlier_1 is null or not exists (
        select from oncely.inbox
        where inbox.worker = given.worker and inbox.event_id = given.event_id
            and partition in (partitions.earlier_1, partitions.earlier_2, partitions.earlier_3)
        offset 0)
    order by worker, event_id
    on conflict do nothing
    returning worker, event_id;
end $$;

-- Settles events of a worker as skipped, except those that are settled. `given` is a JSON array of
-- event ids, digests in hex and sequences. Returns the new ones. It waits for transactions that
-- have claimed one of the events.
create function oncely.settle_skipped(worker text, stream text, given text)
returns table (event_id text)
language plpgsql set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    partitions record;
begin
    partitions := oncely.inbox_partitions();
    return query
    insert into oncely.inbox
        (worker, event_id, state, payload_sha256, stream, stream_sequence, partition)
    select $1, event_id, 'skipped', decode(payload, 'hex'), $2, sequence, partitions.current
    from jsonb_to_recordset($3::jsonb) as given (event_id text, payload text, sequence bigint)
    where partitions.earlier_1 is null or not exists (
        select from oncely.inbox
        where inbox.worker = $1 and inbox.event_id = given.event_id
            and partition in (partitions.earlier_1, partitions.earlier_2, partitions.earlier_3)
        offset 0)
    order by event_id
    on conflict do nothing
    returning event_id;
end $$;

-- The highest `seq` assigned so far.
create function oncely.last_outbox_seq() returns bigint
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select coalesce(
        pg_sequence_last_value(pg_get_serial_sequence('oncely.outbox', 'seq')::regclass), 0);
$$;

-- Outputs in the WAL that are not known to be published. The settings make sure that they are found
-- by `seq`, however large the outbox is.
create function oncely.wal_backlog() returns table (seq bigint, worker text, due_at timestamptz)
language plpgsql stable set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_custom_plan set enable_seqscan = off set jit = off as $$
#variable_conflict use_column
declare
    passed bigint;
begin
    select published_seq into strict passed from oncely.relay_position;
    return query
    select outbox.seq, outbox.worker, outbox.due_at
    from oncely.outbox left join (
        select unnest(seqs) as seq from oncely.relay_record where last_seq > passed
    ) as published on published.seq = outbox.seq
    where outbox.seq > passed and outbox.via = 'wal' and published.seq is null;
end $$;

-- Outputs of groups that are not known to be published.
create view oncely.group_backlog as
select unnest(seqs) as seq, worker, created_at as due_at from oncely.outbox_group;

-- Unpublished outputs whose rows do not show it: of groups, and in the WAL.
create view oncely.unrecorded_output as
select seq, worker, due_at from oncely.group_backlog
union all
select seq, worker, due_at from oncely.wal_backlog();

-- The stream position of an output of a group or from the WAL, if recorded. All names are qualified
-- instead of a `set search_path`, so that the planner can inline the function.
create function oncely.find_relay_record(output_seq bigint)
returns table (stream text, stream_sequence bigint, published_at timestamptz)
language sql stable as $$
    select record.stream, record.sequences[pg_catalog.array_position(record.seqs, $1)],
        record.published_at
    from oncely.relay_record as record
    where record.last_seq operator(pg_catalog.>=) $1
        and $1 operator(pg_catalog.=) any (record.seqs)
    order by record.last_seq limit 1;
$$;

-- Whether all WAL outputs committed before a position are published, or moved to `poll`.
create function oncely.wal_is_published(up_to pg_lsn) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
    select lsn >= up_to from oncely.relay_position;
$$;

-- A consistent view of time, WAL, outbox and transactions. The order of the reads matters: a
-- transaction that was assigned a `seq` up to `last_seq` has an id below `snapshot_xmax`, and a
-- transaction that ended before the snapshot is in the WAL before `wal_end`.
create function oncely.wal_snapshot(
    out taken_at timestamptz, out wal_end pg_lsn, out last_seq bigint,
    out snapshot_xmin xid8, out snapshot_xmax xid8
) language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    taken_at := clock_timestamp();
    last_seq := oncely.last_outbox_seq();
    snapshot_xmin := pg_snapshot_xmin(pg_current_snapshot());
    snapshot_xmax := pg_snapshot_xmax(pg_current_snapshot());
    wal_end := pg_current_wal_insert_lsn();
end $$;


-- Tokens ------------------------------------------------------------------------------------------

-- Statements of guests run in the same session as those of the host, so a role alone cannot
-- separate them. Definer functions require a *token*: a code over the id of the transaction, keyed
-- with `definer_key`. The host passes it as a bound parameter. A guest cannot compute a token,
-- finds none in the text of a statement, and could not use it in another transaction.

-- The token of this transaction: sha256(key, sha256(key, purpose:transaction)).
create function oncely.tx_token(purpose text) returns bytea
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    secret bytea;
begin
    select key into strict secret from oncely.definer_key;
    return sha256(secret
        || sha256(secret || convert_to(purpose || ':' || pg_current_xact_id()::text, 'UTF8')));
end $$;

-- Raises the error for a wrong token: ONC04 if the host uses the previous key, else the given code.
create function oncely.refuse_token(token bytea, purpose text, code text, reason text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    secret bytea;
begin
    select previous_key into strict secret from oncely.definer_key;
    if token = sha256(secret
        || sha256(secret || convert_to(purpose || ':' || pg_current_xact_id()::text, 'UTF8')))
    then
        raise exception using errcode = 'ONC04', message = 'the definer key was renewed';
    end if;
    raise exception using errcode = code, message = reason;
end $$;

-- Refuses callers other than the host, and sessions with a changed encoding: the server would read
-- the values of the host differently.
create function oncely.check_token(token bytea) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if token is distinct from oncely.tx_token('definer') then
        perform oncely.refuse_token(token, 'definer', 'ONC01',
            'only the host may use the platform''s functions');
    end if;
    if pg_client_encoding() <> 'UTF8' then
        raise exception using errcode = 'ONC03',
            message = 'a statement changed the encoding of the session';
    end if;
end $$;

-- A guard row of a guest's transaction. It is deleted at once; its deferred trigger stays pending
-- until the commit.
create unlogged table oncely.commit_guard (
    xid xid8 not null
);

-- Fails the commit of a guest. The host sets a second token in the message that commits.
create function oncely.refuse_early_commit() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    shown text := current_setting('oncely.commit_token', true);
begin
    if shown is distinct from encode(oncely.tx_token('commit'), 'hex') then
        perform oncely.refuse_token(
            case when shown ~ '^[0-9a-f]{64}$' then decode(shown, 'hex') end, 'commit', 'ONC02',
            'only the host ends the transaction of a delivery');
    end if;
    return null;
end $$;
create constraint trigger commit_guard_requires_token after insert on oncely.commit_guard
    deferrable initially deferred for each row execute function oncely.refuse_early_commit();


-- Definer functions -------------------------------------------------------------------------------

-- The transaction of a delivery runs as the app's role. These functions are its only access to the
-- platform's tables.
--
-- They use generic plans, one per session: planning costs more than a small batch. A plan is kept
-- while tables grow from empty. So the statements force a lookup by key for each row, by a subquery
-- or a lateral one. The plan of a plain join could be a sequential scan of a table that had ten
-- rows.

-- Arms the commit guard of this transaction.
create function oncely_definer.guard() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    place tid;
begin
    insert into oncely.commit_guard values (pg_current_xact_id()) returning ctid into place;
    delete from oncely.commit_guard where ctid = place;
end $$;

-- Claims event ids in sorted order. `payload_sha256` is that of a row from before this statement.
create function oncely_definer.claim(
    token bytea, worker text, event_ids text[], payloads bytea[], streams text[], sequences bigint[]
) returns table (event_id text, fresh boolean, payload_sha256 bytea, attempts bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    partitions record;
begin
    perform oncely.check_token($1);
    partitions := oncely.inbox_partitions();
    return query
    with given as materialized (
        select given.*, case when partitions.earlier_1 is not null then (
                select payload_sha256 from oncely.inbox
                where worker = $2 and inbox.event_id = given.event_id and partition in (
                    partitions.earlier_1, partitions.earlier_2, partitions.earlier_3)
            ) end as held_before
        from unnest($3, $4, $5, $6) as given (event_id, payload_sha256, stream, stream_sequence)
    ), inserted as (
        insert into oncely.inbox
            (worker, event_id, state, payload_sha256, stream, stream_sequence, partition)
        select $2, event_id, 'done', payload_sha256, stream, stream_sequence, partitions.current
        from given where held_before is null order by event_id
        on conflict do nothing
        returning event_id
    )
    select event_id, fresh, case when not fresh then coalesce(held_before, (
            select payload_sha256 from oncely.inbox
            where worker = $2 and inbox.event_id = given.event_id
                and partition = partitions.current)) end,
        (select coalesce(max(attempt), 0) from oncely.attempt
         where attempt.worker = $2 and attempt.event_id = given.event_id)::bigint
    from (select *, event_id in (select event_id from inserted) as fresh from given) as given;
end $$;

-- The rows of the inbox as they are now.
create function oncely_definer.lookup(token bytea, worker text, event_ids text[])
returns table (event_id text, payload_sha256 bytea)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    partitions record;
begin
    perform oncely.check_token($1);
    partitions := oncely.inbox_partitions();
    return query
    select held.event_id, held.payload_sha256
    from unnest($3) as given (event_id) cross join lateral (
        select * from oncely.inbox where worker = $2 and inbox.event_id = given.event_id
            and partition in (partitions.current,
                partitions.earlier_1, partitions.earlier_2, partitions.earlier_3)
        offset 0
    ) as held;
end $$;

-- Releases claims of this transaction. A redriven event is dead again, see `reclaim`.
create function oncely_definer.release_claims(token bytea, worker text, event_ids text[])
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    partitions record;
    given text;
begin
    perform oncely.check_token($1);
    partitions := oncely.inbox_partitions();
    foreach given in array $3 loop
        update oncely.inbox set state = 'dead'
        where worker = $2 and event_id = given and partition = partitions.current
            and xmin = pg_current_xact_id()::xid and exists (
                select from oncely.dead_letter
                where dead_letter.worker = $2 and dead_letter.event_id = given
                    and dead_letter.payload_sha256 = inbox.payload_sha256
                    and dead_letter.state = 'redriven');
        if not found then
            delete from oncely.inbox
            where worker = $2 and event_id = given and partition = partitions.current
                and xmin = pg_current_xact_id()::xid;
        end if;
    end loop;
end $$;

-- Lets this transaction claim a redriven event. Its row in the inbox stays `dead` until then, so
-- the event id is never free for another body. The lock is taken before the read of the dead
-- letter: a transaction that had to wait sees the result of the other one.
create function oncely_definer.reclaim(token bytea, worker text, event_id text, payload bytea)
returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    perform from oncely.inbox where inbox.worker = $2 and inbox.event_id = $3 for update;
    delete from oncely.inbox
    where inbox.worker = $2 and inbox.event_id = $3 and state = 'dead' and payload_sha256 = $4
        and exists (
            select from oncely.dead_letter
            where dead_letter.worker = $2 and dead_letter.event_id = $3
                and dead_letter.payload_sha256 = $4 and dead_letter.state = 'redriven');
end $$;

-- Reads keys of the state, each with the version that its next one must exceed. Row and version
-- floor are of the same snapshot.
create function oncely_definer.load_state(token bytea, worker text, keys text[])
returns table (key text, value bytea, version bigint, has_row boolean)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    select given.key, held.value,
        coalesce(held.version, (
            select floor.version from oncely.state_version_floor as floor
            where floor.worker = $2), 0),
        held.version is not null
    from unnest($3) as given (key) left join lateral (
        select * from oncely.state where worker = $2 and state.key = given.key offset 0
    ) as held on true;
end $$;

-- The existing keys that begin with a prefix and follow a key, in the order of their bytes.
create function oncely_definer.list_state(
    token bytea, worker text, prefix text, after text, most bigint
) returns table (key text)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
    perform oncely.check_token($1);
    return query
    select state.key from oncely.state
    where state.worker = $2 and state.key >= $3 and state.key > $4
        and starts_with(state.key, $3) and value is not null
    order by state.key limit $5;
end $$;

-- Writes the keys whose row still has the expected version. A null version expects no row. Returns
-- the number of written keys. Rows are locked in the order of their keys first, which avoids
-- deadlocks.
create function oncely_definer.save_state(
    token bytea, worker text, keys text[], expected bigint[], new_values bytea[], versions bigint[]
) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    written bigint;
begin
    perform oncely.check_token($1);
    with given as (
        select * from unnest($3, $4, $5, $6) as given (key, expected, value, version)
    ), unmoved as materialized (
        select given.*, held.place
        from (select * from given where expected is not null order by key) as given
            cross join lateral (
                select ctid as place, state.version from oncely.state
                where worker = $2 and state.key = given.key for update
            ) as held
        where held.version = given.expected
    ), updated as (
        update oncely.state
        set value = unmoved.value, version = unmoved.version, updated_at = now()
        from unmoved where state.ctid = unmoved.place
        returning 1
    ), inserted as (
        insert into oncely.state (worker, key, value, version)
        select $2, key, value, version from given where expected is null order by key
        on conflict do nothing
        returning 1
    )
    select (select count(*) from updated) + (select count(*) from inserted) into strict written;
    return written;
end $$;

-- Locks idempotency keys for this transaction. Returns those that are not free, by their position
-- from 1: with the stored response, or, if another transaction holds the lock, with `in_flight` and
-- whether the fingerprint differs. A second lock, on the fingerprint, shows that.
create function oncely_definer.claim_requests(
    token bytea, worker text, routes text[], callers text[], keys text[], fingerprints bytea[]
) returns table (
    place integer, in_flight boolean, fingerprint_differs boolean, status integer, headers text,
    body bytea
)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    given record;
    lock_name text;
    fingerprint_hash integer;
    partitions record;
begin
    perform oncely.check_token($1);
    partitions := oncely.request_partitions();
    for given in
        select route, caller, key, fingerprint, place::integer as place
        from unnest($3, $4, $5, $6) with ordinality as given (route, caller, key, fingerprint, place)
    loop
        lock_name := concat_ws(e'\x1f', $2, given.route, given.caller, given.key);
        fingerprint_hash := hashtext(encode(given.fingerprint, 'hex'));
        if not pg_try_advisory_xact_lock(hashtextextended(lock_name, 0)) then
            return query
            select given.place, true, exists (
                select from pg_locks
                where locktype = 'advisory' and objsubid = 2 and granted
                    and database = (select oid from pg_database where datname = current_database())
                    and classid = (hashtext(lock_name)::bigint & 4294967295)::oid
                    and objid <> (fingerprint_hash::bigint & 4294967295)::oid),
                null::integer, null::text, null::bytea;
            continue;
        end if;
        perform pg_advisory_xact_lock_shared(hashtext(lock_name), fingerprint_hash);
        return query
        select given.place, false, fingerprint <> given.fingerprint, status, headers, body
        from oncely.request
        where worker = $2 and route = given.route and caller = given.caller and key = given.key
            and partition = any (partitions.earlier || partitions.current)
            and expires_at > clock_timestamp();
    end loop;
end $$;

-- Stores the responses to requests, each to be kept for a number of microseconds. Replaces expired
-- responses. Returns how many were stored: all but those in conflict with one that is not expired.
create function oncely_definer.store_responses(
    token bytea, worker text, routes text[], callers text[], keys text[], fingerprints bytea[],
    statuses integer[], headers text[], bodies bytea[], keep bigint[]
) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    now constant timestamptz := clock_timestamp();
    partitions record;
    stored bigint;
begin
    perform oncely.check_token($1);
    partitions := oncely.request_partitions();
    insert into oncely.request as held (worker, route, caller, key, fingerprint, status, headers,
        body, answered_at, expires_at, partition)
    select $2, given.route, given.caller, given.key, given.fingerprint, given.status,
        given.headers, given.body, now, now + given.keep * interval '1 microsecond',
        partitions.current
    from unnest($3, $4, $5, $6, $7, $8, $9, $10)
        as given (route, caller, key, fingerprint, status, headers, body, keep)
    on conflict (worker, route, caller, key, partition) do update
        set fingerprint = excluded.fingerprint, status = excluded.status,
            headers = excluded.headers, body = excluded.body,
            answered_at = excluded.answered_at, expires_at = excluded.expires_at
        where held.expires_at <= now;
    get diagnostics stored = row_count;
    return stored;
end $$;

-- Appends outputs in their order, and leases to the calling host those that it may publish itself:
-- due, in `poll` mode, and without a blocked or failed output before them in their per-key queue.
-- They are leased for `lease` microseconds and returned with the start of the lease. The first one
-- of each key is returned with the outputs before it in the queue (`predecessors`), which have to
-- be published first. All others are left to the poller.
--
-- Several outputs that are due at once share a lease, see `outbox_group`, unless one of the outputs
-- has an ordering key. They are returned with the number of their group.
--
-- In `wal` mode, due outputs go to the WAL and are leased to no host. If the queue of a key already
-- contains outputs in `poll` mode, further ones join it and wait for the same output, or for the
-- last one in the queue. An output in `poll` mode waits for the outputs of its key in the WAL
-- before it.
create function oncely_definer.append(
    token bytea, workers text[], ids text[], event_ids text[], ordinals integer[], subjects text[],
    headers text[], bodies bytea[], ordering_keys text[], delays bigint[], lease bigint
) returns table (
    seq bigint, first_attempt_at bigint, predecessors bigint[], group_number bigint
) language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    now constant timestamptz := clock_timestamp();
    queue_max constant integer := 256;
    relay_mode text;
    is_wal_mode boolean;
    -- The WAL may contain unpublished outputs, and its end: everything committed is before it.
    is_wal_used boolean;
    wal_end pg_lsn;
    due_via text;
    current_partition smallint;
begin
    perform oncely.check_token($1);
    select partition into strict current_partition
    from oncely.partition_rotation where table_name = 'outbox';
    select mode into strict relay_mode from oncely.relay;
    is_wal_mode := relay_mode = 'wal';
    is_wal_used := relay_mode in ('wal', 'leaving');

    -- Without ordering keys there are no queues.
    if array_remove($9, null) = '{}' then
        due_via := case when is_wal_mode then 'wal'
            when cardinality(array_positions($10, 0::bigint)) > 1
                and current_setting('oncely.output_groups', true) is distinct from 'off'
            then 'group' else 'poll' end;
        return query
        with appended as (
            insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body,
                due_at, leased_until, first_attempt_at, via, partition)
            select worker, id, event_id, ordinal, subject, headers, body,
                now + delay * interval '1 microsecond',
                case when delay > 0 then now + delay * interval '1 microsecond'
                    when due_via = 'poll' then now + $11 * interval '1 microsecond'
                    else 'infinity' end,
                case when delay = 0 then now end,
                case when delay = 0 then due_via else 'poll' end, current_partition
            from unnest($2, $3, $4, $5, $6, $7, $8, $10) with ordinality
                as given (worker, id, event_id, ordinal, subject, headers, body, delay, place)
            order by place
            returning seq, worker, first_attempt_at, via
        ), grouped as (
            insert into oncely.outbox_group (number, worker, seqs, leased_until)
            select min(seq), worker, array_agg(seq), now + $11 * interval '1 microsecond'
            from appended where via = 'group' group by worker
        )
        select seq,
            case when via <> 'wal'
                then (extract(epoch from first_attempt_at) * 1000000)::bigint end,
            null::bigint[],
            case when via = 'group' then min(seq) over (partition by worker, via) end
        from appended;
        return;
    end if;

    if is_wal_used then
        wal_end := pg_current_wal_insert_lsn();
    end if;
    return query
    with given as materialized (
        select worker, id, event_id, ordinal, subject, headers, body, ordering_key, delay, place,
            delay = 0 and row_number() over (
                partition by worker, ordering_key, delay = 0 order by place) = 1 as is_first
        from unnest($2, $3, $4, $5, $6, $7, $8, $9, $10) with ordinality as given
            (worker, id, event_id, ordinal, subject, headers, body, ordering_key, delay, place)
    ), queue as materialized (
        select given.worker, given.ordering_key, unpublished.seqs, unpublished.blocker
        from given, lateral (
            select array_agg(seq) as seqs,
                case
                    -- Outputs that wait for the same one continue together.
                    when is_wal_mode or count(*) = queue_max
                        then (array_agg(coalesce(blocked_by, seq) order by seq desc))[1]
                    else min(coalesce(blocked_by, seq)) filter (
                        where failures > 0 or leased_until <= now
                            or blocked_by is not null or parked_at is not null)
                end as blocker
            from (
                select seq, blocked_by, parked_at, failures, leased_until from oncely.outbox
                where outbox.worker = given.worker and outbox.ordering_key = given.ordering_key
                    and outbox.ordering_key is not null and published_at is null and via = 'poll'
                    and due_at <= now
                order by seq + 0 desc limit queue_max
            ) as queued
        ) as unpublished
        where given.is_first and given.ordering_key is not null and unpublished.seqs is not null
    ), routed as materialized (
        select *, delay = 0 and is_wal_mode and blocker is null as goes_to_wal,
            is_wal_used and ordering_key is not null as waits_for_wal
        from given left join queue using (worker, ordering_key)
    ), appended as (
        insert into oncely.outbox (worker, id, event_id, ordinal, subject, headers, body,
            ordering_key, due_at, blocked_by, leased_until, first_attempt_at, via, not_before_lsn,
            partition)
        select worker, id, event_id, ordinal, subject, headers, body, ordering_key,
            now + delay * interval '1 microsecond',
            case when delay = 0 then blocker end,
            case
                when goes_to_wal then 'infinity'
                when delay > 0 then now + delay * interval '1 microsecond'
                when blocker is not null then 'infinity'
                when waits_for_wal then now
                else now + $11 * interval '1 microsecond'
            end,
            case when delay = 0 and blocker is null and (goes_to_wal or not waits_for_wal)
                then now end,
            case when goes_to_wal then 'wal' else 'poll' end,
            case when not goes_to_wal and waits_for_wal then wal_end end,
            current_partition
        from routed
        order by place
        returning seq, worker, ordering_key, first_attempt_at, via
    )
    select seq,
        case when via = 'poll' then (extract(epoch from first_attempt_at) * 1000000)::bigint end,
        case when first_attempt_at is not null and via = 'poll'
            and seq = min(seq) filter (where first_attempt_at is not null) over (
                partition by worker, ordering_key)
        then seqs end,
        null::bigint
    from appended left join queue using (worker, ordering_key);
end $$;


-- Privileges --------------------------------------------------------------------------------------

-- The host grants `execute` on the definer functions to the roles of the apps.
revoke all on all functions in schema oncely from public;
revoke all on all functions in schema oncely_definer from public;
