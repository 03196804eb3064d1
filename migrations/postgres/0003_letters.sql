-- Dead letters that people work with: put back, corrected, closed, and who did it.
--
-- Words: a letter is *open* while it waits for somebody, *redriven* once it was put back to its worker and until the inbox
-- says what became of it, *done* when its event took effect after all, *resolved* or *dropped* when a person closed it.
-- Its *generation* counts how often it was put back. Whether a redriven letter took effect stands in the inbox; `done` is
-- written here later, so that delivering costs nothing more.

alter table oncely.dead_letter
    add column state           text        not null default 'open'
        constraint dead_letter_state check (state in ('open', 'redriven', 'done', 'resolved', 'dropped')),
    add column generation      integer     not null default 0 constraint dead_letter_generation check (generation >= 0),
    -- How many attempts had failed when it was last put back: those after it have a budget of their own.
    add column attempts_before integer     not null default 0,
    -- When it was last put back or closed.
    add column moved_at        timestamptz,
    -- When it died before it was put back, if it was; `died_at` is the last time.
    add column first_died_at   timestamptz,
    -- When its stream stored the message; none for a letter that is older than this column.
    add column stored_at       timestamptz;

-- What people look at, and what has to be looked after: few rows, however many letters were closed.
create index dead_letter_to_do on oncely.dead_letter (id) where state in ('open', 'redriven');

-- Corrected bodies, beside the original, which never changes. The last one is what a redrive gives to the worker.
create table oncely.letter_edit (
    letter bigint      not null constraint letter_edit_of references oncely.dead_letter,
    edit   integer     not null constraint letter_edit_counts_from_one check (edit > 0),
    body   bytea       not null,
    actor  text        not null,
    note   text        not null,
    at     timestamptz not null default now(),
    constraint letter_edit_pk primary key (letter, edit)
);

-- Who did what to which letter. Rows are only ever added.
create table oncely.letter_audit (
    seq        bigint      generated always as identity constraint letter_audit_pk primary key,
    letter     bigint      not null constraint letter_audit_of references oncely.dead_letter,
    action     text        not null constraint letter_audit_action check (action in ('redrive', 'edit', 'resolve', 'drop')),
    generation integer     not null,
    actor      text        not null,
    note       text,
    at         timestamptz not null default now()
);
create index letter_audit_by_letter on oncely.letter_audit (letter);

create function oncely.refuse_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    raise exception 'rows of % are only ever added', tg_table_name;
end $$;
revoke all on function oncely.refuse_change() from public;

create trigger letter_audit_is_append_only before update or delete on oncely.letter_audit
    for each row execute function oncely.refuse_change();
create trigger letter_edit_is_append_only before update or delete on oncely.letter_edit
    for each row execute function oncely.refuse_change();
