-- Dead letters that people work with: put back, corrected, closed, and who did it.
--
-- Words: a letter is *open* while it waits for somebody, *redriven* once it was put back to its worker and until the inbox
-- says what became of it, *done* when its event took effect after all, *resolved* or *dropped* when a person closed it.
-- Its *generation* counts how often it was put back. Whether a redriven letter took effect stands in the inbox; `done` is
-- written here later, so that delivering costs nothing more.

alter table oncely_dead_letter add column state text not null default 'open'
    constraint dead_letter_state check (state in ('open', 'redriven', 'done', 'resolved', 'dropped'));
alter table oncely_dead_letter add column generation integer not null default 0
    constraint dead_letter_generation check (generation >= 0);
-- How many attempts had failed when it was last put back: those after it have a budget of their own.
alter table oncely_dead_letter add column attempts_before integer not null default 0;
-- When it was last put back or closed.
alter table oncely_dead_letter add column moved_at integer;
-- When it died before it was put back, if it was; `died_at` is the last time.
alter table oncely_dead_letter add column first_died_at integer;
-- When its stream stored the message; none for a letter that is older than this column.
alter table oncely_dead_letter add column stored_at integer;

-- What people look at, and what has to be looked after: few rows, however many letters were closed.
create index oncely_dead_letter_to_do on oncely_dead_letter (id) where state in ('open', 'redriven');

-- Corrected bodies, beside the original, which never changes. The last one is what a redrive gives to the worker.
create table oncely_letter_edit (
    letter integer not null constraint letter_edit_of references oncely_dead_letter,
    edit   integer not null constraint letter_edit_counts_from_one check (edit > 0),
    body   blob    not null,
    actor  text    not null,
    note   text    not null,
    at     integer not null default (cast(unixepoch('subsec') * 1000000 as integer)),
    constraint letter_edit_pk primary key (letter, edit)
) strict;

-- Who did what to which letter. Rows are only ever added.
create table oncely_letter_audit (
    seq        integer constraint letter_audit_pk primary key autoincrement,
    letter     integer not null constraint letter_audit_of references oncely_dead_letter,
    action     text    not null constraint letter_audit_action check (action in ('redrive', 'edit', 'resolve', 'drop')),
    generation integer not null,
    actor      text    not null,
    note       text,
    at         integer not null default (cast(unixepoch('subsec') * 1000000 as integer))
) strict;
create index oncely_letter_audit_by_letter on oncely_letter_audit (letter);

create trigger oncely_letter_audit_is_never_updated before update on oncely_letter_audit
begin
    select raise(abort, 'rows of oncely_letter_audit are only ever added');
end;
create trigger oncely_letter_audit_is_never_deleted before delete on oncely_letter_audit
begin
    select raise(abort, 'rows of oncely_letter_audit are only ever added');
end;
create trigger oncely_letter_edit_is_never_updated before update on oncely_letter_edit
begin
    select raise(abort, 'rows of oncely_letter_edit are only ever added');
end;
create trigger oncely_letter_edit_is_never_deleted before delete on oncely_letter_edit
begin
    select raise(abort, 'rows of oncely_letter_edit are only ever added');
end;
