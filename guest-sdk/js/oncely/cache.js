/** A cache for values that are cheap to recompute. */

import { backend } from "./backend.js";
import { milliseconds } from "./errors.js";
import { bytesOf } from "./values.js";

export class CacheError extends Error {
  constructor(reason, message) {
    super(`${reason}: ${message}`);
    this.reason = reason;
  }

  get name() {
    return this.constructor.name;
  }
}

export function get(key) {
  return backend().cacheGet(key);
}

export function put(key, value, { ttl, tags = [] }) {
  backend().cachePut(key, bytesOf(value), milliseconds(ttl, "ttl"), [...tags]);
}

export function invalidate(...tags) {
  backend().cacheInvalidate(tags);
}
