-- SQLite has no partitions: rows leave in batches. Attempts go by age: the events they belong to may have left before.
create index oncely_attempt_by_age on oncely_attempt (at);
