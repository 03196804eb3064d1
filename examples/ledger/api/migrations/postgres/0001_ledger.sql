-- A double-entry ledger that cannot become unbalanced.
--
-- Money is counted in minor units (cents). A row of `journal` is a transaction: an amount leaves
-- the account `debit` and reaches the account `credit`. One row carries both sides, so no statement
-- and no moment exists in which a transaction does not sum to zero. An `entry` is one side of a
-- transaction, from the view of its account, with the balance afterwards.
--
-- Handlers write rows of `journal`. Triggers write the entries and balances, and refuse other
-- changes:
--   journal  is written once, between two accounts of its currency;
--   entry    is a side of its transaction, and the next one of its account;
--   account  has the balance of its last entry and the sum of its open holds, and is not overdrawn.
-- Journal and entries are append-only.

create table account (
    id       text   constraint account_pk primary key constraint account_id_plain check (id ~ '^[a-z0-9-]{1,64}$'),
    currency text   not null constraint account_currency check (currency ~ '^[A-Z]{3}$'),
    -- The amount by which the balance may be negative. Null means no limit, for the account that
    -- stands for the outside world.
    overdraft_limit bigint default 0 constraint account_limit check (overdraft_limit >= 0),
    balance  bigint not null default 0,
    -- The sum of the open holds, which cannot be spent.
    held     bigint not null default 0 constraint account_held check (held >= 0),
    -- Incremented with each change. A change names the version that it is based on.
    version  bigint not null default 1,
    constraint account_not_overdrawn check (overdraft_limit is null or balance - held >= -overdraft_limit),
    constraint account_readable check (abs(balance) <= 9007199254740991),
    -- The target of foreign keys to an account of a currency.
    constraint account_of_currency unique (id, currency)
);

create table hold (
    id       text   constraint hold_pk primary key,
    debit    text   not null,
    credit   text   not null,
    currency text   not null,
    amount   bigint not null constraint hold_amount check (amount between 1 and 9007199254740991),
    note     text,
    state    text   not null default 'open' constraint hold_state check (state in ('open', 'captured', 'released')),
    constraint hold_between_two check (debit <> credit),
    constraint hold_debit foreign key (debit, currency) references account (id, currency),
    constraint hold_credit foreign key (credit, currency) references account (id, currency)
);
create index hold_open on hold (debit) where state = 'open';

create table journal (
    id       text   constraint journal_pk primary key,
    kind     text   not null constraint journal_kind check (kind in ('transfer', 'capture', 'reversal')),
    debit    text   not null,
    credit   text   not null,
    currency text   not null,
    -- At most 2^53 - 1, which every JSON parser can represent.
    amount   bigint not null constraint journal_amount check (amount between 1 and 9007199254740991),
    note     text,
    -- A transaction is reversed once, and a hold is captured once.
    reverses text   constraint journal_reverses references journal constraint journal_reversed_once unique,
    hold     text   constraint journal_hold references hold constraint journal_captured_once unique,
    at       timestamptz not null default now(),
    constraint journal_between_two check (debit <> credit),
    constraint journal_debit foreign key (debit, currency) references account (id, currency),
    constraint journal_credit foreign key (credit, currency) references account (id, currency),
    constraint journal_reversal check ((kind = 'reversal') = (reverses is not null)),
    constraint journal_capture check ((kind = 'capture') = (hold is not null))
);

create table entry (
    account        text   not null constraint entry_account references account,
    -- The version of the account. No two entries share a version, so no update is lost.
    version        bigint not null,
    transaction_id text   not null constraint entry_transaction references journal,
    amount         bigint not null,
    -- The balance after this entry.
    balance        bigint not null,
    constraint entry_pk primary key (account, version),
    constraint entry_once unique (transaction_id, account)
);

-- Raises the error of a trigger, as a violated constraint.
create function refuse(reason text) returns void language plpgsql as $$
begin
    raise exception using errcode = 'restrict_violation', message = reason;
end $$;

-- Journal and entries: no update, no delete, no truncate.

create function never_changed() returns trigger language plpgsql set search_path from current as $$
begin
    perform refuse(tg_table_name || ': rows are append-only; reverse the transaction');
    return null;
end $$;

create trigger journal_is_not_changed before update or delete on journal
    for each row execute function never_changed();
create trigger journal_is_not_truncated before truncate on journal
    for each statement execute function never_changed();
create trigger entry_is_not_changed before update or delete on entry
    for each row execute function never_changed();
create trigger entry_is_not_truncated before truncate on entry
    for each statement execute function never_changed();
create trigger account_is_not_deleted before delete on account
    for each row execute function never_changed();
create trigger account_is_not_truncated before truncate on account
    for each statement execute function never_changed();
create trigger hold_is_not_deleted before delete on hold
    for each row execute function never_changed();
create trigger hold_is_not_truncated before truncate on hold
    for each statement execute function never_changed();

-- The journal.

create function journal_is_sound() returns trigger language plpgsql set search_path from current as $$
begin
    if new.reverses is not null and not exists (
        select from journal where id = new.reverses and kind <> 'reversal'
            and debit = new.credit and credit = new.debit and amount = new.amount)
    then
        perform refuse('a reversal must mirror a transaction that is not a reversal');
    end if;
    if new.hold is not null and not exists (
        select from hold where id = new.hold and state = 'open'
            and debit = new.debit and credit = new.credit and amount = new.amount)
    then
        perform refuse('a capture must match an open hold');
    end if;
    return new;
end $$;
create trigger journal_is_sound before insert on journal for each row execute function journal_is_sound();

create function journal_is_posted() returns trigger language plpgsql set search_path from current as $$
begin
    update hold set state = 'captured' where id = new.hold;
    insert into entry (account, version, transaction_id, amount, balance)
    select id, version, new.id, -new.amount, balance - new.amount from account where id = new.debit;
    insert into entry (account, version, transaction_id, amount, balance)
    select id, version, new.id, new.amount, balance + new.amount from account where id = new.credit;
    update account set balance = balance - new.amount where id = new.debit;
    update account set balance = balance + new.amount where id = new.credit;
    return null;
end $$;
create trigger journal_is_posted after insert on journal for each row execute function journal_is_posted();

-- Entries.

create function entry_is_a_side() returns trigger language plpgsql set search_path from current as $$
begin
    if not exists (
        select from journal join account on account.id = new.account
        where journal.id = new.transaction_id
            and ((account.id = debit and new.amount = -journal.amount) or (account.id = credit and new.amount = journal.amount))
            and new.version = account.version and new.balance = account.balance + new.amount)
    then
        perform refuse('an entry must be a side of its transaction, after the last entry of its account');
    end if;
    return new;
end $$;
create trigger entry_is_a_side_of_its_transaction before insert on entry
    for each row execute function entry_is_a_side();

-- Accounts.

create function account_opens_empty() returns trigger language plpgsql set search_path from current as $$
begin
    if new.balance <> 0 or new.held <> 0 or new.version <> 1 then
        perform refuse('an account must be opened empty');
    end if;
    return new;
end $$;
create trigger account_opens_empty before insert on account for each row execute function account_opens_empty();

create function account_follows_its_entries() returns trigger language plpgsql set search_path from current as $$
begin
    if new.id <> old.id or new.currency <> old.currency or new.version < old.version then
        perform refuse('the id and currency of an account are fixed, and its version only grows');
    end if;
    if new.balance <> old.balance and not exists (
        select from entry where account = new.id and version = new.version and balance = new.balance)
    then
        perform refuse('a balance must equal that of the last entry');
    end if;
    if new.held <> (select coalesce(sum(amount), 0) from hold where debit = new.id and state = 'open') then
        perform refuse('the held amount must equal the sum of the open holds');
    end if;
    return new;
end $$;
create trigger account_follows_its_entries before update on account
    for each row execute function account_follows_its_entries();

-- Holds.

create function hold_opens() returns trigger language plpgsql set search_path from current as $$
begin
    if new.state <> 'open' then
        perform refuse('a hold must be placed open');
    end if;
    return new;
end $$;
create trigger hold_opens before insert on hold for each row execute function hold_opens();

create function hold_ends_once() returns trigger language plpgsql set search_path from current as $$
begin
    if (new.id, new.debit, new.credit, new.currency, new.amount, new.note)
            is distinct from (old.id, old.debit, old.credit, old.currency, old.amount, old.note)
        or old.state <> 'open' or new.state = 'open'
        or (new.state = 'captured') <> exists (select from journal where hold = old.id)
    then
        perform refuse('a hold ends once: released, or captured by its transaction');
    end if;
    return new;
end $$;
create trigger hold_ends_once before update on hold for each row execute function hold_ends_once();

create function hold_keeps_money() returns trigger language plpgsql set search_path from current as $$
begin
    if tg_op = 'INSERT' then
        update account set held = held + new.amount where id = new.debit;
    else
        update account set held = held - old.amount where id = old.debit;
    end if;
    return null;
end $$;
create trigger hold_keeps_money after insert or update on hold for each row execute function hold_keeps_money();

-- A transaction in a readable form.
create view posted as
select id, kind, debit, credit, currency, amount, note, reverses, hold,
    to_char(at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') as at
from journal;
