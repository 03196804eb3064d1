/**
 * A cache for values that are cheap to recompute. It is not part of the transaction: never base a
 * decision about money, or any other invariant, on it.
 */

/** A refused operation. The handler may continue. */
export class CacheError extends Error {
  constructor(reason: string, message: string);
  /** `invalid-key`, `invalid-tag`, `invalid-ttl`, `too-large`, `too-many` or `other`. */
  readonly reason: string;
}

/** The value under a key, if it exists and is valid. */
export function get(key: string): Uint8Array | undefined;

/** Stores a value after the commit, for at most `ttl` milliseconds. */
export function put(
  key: string,
  value: string | ArrayBuffer | ArrayBufferView,
  options: { ttl: number; tags?: Iterable<string> },
): void;

/** Drops all values of this worker that have one of these tags, on all hosts, after the commit. */
export function invalidate(...tags: string[]): void;
