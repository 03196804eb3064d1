/** Messages that are published after the transaction has committed, never before. */

/** A refused message. The effects of the handler are rolled back, even if it is caught. */
export class OutboxError extends Error {
  constructor(reason: string, message: string);
  /**
   * `invalid-subject`, `invalid-header`, `invalid-id`, `not-granted`, `too-large`, `too-many` or
   * `other`.
   */
  readonly reason: string;
}

export interface SendOptions {
  /** Names and values. Pairs may repeat a name. */
  headers?: Record<string, string> | Iterable<readonly [string, string]>;
  /** The id of the message: `{worker}:{event id}:{ordinal}` by default. */
  id?: string | null | undefined;
  /** Messages with the same key are published in commit order. */
  orderingKey?: string | null | undefined;
  /** How long after the commit to publish, in milliseconds. */
  delay?: number | null | undefined;
  /** In a batch handler: the id of the message that caused this one. */
  causedBy?: string | null | undefined;
}

/**
 * Adds a message to the outbox and returns its id.
 *
 * Bytes and strings are the body as it is, everything else becomes JSON. A `bigint` keeps its digits.
 */
export function send(subject: string, body?: unknown, options?: SendOptions): string;
