/** The failures of a handler. */

export class Failure extends Error {
  constructor(message, { code, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.code = code;
  }

  get name() {
    return this.constructor.name;
  }
}

export class Retry extends Failure {}

export class RetryAfter extends Failure {
  constructor(delay, message, options) {
    super(message, options);
    this.delay = milliseconds(delay, "delay");
  }
}

export class Reject extends Failure {}

/** A duration in whole milliseconds. */
export function milliseconds(duration, name) {
  if (typeof duration !== "number" || !Number.isFinite(duration)) {
    throw new TypeError(`${name} is a number of milliseconds, not ${String(duration)}`);
  }
  return Math.max(0, Math.round(duration));
}
