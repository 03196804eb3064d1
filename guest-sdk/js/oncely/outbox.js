/** Messages that are published after the transaction has committed, never before. */

import { backend } from "./backend.js";
import { milliseconds } from "./errors.js";
import { bytesOf, encodeJson, isBytes } from "./values.js";

export class OutboxError extends Error {
  constructor(reason, message) {
    super(`${reason}: ${message}`);
    this.reason = reason;
  }

  get name() {
    return this.constructor.name;
  }
}

export function send(subject, body, { headers = [], id, orderingKey, delay, causedBy } = {}) {
  const pairs = Symbol.iterator in headers ? [...headers] : Object.entries(headers);
  return backend().send({
    subject,
    headers: pairs,
    body: encodeBody(body),
    id: id ?? undefined,
    orderingKey: orderingKey ?? undefined,
    delay: delay == null ? undefined : milliseconds(delay, "delay"),
    causedBy: causedBy ?? undefined,
  });
}

/** Bytes and strings as they are, everything else as JSON. */
export function encodeBody(body) {
  if (body === undefined) return new Uint8Array();
  return bytesOf(typeof body === "string" || isBytes(body) ? body : encodeJson(body));
}
