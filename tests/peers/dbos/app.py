#!/usr/bin/env python3
"""The work of the contender `state` as a workflow of DBOS, for `make bench-peers`.

Usage: app.py prepare URL THREADS POLLING_SECONDS send|transaction listen|poll MESSAGES KEYS
       app.py work URL THREADS POLLING_SECONDS send|transaction listen|poll

`prepare` creates the tables and enqueues the messages. `work` prints `ready`, waits for a line on
its standard input, and works until that closes. The id of an event is the id of its workflow.

The output of a message is a message to another workflow, which has not started, so that it waits
there as an output of Oncely waits in a stream. `send` sends it with a step, as the documentation of
DBOS recommends. `transaction` sends it in the transaction of the counter, which has fewer round
trips and is possible if both are in the database of DBOS.
"""

import os
import sys

from dbos import DBOS, DBOSClient, DBOSConfig, SQLAlchemyDatasource
from sqlalchemy import create_engine, text

# A fixed version: workers take workflows of their own version only.
VERSION = "1"
QUEUE = "inputs"
# Workers do not listen to this one.
RECEIVERS = "receivers"
# Enqueued in one transaction.
BATCH = 1_000


def main() -> None:
    if len(sys.argv) < 7:
        sys.exit(__doc__)
    command, url, threads, polling, output, listen, *rest = sys.argv[1:]
    config: DBOSConfig = {
        "name": "peer",
        "application_version": VERSION,
        "executor_id": f"{command}-{os.getpid()}",
        "system_database_url": url,
        # A connection for each thread, and the default number in addition.
        "sys_db_pool_size": int(threads) + 20,
        "max_executor_threads": int(threads) + 20,
        "use_listen_notify": listen == "listen",
        "log_level": "WARNING",
        "run_admin_server": False,
        "enable_otlp": False,
    }
    if command == "prepare":
        messages, keys = map(int, rest)
        prepare(url, config, int(threads), float(polling))
        enqueue(url, messages, keys)
    else:
        work(url, config, int(threads), output)


def prepare(url: str, config: DBOSConfig, threads: int, polling: float) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        table = "create table counters (key text primary key, value bigint not null)"
        connection.execute(text(table))
    SQLAlchemyDatasource.create(url)
    DBOS(config=config)
    DBOS.listen_queues([])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=threads, polling_interval_sec=polling)
    DBOS.destroy()


def enqueue(url: str, messages: int, keys: int) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    client = DBOSClient(system_database_url=url, application_name="peer")
    receivers = [(receiver(f"k{n}"), RECEIVERS, "receive", ()) for n in range(keys)]
    inputs = [(f"e{n}", QUEUE, "handle", (f"e{n}", f"k{n % keys}")) for n in range(messages)]
    everything = receivers + inputs
    for start in range(0, len(everything), BATCH):
        with engine.begin() as connection:
            for workflow_id, queue, name, arguments in everything[start : start + BATCH]:
                options = {
                    "workflow_id": workflow_id,
                    "queue_name": queue,
                    "workflow_name": name,
                    "app_version": VERSION,
                }
                client.enqueue_in_transaction(connection, options, *arguments)
    # A database in use has statistics for its planner.
    with engine.begin() as connection:
        connection.execute(text("analyze"))
    client.destroy()


def receiver(key: str) -> str:
    return f"outputs-{key}"


def work(url: str, config: DBOSConfig, threads: int, output: str) -> None:
    pool = {"pool_size": threads}
    database = SQLAlchemyDatasource.create(url, engine_kwargs=pool)
    client = DBOSClient(system_database_url=url) if output == "transaction" else None
    DBOS(config=config)

    @database.transaction(isolation_level="READ COMMITTED")
    def count(event_id: str, key: str) -> None:
        session = database.sql_session()
        statement = (
            "insert into counters (key, value) values (:key, 1) "
            "on conflict (key) do update set value = counters.value + 1"
        )
        session.execute(text(statement), {"key": key})
        if client:
            client.send_in_transaction(session, receiver(key), event_id, idempotency_key=event_id)

    @DBOS.workflow(name="handle")
    def handle(event_id: str, key: str) -> None:
        count(event_id, key)
        if not client:
            DBOS.send(receiver(key), event_id)

    @DBOS.workflow(name="receive")
    def receive() -> None:
        DBOS.recv()

    DBOS.listen_queues([QUEUE])
    print("ready", flush=True)
    sys.stdin.readline()
    DBOS.launch()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
