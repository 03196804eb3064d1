-- Tables of the test guests.

-- Effects in order of arrival. There is no constraint, so that a repeated effect shows. The two
-- rows of one delivery sum to zero and share a nonce that no other attempt has.
create table effect (
    event_id      text    not null,
    account       text    not null,
    delta         integer  not null,
    attempt_nonce text    not null
) strict;
create index effect_by_event on effect (event_id);

-- For deliberate constraint violations.
create table once (
    id text constraint once_pk primary key
) strict;

-- Balances of the `ledger` behaviour; they must always agree with the effects.
create table balance (
    account text    constraint balance_pk primary key,
    amount  integer not null
) strict;

-- For violations that only the commit finds.
create table promise (
    id      text constraint promise_pk primary key,
    kept_by text not null constraint promise_kept references once (id) deferrable initially deferred
) strict;
