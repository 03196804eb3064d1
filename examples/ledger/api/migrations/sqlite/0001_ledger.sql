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
--
-- Foreign keys document references, but SQLite checks them only on connections that enable it.
-- `insert or replace` deletes rows without running delete triggers. Under `insert or ignore` and
-- `insert or fail`, a check constraint that fails inside a trigger stops that trigger midway. An
-- abort raised by a trigger always rolls the whole statement back. So the triggers check everything
-- themselves, and no table has a rowid to replace by.

create table account (
    id       text not null constraint account_pk primary key
                  constraint account_id_plain check (length(id) between 1 and 64 and id not glob '*[^a-z0-9-]*'),
    currency text not null constraint account_currency check (currency glob '[A-Z][A-Z][A-Z]'),
    -- The amount by which the balance may be negative. Null means no limit, for the account that
    -- stands for the outside world.
    overdraft_limit integer default 0 constraint account_limit check (overdraft_limit >= 0),
    balance  integer not null default 0,
    -- The sum of the open holds, which cannot be spent.
    held     integer not null default 0 constraint account_held check (held >= 0),
    -- Incremented with each change. A change names the version that it is based on.
    version  integer not null default 1,
    constraint account_not_overdrawn check (overdraft_limit is null or balance - held >= -overdraft_limit),
    constraint account_readable check (abs(balance) <= 9007199254740991)
) strict, without rowid;

create table hold (
    id       text    not null constraint hold_pk primary key,
    debit    text    not null constraint hold_debit references account,
    credit   text    not null constraint hold_credit references account,
    currency text    not null,
    amount   integer not null constraint hold_amount check (amount between 1 and 9007199254740991),
    note     text,
    state    text    not null default 'open' constraint hold_state check (state in ('open', 'captured', 'released')),
    constraint hold_between_two check (debit <> credit)
) strict, without rowid;
create index hold_open on hold (debit) where state = 'open';

create table journal (
    id       text    not null constraint journal_pk primary key,
    kind     text    not null constraint journal_kind check (kind in ('transfer', 'capture', 'reversal')),
    debit    text    not null constraint journal_debit references account,
    credit   text    not null constraint journal_credit references account,
    currency text    not null,
    -- At most 2^53 - 1, which every JSON parser can represent.
    amount   integer not null constraint journal_amount check (amount between 1 and 9007199254740991),
    note     text,
    -- A transaction is reversed once, and a hold is captured once.
    reverses text    constraint journal_reverses references journal constraint journal_reversed_once unique,
    hold     text    constraint journal_hold references hold constraint journal_captured_once unique,
    at       text    not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    constraint journal_between_two check (debit <> credit),
    constraint journal_reversal check ((kind = 'reversal') = (reverses is not null)),
    constraint journal_capture check ((kind = 'capture') = (hold is not null))
) strict, without rowid;

create table entry (
    account        text    not null constraint entry_account references account,
    -- The version of the account. No two entries share a version, so no update is lost.
    version        integer not null,
    transaction_id text    not null constraint entry_transaction references journal,
    amount         integer not null,
    -- The balance after this entry.
    balance        integer not null,
    constraint entry_pk primary key (account, version),
    constraint entry_once unique (transaction_id, account)
) strict, without rowid;

-- The journal.

create trigger journal_is_sound before insert on journal begin
    select raise(abort, 'a transaction is written once')
    where exists (select 1 from journal where id = new.id or reverses = new.reverses or hold = new.hold);
    select raise(abort, 'a transaction is between two accounts of its currency')
    where (select count(*) from account where id in (new.debit, new.credit) and currency = new.currency) <> 2;
    select raise(abort, 'a reversal must mirror a transaction that is not a reversal')
    where new.reverses is not null and not exists (
        select 1 from journal where id = new.reverses and kind <> 'reversal'
            and debit = new.credit and credit = new.debit and amount = new.amount);
    select raise(abort, 'a capture must match an open hold')
    where new.hold is not null and not exists (
        select 1 from hold where id = new.hold and state = 'open'
            and debit = new.debit and credit = new.credit and amount = new.amount);
end;

create trigger journal_is_posted after insert on journal begin
    update hold set state = 'captured' where id = new.hold;
    insert into entry (account, version, transaction_id, amount, balance)
    select id, version, new.id, -new.amount, balance - new.amount from account where id = new.debit;
    insert into entry (account, version, transaction_id, amount, balance)
    select id, version, new.id, new.amount, balance + new.amount from account where id = new.credit;
    update account set balance = balance - new.amount where id = new.debit;
    update account set balance = balance + new.amount where id = new.credit;
end;

create trigger journal_is_not_updated before update on journal begin
    select raise(abort, 'the journal is append-only; reverse the transaction');
end;
create trigger journal_is_not_deleted before delete on journal begin
    select raise(abort, 'the journal is append-only; reverse the transaction');
end;

-- Entries.

create trigger entry_is_a_side_of_its_transaction before insert on entry begin
    select raise(abort, 'an account has one entry per version and one per transaction')
    where exists (
        select 1 from entry where account = new.account and (version = new.version or transaction_id = new.transaction_id));
    select raise(abort, 'account_readable') where abs(new.balance) > 9007199254740991;
    select raise(abort, 'an entry must be a side of its transaction, after the last entry of its account')
    where not exists (
        select 1 from journal join account on account.id = new.account
        where journal.id = new.transaction_id
            and ((account.id = debit and new.amount = -journal.amount) or (account.id = credit and new.amount = journal.amount))
            and new.version = account.version and new.balance = account.balance + new.amount);
end;

create trigger entry_is_not_updated before update on entry begin
    select raise(abort, 'entries are append-only; reverse the transaction');
end;
create trigger entry_is_not_deleted before delete on entry begin
    select raise(abort, 'entries are append-only; reverse the transaction');
end;

-- Accounts.

create trigger account_opens_empty before insert on account begin
    select raise(abort, 'an account must be opened once, and empty')
    where new.balance <> 0 or new.held <> 0 or new.version <> 1 or exists (select 1 from account where id = new.id);
end;

create trigger account_follows_its_entries before update on account begin
    select raise(abort, 'the id and currency of an account are fixed, and its version only grows')
    where new.id <> old.id or new.currency <> old.currency or new.version < old.version;
    select raise(abort, 'a balance must equal that of the last entry')
    where new.balance <> old.balance and not exists (
        select 1 from entry where account = new.id and version = new.version and balance = new.balance);
    select raise(abort, 'account_not_overdrawn') where new.balance - new.held < -new.overdraft_limit;
    select raise(abort, 'the held amount must equal the sum of the open holds')
    where new.held <> (select coalesce(sum(amount), 0) from hold where debit = new.id and state = 'open');
end;

create trigger account_is_not_deleted before delete on account begin
    select raise(abort, 'an account is never deleted');
end;

-- Holds.

create trigger hold_is_sound before insert on hold begin
    select raise(abort, 'a hold must be placed once, and open')
    where new.state <> 'open' or exists (select 1 from hold where id = new.id);
    select raise(abort, 'a hold is between two accounts of its currency')
    where (select count(*) from account where id in (new.debit, new.credit) and currency = new.currency) <> 2;
end;

create trigger hold_keeps_money after insert on hold begin
    update account set held = held + new.amount where id = new.debit;
end;

create trigger hold_ends_once before update on hold begin
    select raise(abort, 'a hold ends once: released, or captured by its transaction')
    where (new.id, new.debit, new.credit, new.currency, new.amount, new.note)
            is not (old.id, old.debit, old.credit, old.currency, old.amount, old.note)
        or old.state <> 'open' or new.state = 'open'
        or (new.state = 'captured') <> exists (select 1 from journal where hold = old.id);
end;

create trigger hold_releases_money after update on hold begin
    update account set held = held - old.amount where id = old.debit;
end;

create trigger hold_is_not_deleted before delete on hold begin
    select raise(abort, 'a hold is never deleted; release it');
end;

-- A transaction in a readable form.
create view posted as
select id, kind, debit, credit, currency, amount, note, reverses, hold, at from journal;
