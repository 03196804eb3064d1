/** The current delivery: its id, attempt, version and time limit. */

import type { Timestamp } from "./values.js";

/**
 * An id that is the same for every attempt at this message. Pass it to other systems as an
 * idempotency key.
 */
export function id(): string;

/** The name of the worker. */
export function worker(): string;

/** The version of the running deployment. */
export function version(): number;

/** The number of this attempt, from 1. */
export function attempt(): number;

/** The number of attempts after which the message becomes a dead letter. */
export function maxAttempts(): number;

/** The time at which this attempt began. */
export function now(): Timestamp;

/** The time that the handler has left, in milliseconds. */
export function remaining(): number;

/** The W3C trace context of the message. */
export function traceparent(): string | undefined;
