-- The schema of the platform. All its tables begin with `oncely_`. Tables of the workers are beside
-- them.
--
-- Times are microseconds since the Unix epoch, in UTC. `datetime(settled_at / 1e6, 'unixepoch')`
-- makes them readable.
--
-- Terms:
-- * An *event id* is the deduplication key of a message. It is unique per worker.
-- * A *delivery* is one message handled by one worker in one transaction.
-- * An event is *settled* once the inbox holds a committed row for it: `done` or `dead`, never
--   both.
-- * An *output* is a message that a delivery publishes. It is written to the outbox first.
-- * A *dead letter* is a message that its worker cannot handle. A *redrive* sends it again.
--
-- The PostgreSQL schema has more: partitions, the WAL relay, and roles with definer functions.
-- SQLite needs none of them. Expired rows are deleted in batches, the one host polls, and an
-- authorizer on the connection keeps guests out of these tables.


-- Deployments -------------------------------------------------------------------------------------

-- A compiled component, stored under the SHA-256 of its bytes. Rows are immutable.
create table oncely_component (
    digest     text    constraint component_pk primary key
        constraint component_digest_is_sha256 check (length(digest) = 64),
    wasm       blob    not null,
    created_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;

-- The signature with which a component was deployed, as JSON. A host with keys checks it at each
-- start of the component.
create table oncely_component_signature (
    digest    text constraint component_signature_pk primary key
        constraint component_signature_component references oncely_component,
    signature text not null
) strict;

-- One version of a worker: a component and its manifest. Rows are immutable.
create table oncely_deployment (
    worker     text    not null,
    version    integer not null constraint deployment_version_positive check (version > 0),
    digest     text    not null constraint deployment_component references oncely_component,
    manifest   text    not null,
    created_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint deployment_pk primary key (worker, version)
) strict;

-- A worker and its active version.
create table oncely_worker (
    name         text    constraint worker_pk primary key,
    version      integer not null,
    activated_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint worker_deployment foreign key (name, version) references oncely_deployment
) strict;

-- A paused worker: the host pulls no messages for it and handles none of its requests. Its
-- redeployment changes nothing; its retirement ends the pause.
create table oncely_worker_pause (
    worker    text    constraint worker_pause_pk primary key
        constraint worker_pause_worker references oncely_worker on delete cascade,
    -- Distinguishes this pause from earlier ones of the worker.
    paused_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    actor     text    not null,
    note      text
) strict;

-- An applied migration of a worker's own tables. Its text must not change afterwards.
create table oncely_worker_migration (
    worker     text    not null,
    name       text    not null,
    sha256     blob    not null,
    applied_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint worker_migration_pk primary key (worker, name)
) strict;


-- Inbox -------------------------------------------------------------------------------------------

-- A settled event of a worker. The row is written in the transaction of the effects.
-- `done`: the effects are committed. `dead`: they never will be, unless the event is redriven.
-- `skipped`: they never will be, because an operator skipped the event. See `oncely_activity`.
create table oncely_inbox (
    worker          text    not null,
    event_id        text    not null
        constraint inbox_event_id_length check (length(cast(event_id as blob)) between 1 and 255),
    state           text    not null
        constraint inbox_state check (state in ('done', 'dead', 'skipped')),
    payload_sha256  blob    not null,
    -- The position of the message; null for a message without a stream.
    stream          text,
    stream_sequence integer,
    settled_at      integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint inbox_pk primary key (worker, event_id)
) strict;
create index oncely_inbox_by_age on oncely_inbox (settled_at);

-- A failed attempt. It is written outside the transaction of the delivery, which is rolled back.
-- Infrastructure failures are not attempts.
create table oncely_attempt (
    worker   text    not null,
    event_id text    not null,
    attempt  integer not null constraint attempt_number_positive check (attempt > 0),
    version  integer not null,
    code     text,
    error    text    not null,
    logs     text    not null,
    at       integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint attempt_pk primary key (worker, event_id, attempt)
) strict;
-- Attempts are deleted by age. Their events may have left the inbox before.
create index oncely_attempt_by_age on oncely_attempt (at);

-- The recording of the last failed attempt at an event, as JSON: input, host calls, host results.
-- It contains the data of the message and of all rows that the handler read. It is deleted when the
-- event is settled as `done`, when its dead letter is closed, and with its attempt.
create table oncely_recording (
    worker    text    not null,
    event_id  text    not null,
    attempt   integer not null constraint recording_attempt_positive check (attempt > 0),
    -- SHA-256 over the recording without its times. Two attempts in a row with the same digest are
    -- a deterministic failure. Null when equality would not imply that.
    digest    blob    constraint recording_digest_is_sha256 check (length(digest) = 32),
    recording blob    not null,
    constraint recording_pk primary key (worker, event_id),
    constraint recording_attempt foreign key (worker, event_id, attempt)
        references oncely_attempt on delete cascade
) strict;

-- A crash marker. It is written before a message is handled alone, and deleted afterwards.
-- A marker that remains belongs to a message during which the host died.
create table oncely_crash_marker (
    worker           text    not null,
    event_id         text    not null,
    -- The number of times that handling was started and not finished.
    starts           integer not null constraint crash_marker_starts_positive check (starts > 0),
    first_started_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint crash_marker_pk primary key (worker, event_id)
) strict;


-- Dead letters ------------------------------------------------------------------------------------

-- A dead letter with its original headers and body.
--
-- `open`: it waits for an operator. `redriven`: it was sent to its worker again, and the inbox
-- knows the result. `done`: its event took effect after a redrive; copied from the inbox later, to
-- keep deliveries cheap. `resolved` and `dropped`: closed by an operator.
create table oncely_dead_letter (
    id              integer constraint dead_letter_pk primary key autoincrement,
    worker          text    not null,
    event_id        text    not null,
    payload_sha256  blob    not null,
    state           text    not null default 'open' constraint dead_letter_state
        check (state in ('open', 'redriven', 'done', 'resolved', 'dropped')),
    reason          text    not null,
    code            text,
    detail          text    not null,
    -- See `oncely_dead_letter_group`.
    group_id        text,
    -- The number of failed attempts, and the version of the worker at the last one.
    attempts        integer not null,
    version         integer not null,
    subject         text    not null,
    headers         text    not null,
    body            blob    not null,
    -- The position of the message, and the time at which its stream stored it.
    stream          text,
    stream_sequence integer,
    stored_at       integer,
    -- The last time it was dead-lettered, and the first time if it was redriven since.
    died_at         integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    first_died_at   integer,
    -- The number of redrives.
    generation      integer not null default 0
        constraint dead_letter_generation check (generation >= 0),
    -- The number of failed attempts before the last redrive. Later ones have their own budget.
    attempts_before integer not null default 0,
    -- The last time an operator redrove or closed it.
    last_action_at  integer,
    constraint dead_letter_once_per_payload unique (worker, event_id, payload_sha256)
) strict;
-- Listings and alarms. Small, however many dead letters are closed.
create index oncely_dead_letter_unresolved on oncely_dead_letter (id)
    where state in ('open', 'redriven');
create index oncely_dead_letter_open on oncely_dead_letter (worker, died_at) where state = 'open';
create index oncely_dead_letter_unresolved_by_group on oncely_dead_letter (group_id)
    where state in ('open', 'redriven');
-- Audits of a time.
create index oncely_dead_letter_by_age on oncely_dead_letter (died_at);

-- A failure that dead letters have in common: worker, reason, code, shape of the detail, and place
-- of the trap. The dead letters of a group are counted in `oncely_dead_letter`.
create table oncely_dead_letter_group (
    id         text    constraint dead_letter_group_pk primary key,
    worker     text    not null,
    reason     text    not null,
    code       text,
    shape      text    not null,
    place      text,
    first_seen integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- Accurate to a minute: not every dead letter updates it.
    last_seen  integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;

-- The owner and the note of a group, as an operator wrote them last. Kept like the group itself: it
-- may come back.
create table oncely_dead_letter_group_note (
    group_id    text    constraint dead_letter_group_note_pk primary key
        constraint dead_letter_group_note_group references oncely_dead_letter_group,
    owner       text,
    note        text,
    actor       text    not null,
    stated_name text,
    written_at  integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint dead_letter_group_note_not_empty check (owner is not null or note is not null)
) strict;

-- A corrected body of a dead letter. The original never changes. A redrive sends the last edit.
create table oncely_dead_letter_edit (
    dead_letter_id integer not null
        constraint dead_letter_edit_dead_letter references oncely_dead_letter,
    edit           integer not null
        constraint dead_letter_edit_number_positive check (edit > 0),
    body           blob    not null,
    actor          text    not null,
    note           text    not null,
    at             integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint dead_letter_edit_pk primary key (dead_letter_id, edit)
) strict;

-- An action of an operator on a dead letter.
create table oncely_dead_letter_audit (
    seq            integer constraint dead_letter_audit_pk primary key autoincrement,
    dead_letter_id integer not null
        constraint dead_letter_audit_dead_letter references oncely_dead_letter,
    action         text    not null constraint dead_letter_audit_action
        check (action in ('redrive', 'edit', 'resolve', 'drop')),
    generation     integer not null,
    -- The name of the access token, and the name that the client states.
    actor          text    not null,
    stated_name    text,
    note           text,
    at             integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;
create index oncely_dead_letter_audit_by_dead_letter on oncely_dead_letter_audit (dead_letter_id);

create trigger oncely_dead_letter_audit_no_update before update on oncely_dead_letter_audit
begin
    select raise(abort, 'the table oncely_dead_letter_audit is append-only');
end;
create trigger oncely_dead_letter_audit_no_delete before delete on oncely_dead_letter_audit
begin
    select raise(abort, 'the table oncely_dead_letter_audit is append-only');
end;
create trigger oncely_dead_letter_edit_no_update before update on oncely_dead_letter_edit
begin
    select raise(abort, 'the table oncely_dead_letter_edit is append-only');
end;
create trigger oncely_dead_letter_edit_no_delete before delete on oncely_dead_letter_edit
begin
    select raise(abort, 'the table oncely_dead_letter_edit is append-only');
end;

-- A redrive of many dead letters, which runs on the host. Each chunk is one transaction with the
-- redrives, so the next start continues exactly where the host died.
create table oncely_redrive_job (
    id           integer constraint redrive_job_pk primary key autoincrement,
    state        text    not null default 'running' constraint redrive_job_state
        check (state in ('running', 'paused', 'cancelled', 'done')),
    -- Dead letters per second; 0 for no limit.
    rate         integer not null constraint redrive_job_rate_not_negative check (rate >= 0),
    -- Whether dead letters that are closed or in progress are redriven, too.
    again        integer not null,
    -- The number of dead letters, of those redriven so far, and of those refused.
    total        integer not null,
    redriven     integer not null default 0,
    refused      integer not null default 0,
    actor        text    not null,
    stated_name  text,
    note         text,
    created_at   integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- The end: all are processed, or it was cancelled.
    ended_at     integer,
    -- The last failure of the host that runs it; null after a success.
    error        text,
    leased_by    integer,
    leased_until integer,
    constraint redrive_job_ended check ((ended_at is null) = (state in ('running', 'paused')))
) strict;
create index oncely_redrive_job_running on oncely_redrive_job (id) where state = 'running';

-- A dead letter of a job. `result` is null until it is processed.
create table oncely_redrive_job_item (
    job_id         integer not null
        constraint redrive_job_item_job references oncely_redrive_job on delete cascade,
    position       integer not null,
    dead_letter_id integer not null,
    -- The number of redrives when the job was created. It is refused if that has changed since.
    generation     integer,
    -- The preconditions of a plan, as JSON; null without a plan.
    preconditions  text,
    result         text constraint redrive_job_item_result check (result in ('redriven', 'refused')),
    -- The reason of a refusal.
    why            text,
    constraint redrive_job_item_pk primary key (job_id, position),
    constraint redrive_job_item_refused_has_reason
        check ((why is null) = (result is not 'refused'))
) strict;
create index oncely_redrive_job_item_open on oncely_redrive_job_item (job_id, position)
    where result is null;
create index oncely_redrive_job_item_refused on oncely_redrive_job_item (job_id, position)
    where result = 'refused';


-- Outbox ------------------------------------------------------------------------------------------

-- A committed output. Readers select rows that are due and unpublished.
--
-- Outputs of one worker with the same ordering key form a *per-key queue* and are published one
-- after another. An output that has to wait is *blocked* and not leased. An output with a permanent
-- failure is *parked* until an operator retries or drops it. It blocks its queue meanwhile.
create table oncely_outbox (
    seq              integer constraint outbox_pk primary key autoincrement,
    -- The message id on the wire: a keyed hash, see `oncely_output_key`. The readable id is a
    -- header.
    id               text    not null,
    worker           text    not null,
    event_id         text    not null,
    ordinal          integer not null,
    subject          text    not null,
    headers          text    not null,
    body             blob    not null,
    ordering_key     text,
    created_at       integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- The time of the commit plus the delay of the output.
    due_at           integer not null default 0,

    -- The lease. `leased_by` is the instance of the host, one per start. Leases of an earlier
    -- instance are released when the next one starts.
    leased_until     integer not null,
    leased_by        integer,
    -- The `seq` of the output that blocks this one.
    blocked_by       integer,
    parked_at        integer,
    first_attempt_at integer,
    failures         integer not null default 0,
    last_error       text,
    -- The number of id changes. An id changes when its stream holds another message under it.
    ids_taken        integer not null default 0
        constraint outbox_ids_taken_not_negative check (ids_taken >= 0),

    published_at     integer,
    stream           text,
    stream_sequence  integer,
    constraint outbox_published_has_stream_position check (
        (published_at is null) = (stream is null) and (stream is null) = (stream_sequence is null)),
    constraint outbox_published_not_blocked check (published_at is null or blocked_by is null),
    constraint outbox_published_not_parked check (published_at is null or parked_at is null)
) strict;
-- The poller: unpublished rows whose lease or delay has ended.
create index oncely_outbox_unpublished on oncely_outbox (leased_until, seq)
    where published_at is null;
create index oncely_outbox_published on oncely_outbox (published_at)
    where published_at is not null;
-- The per-key queue.
create index oncely_outbox_key_queue on oncely_outbox (worker, ordering_key, seq)
    where published_at is null and ordering_key is not null;
create index oncely_outbox_blocked on oncely_outbox (blocked_by) where blocked_by is not null;
create index oncely_outbox_parked on oncely_outbox (seq) where parked_at is not null;
create index oncely_outbox_ids_taken on oncely_outbox (worker) where ids_taken > 0;

-- A parked output that an operator dropped. It was never published. Rows are immutable.
create table oncely_dropped_output (
    seq          integer constraint dropped_output_pk primary key,
    id           text    not null,
    worker       text    not null,
    event_id     text    not null,
    ordinal      integer not null,
    subject      text    not null,
    headers      text    not null,
    body         blob    not null,
    ordering_key text,
    created_at   integer not null,
    due_at       integer not null,
    failures     integer not null,
    last_error   text,
    parked_at    integer not null,
    note         text    not null,
    dropped_at   integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;

-- An output that a recovery found on its stream, after the database was restored to a time before
-- its publication. It is not published again when its event is handled again.
create table oncely_recovered_output (
    id              text    constraint recovered_output_pk primary key,
    stream          text    not null,
    stream_sequence integer not null,
    recovered_at    integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;
create index oncely_recovered_output_by_age on oncely_recovered_output (recovered_at);

-- The key of the message ids of outputs, one row. Publishers and workers can neither choose nor
-- compute these ids.
create table oncely_output_key (
    row integer not null constraint output_key_pk primary key
        constraint output_key_single_row check (row = 1),
    key blob    not null constraint output_key_length check (length(key) = 32)
) strict;
insert into oncely_output_key values (1, randomblob(32));


-- State -------------------------------------------------------------------------------------------

-- A key of a worker's state. Versions of a key never decrease, not even across a deletion, so that
-- a compare-and-set with an old version fails. A deleted key keeps its row for a day: `value` is
-- null, `version` is that of the deletion.
create table oncely_state (
    worker     text    not null,
    key        text    not null
        constraint state_key_length check (length(cast(key as blob)) between 1 and 255),
    value      blob,
    version    integer not null constraint state_version_positive check (version > 0),
    updated_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint state_pk primary key (worker, key)
) strict;
create index oncely_state_deleted on oncely_state (updated_at) where value is null;

-- The highest version of a worker's removed keys. A key without a row starts above it.
create table oncely_state_version_floor (
    worker  text    not null constraint state_version_floor_pk primary key,
    version integer not null constraint state_version_floor_positive check (version > 0)
) strict;


-- Requests ----------------------------------------------------------------------------------------

-- The response to an HTTP request with an idempotency key. The row is written in the transaction of
-- the effects.
create table oncely_request (
    worker      text    not null,
    -- The route in the manifest, such as `/accounts/{id}/transfers`.
    route       text    not null,
    -- A digest of the caller's identity; empty for an unauthenticated caller.
    caller      text    not null,
    key         text    not null,
    -- SHA-256 over method, path, query, content type and body.
    fingerprint blob    not null
        constraint request_fingerprint_length check (length(fingerprint) = 32),
    status      integer not null constraint request_status check (status between 200 and 599),
    headers     text    not null,
    body        blob    not null,
    answered_at integer not null,
    expires_at  integer not null,
    constraint request_pk primary key (worker, route, caller, key)
) strict;
create index oncely_request_by_age on oncely_request (expires_at);


-- Alarms ------------------------------------------------------------------------------------------

-- The current state of an alarm that was raised at least once. Every change is one transaction with
-- its notification, so an alarm is never raised twice.
create table oncely_alarm (
    worker      text    not null,
    kind        text    not null,
    -- See `oncely_dead_letter_group`. Empty, except for alarms on new failures.
    group_id    text    not null default '',
    -- The number of times it was raised.
    times       integer not null constraint alarm_times_positive check (times > 0),
    -- The measured value when it was raised, and the threshold: a count, or milliseconds.
    value       integer not null,
    threshold   integer not null,
    raised_at   integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- The time since which the value is low enough to clear the alarm.
    below_since integer,
    cleared_at  integer,
    constraint alarm_pk primary key (worker, kind, group_id),
    constraint alarm_cleared_has_no_below_since check (cleared_at is null or below_since is null)
) strict;
create index oncely_alarm_raised on oncely_alarm (worker) where cleared_at is null;
-- The rate limit of alarms on new failures.
create index oncely_alarm_new_failure on oncely_alarm (worker, raised_at)
    where kind = 'new-failure';


-- Access ------------------------------------------------------------------------------------------

-- A named token of the control API. Only its SHA-256 is stored. Rows are never deleted: activities
-- refer to them.
create table oncely_access_token (
    id         integer constraint access_token_pk primary key autoincrement,
    name       text    not null
        constraint access_token_name_is_not_the_host check (name <> 'host'),
    sha256     blob    not null constraint access_token_sha256_unique unique
        constraint access_token_sha256_length check (length(sha256) = 32),
    role       text    not null
        constraint access_token_role check (role in ('view', 'operate', 'deploy')),
    created_by text    not null,
    created_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    expires_at integer,
    revoked_by text,
    revoked_at integer,
    constraint access_token_revoked_by_actor check ((revoked_at is null) = (revoked_by is null))
) strict;
-- A name stands for one token at a time.
create unique index oncely_access_token_name_unique on oncely_access_token (name)
    where revoked_at is null;

-- A change that was requested of the control API. It is written before the change begins.
create table oncely_activity (
    id          integer constraint activity_pk primary key autoincrement,
    at          integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- The name of the token, and the token; null for the host's own token, whose name is `host`.
    actor       text    not null,
    token_id    integer constraint activity_token references oncely_access_token,
    -- The name that the client states.
    stated_name text,
    verb        text    not null,
    worker      text,
    object      text    not null,
    -- The parameters, as JSON.
    details     text    not null
) strict;
create index oncely_activity_by_worker on oncely_activity (worker, id) where worker is not null;
create index oncely_activity_by_actor on oncely_activity (actor, id);

-- The result of an activity. Without one, the host ended meanwhile and the change may be complete.
create table oncely_activity_outcome (
    activity_id integer constraint activity_outcome_pk primary key
        constraint activity_outcome_activity references oncely_activity,
    at          integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    outcome     text    not null
        constraint activity_outcome_known check (outcome in ('done', 'failed')),
    error       text,
    -- The result, as JSON. For skipped messages, it names each sequence.
    details     text    not null,
    constraint activity_outcome_failed_has_error check ((outcome = 'failed') = (error is not null))
) strict;
-- Checkpoints read recent rows.
create index oncely_activity_by_age on oncely_activity (at);
create index oncely_activity_outcome_by_age on oncely_activity_outcome (at);
create trigger oncely_activity_no_update before update on oncely_activity
begin
    select raise(abort, 'the table oncely_activity is append-only');
end;
create trigger oncely_activity_no_delete before delete on oncely_activity
begin
    select raise(abort, 'the table oncely_activity is append-only');
end;
create trigger oncely_activity_outcome_no_update before update on oncely_activity_outcome
begin
    select raise(abort, 'the table oncely_activity_outcome is append-only');
end;
create trigger oncely_activity_outcome_no_delete before delete on oncely_activity_outcome
begin
    select raise(abort, 'the table oncely_activity_outcome is append-only');
end;


-- Receipts ----------------------------------------------------------------------------------------

-- A checkpoint: a set of leaves, made from rows that were settled since the one before. `root` is
-- that of a tree over them (RFC 9162), `hash` covers all columns, so checkpoints are a chain. Rows
-- are immutable and never deleted.
create table oncely_checkpoint (
    number       integer constraint checkpoint_pk primary key
        constraint checkpoint_number_positive check (number > 0),
    installation text    not null,
    hash         text    not null constraint checkpoint_hash_length check (length(hash) = 64),
    -- The hash of the checkpoint before; null for the first one.
    previous     text,
    closed_at    integer not null,
    leaves       integer not null,
    root         text    not null,
    constraint checkpoint_first_has_no_previous check ((previous is null) = (number = 1))
) strict;
create index oncely_checkpoint_by_age on oncely_checkpoint (closed_at);
create trigger oncely_checkpoint_no_update before update on oncely_checkpoint
begin
    select raise(abort, 'the table oncely_checkpoint is append-only');
end;
create trigger oncely_checkpoint_no_delete before delete on oncely_checkpoint
begin
    select raise(abort, 'the table oncely_checkpoint is append-only');
end;

-- Leaves of a checkpoint: 1024, or fewer in its last block. `leaves` is compressed lines of JSON,
-- `root` that of their subtree. A row is in the first checkpoint that saw it, and its leaf stays
-- after the row has left. Blocks are deleted after a time.
create table oncely_checkpoint_block (
    checkpoint integer not null
        constraint checkpoint_block_checkpoint references oncely_checkpoint,
    block      integer not null,
    -- The earliest and the latest time of its leaves.
    from_at    integer not null,
    until_at   integer not null,
    root       blob    not null constraint checkpoint_block_root check (length(root) = 32),
    leaves     blob    not null,
    constraint checkpoint_block_pk primary key (checkpoint, block)
) strict;
create index oncely_checkpoint_block_by_age on oncely_checkpoint_block (until_at);

-- The state of the next checkpoint, one row, written when receipts are first turned on. Rows before
-- the three times are in checkpoints. Rows after them may be: transactions commit late.
create table oncely_checkpoint_head (
    row             integer not null constraint checkpoint_head_pk primary key
        constraint checkpoint_head_single_row check (row = 1),
    began_at        integer not null,
    -- The last checkpoint, 0 and null for none.
    number          integer not null default 0,
    hash            text,
    events_from     integer not null,
    outputs_from    integer not null,
    activities_from integer not null,
    -- Outputs up to this number belong to events that are in checkpoints. Only used by SQLite.
    outbox_seq      integer not null default 0,
    -- The last time that a host read new rows, and its lease while it does.
    checked_at      integer not null,
    leased_until    integer not null
) strict;


-- Host --------------------------------------------------------------------------------------------

-- The installation: this database and its host, one row. Consumers and streams carry its id in
-- their metadata. Hosts of another database on the same NATS server are refused.
create table oncely_installation (
    row integer not null constraint installation_pk primary key
        constraint installation_single_row check (row = 1),
    id  text    not null constraint installation_id_length check (length(id) = 16)
) strict;
insert into oncely_installation values (1, lower(hex(randomblob(8))));

-- The last report of the host, as JSON, one row. The host writes it every two seconds. A successful
-- commit also shows that the database accepts writes.
create table oncely_host_report (
    row        integer not null constraint host_report_pk primary key
        constraint host_report_single_row check (row = 1),
    written_at integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- Counts the reports.
    number     integer not null default 1,
    report     text    not null
) strict;

-- The last 100 audits of the books. One without an end runs, or its host ended meanwhile.
create table oncely_audit_run (
    id          integer constraint audit_run_pk primary key autoincrement,
    -- The window; `worker` is null for all workers.
    worker      text,
    since       integer not null,
    is_repair   integer not null,
    -- The host that runs it, as in its reports.
    host        text    not null,
    actor       text    not null,
    stated_name text,
    started_at  integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    ended_at    integer,
    -- The report as JSON with the first differences, the number of all, and of those repaired.
    report      text,
    differences integer,
    repaired    integer,
    -- The reason of a failure.
    error       text,
    constraint audit_run_ended_has_result check (
        (ended_at is null) = (report is null and error is null)
        and (report is null) = (differences is null and repaired is null)
        and (report is null or error is null))
) strict;

-- The history of a worker: counts and lag of five minutes, for the charts of the console. A ring:
-- each worker has at most 2016 rows, those of a week. A week later a row is used again. `bucket` is
-- the number of its five minutes since the Unix epoch.
create table oncely_worker_history (
    worker  text    not null,
    slot    integer not null constraint worker_history_slot check (slot between 0 and 2015),
    bucket  integer not null
        constraint worker_history_slot_of_bucket check (slot = bucket % 2016),
    -- Handled events, failed attempts that are retried, and dead letters.
    done    integer not null,
    retries integer not null,
    dead    integer not null,
    -- The highest age of the oldest unhandled message, in milliseconds.
    lag_ms  integer not null,
    -- Counts of calls by their time, as a JSON array: see `host/src/model/call_times.rs`.
    calls   text    not null default '[]',
    constraint worker_history_pk primary key (worker, slot)
) strict;

-- A watermark, for the detection of restores. Under load the host inserts a row every two seconds,
-- then publishes its name. A published name without a row: the database was restored to an earlier
-- time. An acknowledged row without a message: the broker was.
create table oncely_watermark (
    number          integer constraint watermark_pk primary key autoincrement,
    name            text    not null constraint watermark_name_is_unique unique,
    written_at      integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    -- The ends of the streams and the ack floors of the consumers, as JSON.
    broker_state    text    not null,
    -- The position of the published name; null until the broker has acknowledged it.
    stream_sequence integer
) strict;
