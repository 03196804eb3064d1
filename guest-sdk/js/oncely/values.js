/** SQL values in JavaScript and as the kinds of the host's interface. */

import { SqlError } from "./sql.js";

const INT64_MIN = -(2n ** 63n);
const INT64_MAX = 2n ** 63n - 1n;

/** A value that is text, with a type of its own in SQL. */
class Tagged {
  #text;

  constructor(text) {
    this.#text = text;
  }

  toString() {
    return this.#text;
  }

  toJSON() {
    return this.#text;
  }

  [Symbol.for("nodejs.util.inspect.custom")]() {
    return `${this.constructor.name}(${this.#text})`;
  }
}

export class Decimal extends Tagged {
  constructor(value) {
    const text = typeof value === "number" || typeof value === "bigint" ? plain(value) : value;
    const isText = typeof text === "string" || text instanceof Decimal;
    // PostgreSQL has these three, too.
    if (!isText || !/^([+-]?(\d+\.?\d*|\.\d+)|NaN|-?Infinity)$/.test(String(text))) {
      throw new TypeError(`${JSON.stringify(String(value))} is not a decimal, such as "12.50"`);
    }
    super(String(text));
  }
}

/** A number without an exponent. */
function plain(number) {
  const [, sign, digits, fraction = "", exponent] =
    /^(-?)(\d+)(?:\.(\d+))?e([+-]\d+)$/.exec(String(number)) ?? [];
  if (exponent === undefined) return String(number);
  const all = digits + fraction;
  const point = digits.length + Number(exponent);
  if (point <= 0) return `${sign}0.${"0".repeat(-point)}${all}`;
  return sign + all.padEnd(point, "0");
}

export class Uuid extends Tagged {
  constructor(text) {
    if (!/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(String(text))) {
      throw new TypeError(`${JSON.stringify(String(text))} is not a UUID`);
    }
    super(String(text));
  }
}

export class PlainDate extends Tagged {
  constructor(text) {
    super(String(text));
  }
}

export class PlainTime extends Tagged {
  constructor(text) {
    super(String(text));
  }
}

export class Json {
  #text;

  constructor(value) {
    this.#text = encodeJson(value);
  }

  static fromText(text) {
    const json = new Json(null);
    json.#text = text;
    return json;
  }

  get value() {
    return JSON.parse(this.#text);
  }

  toString() {
    return this.#text;
  }

  toJSON() {
    return JSON.rawJSON ? rawJson(this.#text) : this.value;
  }

  [Symbol.for("nodejs.util.inspect.custom")]() {
    return `Json(${this.#text})`;
  }
}

export class Timestamp {
  #microseconds;

  constructor(value = Date.now()) {
    if (typeof value === "bigint") {
      this.#microseconds = value;
    } else if (value instanceof Timestamp) {
      this.#microseconds = value.microseconds;
    } else if (typeof value === "string") {
      this.#microseconds = parseTimestamp(value);
    } else {
      this.#microseconds = ofMilliseconds(Number(value));
    }
    if (this.#microseconds < INT64_MIN || this.#microseconds > INT64_MAX) {
      throw new RangeError(`${this.#microseconds} microseconds do not fit into 64 bits`);
    }
  }

  get microseconds() {
    return this.#microseconds;
  }

  getTime() {
    return Number(this.#microseconds / 1000n) + Number(this.#microseconds % 1000n) / 1000;
  }

  valueOf() {
    return this.getTime();
  }

  toDate() {
    return new Date(Number(floorOf(this.#microseconds, 1000n)));
  }

  toString() {
    const date = this.toDate();
    if (Number.isNaN(date.getTime())) return `${this.#microseconds}µs`;
    const below = String(((this.#microseconds % 1000n) + 1000n) % 1000n).padStart(3, "0");
    return date.toISOString().replace("Z", `${below}Z`);
  }

  toJSON() {
    return this.toString();
  }

  [Symbol.toPrimitive](hint) {
    return hint === "string" ? this.toString() : this.getTime();
  }

  [Symbol.for("nodejs.util.inspect.custom")]() {
    return `Timestamp(${this})`;
  }
}

function floorOf(number, divisor) {
  const below = number % divisor < 0n ? 1n : 0n;
  return number / divisor - below;
}

function ofMilliseconds(time) {
  if (!Number.isFinite(time)) throw new RangeError("the time is not valid");
  const whole = Math.floor(time);
  return BigInt(whole) * 1000n + BigInt(Math.round((time - whole) * 1000));
}

function parseTimestamp(text) {
  // `Date` keeps three digits of the second's fraction.
  const match = /^(.*:\d\d)(?:\.(\d{1,6}))?(Z|[+-]\d\d:\d\d)$/.exec(text);
  const time = match ? Date.parse(match[1] + match[3]) : NaN;
  if (Number.isNaN(time)) {
    throw new RangeError(
      `${JSON.stringify(text)} is not a time with a zone, such as "2026-01-31T13:05:59.123456Z"`,
    );
  }
  return BigInt(time) * 1000n + BigInt((match[2] ?? "").padEnd(6, "0"));
}

/** The kind of a parameter, such as `int64`, and its form in the interface. */
export function encode(value) {
  switch (typeof value) {
    case "boolean":
      return ["boolean", value];
    case "number":
      // The sign of a zero is part of a float only.
      return Number.isSafeInteger(value) && !Object.is(value, -0)
        ? ["int64", BigInt(value)]
        : ["float64", value];
    case "bigint":
      if (value < INT64_MIN || value > INT64_MAX) {
        throw invalid(`${value} does not fit into 64 bits; use a Decimal`);
      }
      return ["int64", value];
    case "string":
      return ["text", wellFormed(value)];
    case "undefined":
      throw invalid("a parameter is undefined; use null for SQL's null");
    case "object":
      return encodeObject(value);
    default:
      throw invalid(`a parameter of type ${typeof value} is not supported`);
  }
}

function encodeObject(value) {
  if (value === null) return ["null", undefined];
  if (value instanceof Decimal) return ["decimal", String(value)];
  if (value instanceof Uuid) return ["uuid", String(value)];
  if (value instanceof Timestamp) return ["timestamp", value.microseconds];
  if (value instanceof Date) return ["timestamp", ofMilliseconds(value.getTime())];
  if (value instanceof PlainDate) return ["date", String(value)];
  if (value instanceof PlainTime) return ["time", String(value)];
  if (value instanceof Json) return ["json", wellFormed(String(value))];
  if (isBytes(value)) return ["bytes", bytesOf(value)];
  const prototype = Object.getPrototypeOf(value);
  if (Array.isArray(value) || prototype === null || prototype === Object.prototype) {
    return ["json", wellFormed(encodeJson(value))];
  }
  const name = value.constructor?.name || "unknown";
  throw invalid(`a parameter of type ${name} is not supported; new Json(...) makes JSON of it`);
}

/** The value of a column, from its kind and its form in the interface. */
export function decode(kind, form) {
  switch (kind) {
    case "null":
      return null;
    case "int64":
      return numberOrBigInt(form);
    case "decimal":
      return new Decimal(form);
    case "uuid":
      return new Uuid(form);
    case "json":
      return Json.fromText(form);
    case "timestamp":
      return new Timestamp(BigInt(form));
    case "date":
      return new PlainDate(form);
    case "time":
      return new PlainTime(form);
    default:
      return form;
  }
}

/** A number if it is exact as one, else a BigInt. */
export function numberOrBigInt(integer) {
  const number = Number(integer);
  return Number.isSafeInteger(number) ? number : BigInt(integer);
}

function invalid(message) {
  return new SqlError("invalid-parameter", message);
}

function wellFormed(text) {
  if (!text.isWellFormed()) {
    throw invalid("a text has half of a surrogate pair, which is not Unicode");
  }
  return text;
}

/** Whether a value is a buffer, or a view of one. */
export function isBytes(value) {
  return ArrayBuffer.isView(value) || value instanceof ArrayBuffer;
}

/** The bytes of a buffer or a view; a string as UTF-8. */
export function bytesOf(value) {
  if (typeof value === "string") return new TextEncoder().encode(value);
  if (value instanceof Uint8Array) return value;
  if (ArrayBuffer.isView(value)) {
    return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
  }
  if (value instanceof ArrayBuffer) return new Uint8Array(value);
  throw new TypeError(`bytes or a string are expected, not ${value === null ? "null" : typeof value}`);
}

/** Text that `JSON.stringify` copies; it takes a text of one number, string, boolean or null only. */
function rawJson(text) {
  return /^\s*[[{]/.test(text) ? JSON.parse(text, rawNumber) : JSON.rawJSON(text.trim());
}

function rawNumber(key, value, context) {
  return typeof value === "number" ? JSON.rawJSON(context.source) : value;
}

/** JSON text, with the exact digits of a BigInt and of JSON from the database. */
export function encodeJson(value) {
  const text = jsonText(value, "");
  if (text === undefined) throw new TypeError(`a value of type ${typeof value} has no form in JSON`);
  return text;
}

function jsonText(value, key) {
  if (value instanceof Json) return String(value);
  if (typeof value === "bigint") return String(value);
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (typeof value.toJSON === "function") return jsonText(value.toJSON(key), key);
  if (Array.isArray(value)) {
    return `[${value.map((item, at) => jsonText(item, String(at)) ?? "null").join(",")}]`;
  }
  if (value instanceof Number || value instanceof String || value instanceof Boolean) {
    return JSON.stringify(value);
  }
  const pairs = [];
  for (const own of Object.keys(value)) {
    const text = jsonText(value[own], own);
    if (text !== undefined) pairs.push(`${JSON.stringify(own)}:${text}`);
  }
  return `{${pairs.join(",")}}`;
}
