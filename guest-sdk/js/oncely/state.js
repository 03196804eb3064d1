/** Keyed values of this worker, in the same transaction. */

import { backend } from "./backend.js";
import { bytesOf } from "./values.js";

export class StateError extends Error {
  constructor(reason, message) {
    super(`${reason}: ${message}`);
    this.reason = reason;
  }

  get name() {
    return this.constructor.name;
  }
}

export class VersionMismatch extends StateError {
  constructor(current) {
    super("version-mismatch", current === undefined ? "the key does not exist" : `the key has version ${current}`);
    this.current = current;
  }
}

export class Entry {
  constructor(value, version) {
    this.value = value;
    this.version = version;
  }

  text() {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.value);
  }

  json() {
    return JSON.parse(this.text());
  }
}

export function get(key) {
  return backend().stateGet(key);
}

export function set(key, value) {
  return backend().stateSet(key, bytesOf(value));
}

function delete_(key) {
  return backend().stateDelete(key);
}

export { delete_ as delete };

export function compareAndSet(key, expected, value) {
  return backend().stateCompareAndSet(key, expected ?? undefined, bytesOf(value));
}
