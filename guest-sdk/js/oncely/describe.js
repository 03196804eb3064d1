/** Readable text for values and errors, with the positions of the sources. */

import { encodeJson } from "./values.js";

const FRAMES_MAX = 12;
const CAUSES_MAX = 5;

/** Text for a value of any type. It does not throw. */
export function describe(value) {
  if (value instanceof Error) return describeError(value);
  try {
    return typeof value === "object" && value !== null ? encodeJson(value) : String(value);
  } catch {
    return Object.prototype.toString.call(value);
  }
}

/** The name, the message, the stack and the causes of an error. */
export function describeError(error) {
  const parts = [];
  for (let next = error; next !== undefined && parts.length < CAUSES_MAX; next = next.cause) {
    if (!(next instanceof Error)) {
      parts.push(describe(next));
      break;
    }
    const frames = framesOf(next).map((frame) => `\n    at ${frame}`);
    parts.push(`${next.name}: ${next.message}${frames.join("")}`);
  }
  return parts.join("\nCaused by: ");
}

/** The frames of an error, as `function (file:line)`. */
function framesOf(error) {
  const lines = String(error.stack ?? "").split("\n");
  const frames = [];
  for (const line of lines) {
    // In a component: `function@file:line:column`. In Node.js: `    at function (file:line:column)`.
    const [, name, file, number] = /^([^@]*)@(.*):(\d+):\d+$/.exec(line) ?? [];
    if (number !== undefined) {
      const place = originalPlace(file, Number(number));
      if (place) frames.push(name ? `${name} (${place})` : place);
    } else if (line.startsWith("    at ")) {
      frames.push(line.slice(7));
    }
  }
  return frames.slice(0, FRAMES_MAX);
}

/**
 * The file and line of the sources for a line of the bundle; undefined outside of the bundle. The
 * build adds the table: the names of the sources, and two numbers for each line of the bundle.
 */
function originalPlace(file, line) {
  const table = globalThis[Symbol.for("oncely.lines")];
  if (!table) return `${file}:${line}`;
  if (!file.endsWith(table.file)) return undefined;
  const source = table.sources[table.lines[2 * line]];
  return source === undefined ? undefined : `${source}:${table.lines[2 * line + 1]}`;
}
