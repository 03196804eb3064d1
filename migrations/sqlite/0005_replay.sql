-- The record of the last failed attempt at an event: what the handler was given, asked and saw, as JSON, for a replay.
--
-- It holds what the message and the rows that the handler read hold. It goes when the event takes effect, when its letter is
-- closed, and with its attempt. `proof` is a digest of all of it but the time: two attempts in a row that agree on it prove that the next one
-- comes to the same. It is null where that would prove nothing.
create table oncely_record (
    worker   text    not null,
    event_id text    not null,
    attempt  integer not null constraint record_counts_from_one check (attempt > 0),
    proof    blob    constraint record_proof_is_sha256 check (length(proof) = 32),
    record   blob    not null,
    constraint record_pk primary key (worker, event_id),
    constraint record_attempt foreign key (worker, event_id, attempt) references oncely_attempt on delete cascade
) strict;
