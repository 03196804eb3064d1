/** The functions that mark a function as the handler of a component. */

import { Failure } from "./errors.js";

const KIND = Symbol.for("oncely.handler");

export function handler(handle) {
  check(handle, "handler");
  return mark("handler", handle, async (message) => {
    const result = await handle(message);
    if (result instanceof Failure) {
      throw new TypeError(`the handler returned a ${result.name}: throw it instead`);
    }
  });
}

export function batchHandler(handle) {
  check(handle, "batchHandler");
  return mark("batchHandler", handle, async (messages) => handle(messages));
}

/** The name of the function that marked a handler. */
export function kindOf(handle) {
  return typeof handle === "function" ? handle[KIND] : undefined;
}

function check(handle, name) {
  if (typeof handle !== "function") {
    throw new TypeError(`${name}(...) takes a function, not ${typeof handle}`);
  }
}

function mark(kind, handle, marked) {
  Object.defineProperty(marked, KIND, { value: kind });
  return Object.defineProperty(marked, "name", { value: handle.name || kind });
}
