/**
 * The worker's own tables, in the same transaction. Placeholders are `$1`, `$2`, ...
 *
 * An error from the database fails the whole message, even if it is caught. For an expected conflict,
 * use a statement that does not fail, such as `insert ... on conflict do nothing`, and check the
 * number of rows.
 */

import type { Parameter, Value } from "./values.js";

/** A failed statement. */
export class SqlError extends Error {
  constructor(reason: string, message: string, options?: { code?: string | undefined });
  /**
   * `constraint-violation`, `conflict`, `query-failed`, `not-allowed`, `invalid-parameter`,
   * `unsupported-type`, `too-large`, `timeout`, `transaction-failed` or `other`.
   */
  readonly reason: string;
  /** The SQLSTATE on PostgreSQL, the extended result code on SQLite. */
  readonly code: string | undefined;
}

/** A violated constraint; `constraint` is its name, where the database has one. */
export class ConstraintViolation extends SqlError {
  constructor(
    message: string,
    options?: { code?: string | undefined; constraint?: string | undefined },
  );
  readonly constraint: string | undefined;
}

/** A conflict with another transaction. The host runs the message again; no attempt is spent. */
export class Conflict extends SqlError {
  constructor(message: string, options?: { code?: string | undefined });
}

/** Runs a statement and returns its rows by column. The type of a row is not checked. */
export function query<Row = Record<string, Value>>(statement: string, ...params: Parameter[]): Row[];

/** The first row of a query; undefined if there is none. */
export function queryOne<Row = Record<string, Value>>(
  statement: string,
  ...params: Parameter[]
): Row | undefined;

/** Runs a statement and returns the number of changed rows. */
export function execute(statement: string, ...params: Parameter[]): number;

/**
 * Runs a statement later, without a result: before the next `query` or `execute`, and in any case
 * before the commit. The deferred statements of many messages reach the database together. An error
 * from the database fails the message, and its next statement throws it.
 */
export function defer(statement: string, ...params: Parameter[]): void;

/** The database of the worker. */
export function dialect(): "postgres" | "sqlite";
