/** Keyed values of this worker, in the same transaction. */

type Bytes = string | ArrayBuffer | ArrayBufferView;

/** A value with its version, which grows with each change of the key. */
export class Entry {
  constructor(value: Uint8Array, version: number);
  readonly value: Uint8Array;
  readonly version: number;
  /** The value as UTF-8. */
  text(): string;
  /** The value as JSON. */
  json<T = unknown>(): T;
}

/** A refused operation. */
export class StateError extends Error {
  constructor(reason: string, message: string);
  /** `invalid-key`, `too-large`, `version-mismatch`, `transaction-failed` or `other`. */
  readonly reason: string;
}

/** `compareAndSet` found another version; `current` is undefined if the key does not exist. */
export class VersionMismatch extends StateError {
  constructor(current: number | undefined);
  readonly current: number | undefined;
}

/** The value under a key; undefined if the key does not exist. */
export function get(key: string): Entry | undefined;

/** Sets a value and returns its new version. A string is stored as UTF-8. */
export function set(key: string, value: Bytes): number;

/** Deletes a key. Returns false if it did not exist. */
declare function delete_(key: string): boolean;
export { delete_ as delete };

/** Sets a value only if the key still has the expected version. `null` expects a missing key. */
export function compareAndSet(
  key: string,
  expected: number | null | undefined,
  value: Bytes,
): number;
