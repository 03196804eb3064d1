/**
 * Run handlers without WebAssembly, with SQLite in memory.
 *
 * ```ts
 * import { test } from "node:test";
 * import { equal } from "node:assert/strict";
 * import * as testing from "oncely/testing";
 * import handle from "./app.ts";
 *
 * test("an order is accepted", async () => {
 *   const host = testing.host({ migrations: "migrations" });
 *   await host.deliver(handle, { id: "o1", cents: 500 });
 *   equal(host.outputs[0]?.subject, "orders.accepted");
 * });
 * ```
 *
 * The rules of the host on statements, subjects and limits do not apply here. `oncely dev` shows them.
 * SQL needs `node:sqlite`, which Node.js has from 22.13.
 */

import type { BatchResults, Message, Origin } from "./index.js";
import type { Entry } from "./state.js";
import type { Parameter, Timestamp, Value } from "./values.js";

/** A message that the handler sent. */
export class Output {
  readonly id: string;
  readonly subject: string;
  readonly headers: readonly (readonly [string, string])[];
  readonly body: Uint8Array;
  readonly orderingKey: string | undefined;
  /** In milliseconds. */
  readonly delay: number | undefined;
  /** The body as UTF-8. */
  text(): string;
  /** The body as JSON. */
  json<T = any>(): T;
}

export interface DeliverOptions {
  id?: string;
  subject?: string;
  headers?: Record<string, string> | Iterable<readonly [string, string]>;
  origin?: Origin;
}

/** A host for tests. Its fields may be read and set between deliveries. */
export class Host {
  state: Map<string, Entry>;
  cache: Map<string, Uint8Array>;
  config: Record<string, string>;
  /** The messages that were sent by deliveries that took effect. */
  outputs: Output[];
  logs: { level: string; line: string }[];
  /** The time of `invocation.now()`; the time of this machine if undefined. */
  now: Date | Timestamp | undefined;
  attempt: number;
  maxAttempts: number;

  /** Delivers one message. An exception of the handler rolls its effects back and is thrown. */
  deliver(
    handle: (message: Message) => Promise<void>,
    body?: unknown,
    options?: DeliverOptions,
  ): Promise<void>;

  /** Delivers a batch. The first failure rolls the effects of all messages back and is thrown. */
  deliverBatch(
    handle: (messages: Message[]) => Promise<BatchResults>,
    bodies: readonly unknown[],
  ): Promise<void>;

  /** The rows of a query, for assertions. */
  rows<Row = Record<string, Value>>(statement: string, ...params: Parameter[]): Row[];

  /** Closes the database. */
  close(): void;
}

/** A fresh host. `migrations` is the worker's folder of SQL files, which run in order. */
export function host(options?: { migrations?: string; config?: Record<string, string> }): Host;
