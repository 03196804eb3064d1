-- Requests over HTTP: what was answered to an idempotency key, in the transaction of the effects.
create table oncely_request (
    worker      text    not null,
    -- Of the manifest, such as `/accounts/{id}/transfers`.
    route       text    not null,
    -- Who asked, as a digest; empty for one that nobody vouches for.
    caller      text    not null,
    key         text    not null,
    -- SHA-256 over method, path, query, content type and body.
    fingerprint blob    not null constraint request_fingerprint_length check (length(fingerprint) = 32),
    status      integer not null constraint request_status check (status between 200 and 599),
    headers     text    not null,
    body        blob    not null,
    answered_at integer not null,
    expires_at  integer not null,
    constraint request_pk primary key (worker, route, caller, key)
) strict;
create index oncely_request_by_age on oncely_request (expires_at);
