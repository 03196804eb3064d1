/** Log lines of the host. */

import { backend } from "./backend.js";
import { describe } from "./describe.js";

export function debug(...parts) {
  backend().log("debug", line(parts));
}

export function info(...parts) {
  backend().log("info", line(parts));
}

export function warn(...parts) {
  backend().log("warn", line(parts));
}

export function error(...parts) {
  backend().log("error", line(parts));
}

function line(parts) {
  return parts.map((part) => (typeof part === "string" ? part : describe(part))).join(" ");
}
