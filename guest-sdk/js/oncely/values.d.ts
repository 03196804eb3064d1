/** An exact decimal, as its text. */
export class Decimal {
  /** Text such as `12.50`, or a number without loss of its digits. */
  constructor(value: string | number | bigint | Decimal);
  toString(): string;
  toJSON(): string;
}

/** A UUID, as its text. */
export class Uuid {
  constructor(text: string);
  toString(): string;
  toJSON(): string;
}

/** A date such as `2026-01-31`, as its text. */
export class PlainDate {
  constructor(text: string);
  toString(): string;
  toJSON(): string;
}

/** A time of day such as `13:05:59.25`, as its text. */
export class PlainTime {
  constructor(text: string);
  toString(): string;
  toJSON(): string;
}

/** JSON from or for the database. It keeps the digits of large numbers. */
export class Json {
  constructor(value: unknown);
  /** JSON that is text already. */
  static fromText(text: string): Json;
  /** The value, parsed anew on each access. */
  readonly value: any;
  /** The text. */
  toString(): string;
  toJSON(): unknown;
}

/** A point in time with microseconds, in UTC. A `Date` has milliseconds. */
export class Timestamp {
  /**
   * Microseconds since the Unix epoch as a `bigint`, milliseconds as a `number`, text with a time
   * zone, or now.
   */
  constructor(value?: bigint | number | string | Date | Timestamp);
  /** Microseconds since the Unix epoch. */
  readonly microseconds: bigint;
  /** Milliseconds since the Unix epoch, with a fraction. */
  getTime(): number;
  valueOf(): number;
  /** The time without its microseconds. */
  toDate(): Date;
  /** Text such as `2026-01-31T13:05:59.123456Z`. */
  toString(): string;
  toJSON(): string;
}

/** A value of a column. */
export type Value =
  | null
  | boolean
  | number
  | bigint
  | string
  | Uint8Array
  | Decimal
  | Uuid
  | Json
  | Timestamp
  | PlainDate
  | PlainTime;

/** A parameter of a statement. An array or a plain object is JSON. */
export type Parameter = Value | Date | ArrayBuffer | ArrayBufferView | readonly unknown[] | object;
