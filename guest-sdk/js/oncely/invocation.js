/** The current delivery: its id, attempt, version and time limit. */

import { backend } from "./backend.js";

export function id() {
  return backend().invocationId();
}

export function worker() {
  return backend().worker();
}

export function version() {
  return backend().version();
}

export function attempt() {
  return backend().attempt();
}

export function maxAttempts() {
  return backend().maxAttempts();
}

export function now() {
  return backend().now();
}

export function remaining() {
  return backend().remaining();
}

export function traceparent() {
  return backend().traceparent();
}
