-- Accounts and the entries that explain their balances.
--
-- Money is counted in cents. An *entry* is one side of a payment: the amount that it added to an
-- account, or took from it. Entries are append-only. The entries of one payment sum to zero, and so
-- do all entries together:
--     select sum(cents) from entry;
-- A balance is the sum of the entries of its account. It is stored so that a payment does not have
-- to sum them.

create table account (
    name    text   constraint account_pk primary key,
    balance integer not null,
    -- Equity stands for the outside world. It owes the money that came in from there.
    constraint account_not_overdrawn check (balance >= 0 or name = 'equity')
) strict;

create table entry (
    payment text   not null,
    account text   not null constraint entry_account references account,
    cents   integer not null constraint entry_moves_something check (cents <> 0),
    -- One payment touches an account once, so a payment cannot be made twice.
    constraint entry_pk primary key (payment, account)
) strict;
create index entry_by_account on entry (account);

-- Twenty accounts, each opened with 1,000.00 from equity.
insert into account (name, balance) values
    ('equity', 0),
    ('alice', 0), ('bob', 0), ('carol', 0), ('dave', 0), ('erin', 0),
    ('frank', 0), ('grace', 0), ('heidi', 0), ('ivan', 0), ('judy', 0),
    ('kim', 0), ('leo', 0), ('mallory', 0), ('niaj', 0), ('olivia', 0),
    ('peggy', 0), ('quentin', 0), ('rupert', 0), ('sybil', 0), ('trent', 0);

insert into entry (payment, account, cents)
select 'opening-' || name, name, 100000 from account where name <> 'equity';

insert into entry (payment, account, cents)
select payment, 'equity', -cents from entry;

update account set balance = (select sum(cents) from entry where account = name);
