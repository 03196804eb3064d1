/** Oncely as the host: the interfaces of a component behind the functions of this package. */

import * as witCache from "oncely:worker/cache@0.1.0";
import * as witInvocation from "oncely:worker/invocation@0.1.0";
import * as witOutbox from "oncely:worker/outbox@0.1.0";
import * as witSql from "oncely:worker/sql@0.1.0";
import * as witState from "oncely:worker/state@0.1.0";
import * as witConfig from "wasi:config/store@0.2.0-rc.1";
import { log as witLog } from "wasi:logging/logging@0.1.0-draft";

import { findBackendWith } from "./backend.js";
import { CacheError } from "./cache.js";
import { describe } from "./describe.js";
import { Failure, Reject, RetryAfter } from "./errors.js";
import { kindOf } from "./handler.js";
import { Message } from "./message.js";
import { OutboxError } from "./outbox.js";
import { Conflict, ConstraintViolation, SqlError } from "./sql.js";
import { Entry, StateError, VersionMismatch } from "./state.js";
import { Timestamp, decode, encode, numberOrBigInt } from "./values.js";

/** Runs a call of an interface. Its error becomes an exception of this package. */
function call(run, exceptionOf) {
  try {
    return run();
  } catch (error) {
    const payload = error?.payload;
    if (payload?.tag === undefined) throw error;
    throw exceptionOf(payload.tag, payload.val);
  }
}

const outboxError = (tag, detail) => new OutboxError(tag, detail);
const cacheError = (tag, detail) => new CacheError(tag, detail);

function stateError(tag, detail) {
  if (tag !== "version-mismatch") return new StateError(tag, detail);
  return new VersionMismatch(detail == null ? undefined : numberOrBigInt(detail));
}

function sqlError(tag, detail) {
  switch (tag) {
    case "constraint-violation":
      return new ConstraintViolation(detail.message, detail);
    case "conflict":
      return new Conflict(detail.message, detail);
    case "query-failed":
      return new SqlError(tag, detail.message, detail);
    default:
      return new SqlError(tag, detail ?? "the time limit of this delivery was reached");
  }
}

function params(values) {
  return values.map((value) => {
    const [tag, val] = encode(value);
    return { tag, val };
  });
}

const host = {
  send: (message) =>
    call(() => {
      const delay = message.delay === undefined ? undefined : BigInt(message.delay);
      return witOutbox.send({ ...message, delay });
    }, outboxError),

  stateGet: (key) => {
    const entry = call(() => witState.get(key), stateError);
    return entry == null ? undefined : new Entry(entry.value, numberOrBigInt(entry.version));
  },
  stateSet: (key, value) => numberOrBigInt(call(() => witState.set(key, value), stateError)),
  stateDelete: (key) => call(() => witState.delete(key), stateError),
  stateCompareAndSet: (key, expected, value) => {
    const version = expected === undefined ? undefined : BigInt(expected);
    return numberOrBigInt(call(() => witState.compareAndSet(key, version, value), stateError));
  },

  query: (statement, values) => {
    const encoded = params(values);
    const { columns, rows } = call(() => witSql.query(statement, encoded), sqlError);
    // A column may have any name, such as `__proto__`.
    return rows.map((row) =>
      Object.fromEntries(row.map(({ tag, val }, at) => [columns[at], decode(tag, val)])));
  },
  execute: (statement, values) => {
    const encoded = params(values);
    return numberOrBigInt(call(() => witSql.execute(statement, encoded), sqlError));
  },
  defer: (statement, values) => {
    const encoded = params(values);
    call(() => witSql.defer(statement, encoded), sqlError);
  },
  dialect: () => witSql.getDialect(),

  cacheGet: (key) => call(() => witCache.get(key), cacheError) ?? undefined,
  cachePut: (key, value, ttl, tags) =>
    call(() => witCache.put(key, value, BigInt(ttl), tags), cacheError),
  cacheInvalidate: (tags) => call(() => witCache.invalidate(tags), cacheError),

  configGet: (key) => witConfig.get(key) ?? undefined,

  invocationId: witInvocation.id,
  worker: witInvocation.worker,
  version: witInvocation.version,
  attempt: witInvocation.attempt,
  maxAttempts: witInvocation.maxAttempts,
  now: () => new Timestamp(witInvocation.now()),
  remaining: () => Number(witInvocation.remaining()),
  traceparent: () => witInvocation.traceparent() ?? undefined,

  log: (level, line) => witLog(level, "", line),
};

function messageOf({ id, subject, headers, body, origin }) {
  return new Message({
    id,
    subject,
    headers,
    body,
    origin: origin && {
      stream: origin.stream,
      sequence: numberOrBigInt(origin.sequence),
      storedAt: new Timestamp(origin.storedAt),
    },
  });
}

function failureOf(failure) {
  let kind = { tag: "retry" };
  if (failure instanceof Reject) kind = { tag: "reject" };
  if (failure instanceof RetryAfter) kind = { tag: "retry-after", val: BigInt(failure.delay) };
  return {
    kind,
    code: failure.code == null ? undefined : String(failure.code).toWellFormed(),
    message: failure.message.toWellFormed(),
  };
}

/** Ends the instance by a trap. The dead letter has the exception's text from this output. */
function trap(error) {
  console.error(`Uncaught ${describe(error)}`);
  // The bindings return every exception to the host as a failure, except one of their own.
  throw {
    payload: {
      get kind() {
        throw "the exception above ended the instance";
      },
    },
  };
}

/** The export of the interface `handler`. */
export function exportHandler(handle) {
  check(handle, "handler");
  return {
    async handle(given) {
      begin();
      try {
        await handle(messageOf(given));
      } catch (error) {
        if (error instanceof Failure) throw { payload: failureOf(error) };
        trap(error);
      } finally {
        clearTimers();
      }
    },
  };
}

/** The export of the interface `batch-handler`. */
export function exportBatchHandler(handle) {
  check(handle, "batchHandler");
  return {
    async handleBatch(given) {
      begin();
      try {
        const results = (await handle(given.map(messageOf))) ?? given.map(() => undefined);
        return results.map((failure) =>
          failure == null ? { tag: "ok", val: undefined } : { tag: "err", val: failureOf(failure) });
      } catch (error) {
        console.error(`Uncaught ${describe(error)}`);
        throw "the exception above ended the instance";
      } finally {
        clearTimers();
      }
    },
  };
}

function check(handle, kind) {
  if (kindOf(handle) === kind) return;
  const other = kindOf(handle);
  throw new TypeError(
    other
      ? `the default export is made with ${other}(...), but this world needs ${kind}(...)`
      : `the module has no default export that is made with ${kind}(...)`,
  );
}

// Timers

/** The running timers. One that the handler left must not run during the next message. */
const timers = new Set();

function clearTimers() {
  for (const timer of timers) clearTimeout(timer);
  timers.clear();
}

function countTimers() {
  const { setTimeout, setInterval, clearTimeout, clearInterval } = globalThis;
  globalThis.setTimeout = (run, delay, ...rest) => {
    const timer = setTimeout((...given) => {
      timers.delete(timer);
      run(...given);
    }, delay, ...rest);
    timers.add(timer);
    return timer;
  };
  globalThis.setInterval = (run, delay, ...rest) => {
    const timer = setInterval(run, delay, ...rest);
    timers.add(timer);
    return timer;
  };
  const forget = (clear) => (timer) => {
    timers.delete(timer);
    clear(timer);
  };
  globalThis.clearTimeout = forget(clearTimeout);
  globalThis.clearInterval = forget(clearInterval);
}

// Text

/**
 * Whether the next call of `TextDecoder.decode` is one of the bindings. Their decoder drops a byte
 * order mark at the beginning of each text that the host passes: an id, a header, an SQL value.
 */
let expectsBindings = false;
let decoderOfBindings;

function keepByteOrderMarks() {
  const { decode: decodeText } = TextDecoder.prototype;
  const exact = new TextDecoder("utf-8", { ignoreBOM: true });
  TextDecoder.prototype.decode = function decode(bytes, options) {
    if (expectsBindings) {
      expectsBindings = false;
      decoderOfBindings = this;
    }
    const decoder = this === decoderOfBindings ? exact : this;
    return decodeText.call(decoder, bytes, options);
  };
}

/** The bindings have decoded the message. */
function begin() {
  expectsBindings = false;
}

// Network

/** Replaces the functions for HTTP, which would trap without an explanation. */
function removeNetwork() {
  for (const name of ["Headers", "Request", "Response"]) delete globalThis[name];
  globalThis.fetch = () => {
    throw new Error("fetch is not available: a handler has no network access; send a message");
  };
}

countTimers();
keepByteOrderMarks();
removeNetwork();
findBackendWith(() => (isInitialized ? host : undefined));

let isInitialized = false;

/** Ends the initialization of the component, which the build runs once. */
export function start() {
  isInitialized = true;
  expectsBindings = true;
  globalThis[Symbol.for("oncely.allow")]?.();
}
