/**
 * Write message handlers for Oncely in JavaScript and TypeScript.
 *
 * ```ts
 * import { handler, outbox, sql } from "oncely";
 *
 * interface Order { id: string; cents: number }
 *
 * export default handler((message) => {
 *   const order = message.json<Order>();
 *   sql.execute("insert into orders (id, cents) values ($1, $2)", order.id, order.cents);
 *   outbox.send("orders.accepted", { id: order.id });
 * });
 * ```
 *
 * The effects of `sql`, `state` and `outbox` belong to one database transaction. Returning commits
 * them, once. An exception rolls all of them back: `Reject` makes a dead letter at once, `Retry`,
 * `RetryAfter` and every other exception lead to another attempt.
 *
 * Outside of WebAssembly the same module runs against `oncely/testing`.
 */

import type { Timestamp } from "./values.js";

export * as cache from "./cache.js";
export * as config from "./config.js";
export * as invocation from "./invocation.js";
export * as log from "./log.js";
export * as outbox from "./outbox.js";
export * as sql from "./sql.js";
export * as state from "./state.js";
export { Decimal, Json, PlainDate, PlainTime, Timestamp, Uuid } from "./values.js";
export type { Parameter, Value } from "./values.js";

export interface FailureOptions {
  /**
   * A short, stable name for this kind of failure, such as `card-declined`. Dead letters are grouped
   * by it.
   */
  code?: string | undefined;
  /** The error that caused the failure. */
  cause?: unknown;
}

/** Why a message could not be handled. The effects of the handler are rolled back. */
export class Failure extends Error {
  constructor(message: string, options?: FailureOptions);
  readonly code: string | undefined;
}

/** Retry after a backoff. After the last attempt the message becomes a dead letter. */
export class Retry extends Failure {}

/** Like `Retry`, but not before `delay` milliseconds have passed; at most 24 hours. */
export class RetryAfter extends Failure {
  constructor(delay: number, message: string, options?: FailureOptions);
  readonly delay: number;
}

/** Do not retry: the message becomes a dead letter at once. */
export class Reject extends Failure {}

/** A position on a stream. */
export interface Origin {
  readonly stream: string;
  readonly sequence: number;
  readonly storedAt: Timestamp;
}

/** One message, as stored on its stream. */
export class Message {
  constructor(fields: {
    id: string;
    subject: string;
    body: Uint8Array;
    headers?: readonly (readonly [string, string])[];
    origin?: Origin | undefined;
  });
  /** The event id, which identifies copies of the same event. */
  readonly id: string;
  readonly subject: string;
  /** Names and values, in order. A name may appear more than once. */
  readonly headers: readonly (readonly [string, string])[];
  readonly body: Uint8Array;
  readonly origin: Origin | undefined;
  /** The first value of a header, regardless of case. */
  header(name: string): string | undefined;
  /** All values of a header, in order. */
  headerValues(name: string): string[];
  /** The body as UTF-8. Rejects the message with the code `malformed` if it is not. */
  text(): string;
  /**
   * The body as JSON. Rejects the message with the code `malformed` if it is not.
   *
   * `parse` checks and converts the value, for example with a schema. An error that it throws
   * rejects the message in the same way. Without it, the type is not checked.
   */
  json<T = unknown>(parse?: (value: unknown) => T): T;
}

/** A function that handles one message. It may be asynchronous. */
export type Handle = (message: Message) => void | Promise<void>;

/** The failures of a batch: undefined if all messages took effect, else one entry for each. */
export type BatchResults = void | readonly (Failure | null | undefined)[];

/** A function that handles the messages of a batch in one call. It may be asynchronous. */
export type HandleBatch = (messages: Message[]) => BatchResults | Promise<BatchResults>;

/** Makes a function the handler of its component. The result is the module's default export. */
export function handler(handle: Handle): (message: Message) => Promise<void>;

/**
 * Makes a function the handler of its component: the messages of a batch in one call. The component
 * is built with `--world batch-worker`.
 *
 * It returns nothing if all messages took effect, or one entry for each message, in order: nothing,
 * or the `Failure` of that message. An exception fails the call as a whole.
 */
export function batchHandler(handle: HandleBatch): (messages: Message[]) => Promise<BatchResults>;
