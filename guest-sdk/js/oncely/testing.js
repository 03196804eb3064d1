/** A host for tests without WebAssembly. */

import { AsyncLocalStorage } from "node:async_hooks";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

import { findBackendWith } from "./backend.js";
import { Message } from "./message.js";
import { encodeBody } from "./outbox.js";
import { ConstraintViolation, SqlError } from "./sql.js";
import { Entry, VersionMismatch } from "./state.js";
import { Timestamp, decode, encode, numberOrBigInt } from "./values.js";

const current = new AsyncLocalStorage();

findBackendWith(() => current.getStore());

/** The primary codes of SQLite's constraint violations have this last byte. */
const CONSTRAINT = 19;

export class Output {
  constructor(fields) {
    Object.assign(this, fields);
  }

  text() {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.body);
  }

  json() {
    return JSON.parse(this.text());
  }
}

export class Host {
  state = new Map();
  cache = new Map();
  config = {};
  outputs = [];
  logs = [];
  now = undefined;
  attempt = 1;
  maxAttempts = 10;
  #migrations;
  #database;
  #last = Promise.resolve();

  constructor({ migrations, config = {} } = {}) {
    this.#migrations = migrations;
    this.config = { ...config };
  }

  /** Delivers one message after those before it have ended, as a lane does. */
  deliver(handle, body, { id = "event-1", subject = "test", headers = [], origin } = {}) {
    const pairs = Symbol.iterator in headers ? [...headers] : Object.entries(headers);
    const message = new Message({ id, subject, body: encodeBody(body), headers: pairs, origin });
    return this.#deliverNext([message], () => handle(message));
  }

  /** Delivers a batch to a handler of batches. A failure of one message rolls all back. */
  deliverBatch(handle, bodies) {
    const messages = bodies.map((body, at) =>
      new Message({ id: `event-${at + 1}`, subject: "test", body: encodeBody(body) }));
    return this.#deliverNext(messages, async () => {
      const failure = (await handle(messages))?.find((one) => one != null);
      if (failure) throw failure;
    });
  }

  #deliverNext(messages, run) {
    const delivery = this.#last.then(() => this.#deliver(messages, run));
    this.#last = delivery.catch(() => {});
    return delivery;
  }

  async #deliver(messages, run) {
    const before = { state: new Map(this.state), cache: new Map(this.cache) };
    const delivery = new Delivery(this, messages);
    this.#database?.exec("begin");
    try {
      await current.run(delivery, run);
      if (delivery.doom) throw delivery.doom;
    } catch (error) {
      delivery.hasEnded = true;
      this.#database?.exec("rollback");
      Object.assign(this, before);
      throw error;
    }
    delivery.hasEnded = true;
    this.#database?.exec("commit");
    this.outputs.push(...delivery.sent);
  }

  rows(statement, ...params) {
    return rowsOf(this.database(), statement, params);
  }

  /** The database, which is opened at the first use. */
  database(isInDelivery = false) {
    if (!this.#database) {
      const DatabaseSync = sqlite();
      this.#database = new DatabaseSync(":memory:");
      const folder = this.#migrations;
      const files = folder === undefined ? [] : readdirSync(folder).sort();
      for (const file of files.filter((name) => name.endsWith(".sql"))) {
        this.#database.exec(readFileSync(join(folder, file), "utf8"));
      }
      if (isInDelivery) this.#database.exec("begin");
    }
    return this.#database;
  }

  close() {
    this.#database?.close();
    this.#database = undefined;
  }
}

export function host(options) {
  return new Host(options);
}

function sqlite() {
  const found = process.getBuiltinModule?.("node:sqlite");
  if (!found) {
    throw new Error(
      `tests with SQL need node:sqlite, which Node.js has from 22.13; this is ${process.version}`,
    );
  }
  return found.DatabaseSync;
}

/** The functions behind `outbox`, `state` and the others, for one delivery. */
class Delivery {
  sent = [];
  doom = undefined;
  hasEnded = false;
  #host;
  #messages;

  constructor(host_, messages) {
    this.#host = host_;
    this.#messages = messages;
    // A promise that the handler does not await may run on after the end.
    return new Proxy(this, {
      get: (target, name) => {
        const value = target[name];
        if (typeof value !== "function") return value;
        if (target.hasEnded) {
          throw new Error("the delivery has ended: await each promise in the handler");
        }
        return value.bind(target);
      },
    });
  }

  send({ subject, headers, body, id, orderingKey, delay, causedBy }) {
    const event = causedBy ?? this.#messages[0].id;
    id ??= `worker:${event}:${this.sent.length}`;
    this.sent.push(new Output({ id, subject, headers, body, orderingKey, delay }));
    return id;
  }

  stateGet(key) {
    return this.#host.state.get(key);
  }

  stateSet(key, value) {
    const version = (versions.get(this.#host)?.get(key) ?? 0) + 1;
    if (!versions.has(this.#host)) versions.set(this.#host, new Map());
    versions.get(this.#host).set(key, version);
    this.#host.state.set(key, new Entry(value.slice(), version));
    return version;
  }

  stateDelete(key) {
    return this.#host.state.delete(key);
  }

  stateCompareAndSet(key, expected, value) {
    const version = this.#host.state.get(key)?.version;
    if (version !== expected) throw new VersionMismatch(version);
    return this.stateSet(key, value);
  }

  query(statement, params) {
    return this.#run(() => rowsOf(this.#host.database(true), statement, params));
  }

  execute(statement, params) {
    return this.#run(() => {
      const { changes } = prepare(this.#host.database(true), statement).run(formsOf(params));
      return numberOrBigInt(changes);
    });
  }

  defer(statement, params) {
    this.execute(statement, params);
  }

  /** A failed statement fails the delivery, even if the handler catches the exception. */
  #run(statement) {
    try {
      return statement();
    } catch (error) {
      if (error.errcode === undefined) throw error;
      const isViolation = (error.errcode & 255) === CONSTRAINT;
      const code = String(error.errcode);
      this.doom = isViolation
        ? new ConstraintViolation(error.message, { code })
        : new SqlError("query-failed", error.message, { code });
      throw this.doom;
    }
  }

  dialect() {
    return "sqlite";
  }

  cacheGet(key) {
    return this.#host.cache.get(key);
  }

  cachePut(key, value) {
    this.#host.cache.set(key, value.slice());
  }

  cacheInvalidate() {
    this.#host.cache.clear();
  }

  configGet(key) {
    return Object.hasOwn(this.#host.config, key) ? this.#host.config[key] : undefined;
  }

  invocationId() {
    return `worker:${this.#messages[0].id}`;
  }

  worker() {
    return "worker";
  }

  version() {
    return 1;
  }

  attempt() {
    return this.#host.attempt;
  }

  maxAttempts() {
    return this.#host.maxAttempts;
  }

  now() {
    return new Timestamp(this.#host.now);
  }

  remaining() {
    return 10_000;
  }

  traceparent() {
    return this.#messages[0].header("traceparent");
  }

  log(level, line) {
    this.#host.logs.push({ level, line });
  }
}

/** The last version of each key, which grows also across a deletion. */
const versions = new WeakMap();

function prepare(database, statement) {
  const prepared = database.prepare(statement);
  prepared.setReadBigInts(true);
  return prepared;
}

function rowsOf(database, statement, params) {
  const prepared = prepare(database, statement);
  return prepared.all(formsOf(params)).map((row) =>
    Object.fromEntries(Object.entries(row).map(([name, value]) => [name, valueOf(value)])));
}

/** The parameters by name: to SQLite, `$1` is a name. It has no booleans. */
function formsOf(params) {
  const forms = params.map((value, at) => {
    const [kind, form] = encode(value);
    return [`$${at + 1}`, kind === "boolean" ? Number(form) : form ?? null];
  });
  return Object.fromEntries(forms);
}

function valueOf(value) {
  return typeof value === "bigint" ? decode("int64", value) : value;
}
