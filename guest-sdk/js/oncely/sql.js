/** The worker's own tables, in the same transaction. */

import { backend } from "./backend.js";

export class SqlError extends Error {
  constructor(reason, message, { code } = {}) {
    super(`${reason}: ${message}`);
    this.reason = reason;
    this.code = code;
  }

  get name() {
    return this.constructor.name;
  }
}

export class ConstraintViolation extends SqlError {
  constructor(message, { code, constraint } = {}) {
    super("constraint-violation", message, { code });
    this.constraint = constraint;
  }
}

export class Conflict extends SqlError {
  constructor(message, { code } = {}) {
    super("conflict", message, { code });
  }
}

export function query(statement, ...params) {
  return backend().query(statement, params);
}

export function queryOne(statement, ...params) {
  return query(statement, ...params)[0];
}

export function execute(statement, ...params) {
  return backend().execute(statement, params);
}

export function defer(statement, ...params) {
  backend().defer(statement, params);
}

export function dialect() {
  return backend().dialect();
}
