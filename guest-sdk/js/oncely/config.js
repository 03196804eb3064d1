/** The `[worker.config]` table of the manifest. */

import { backend } from "./backend.js";

export function get(key, otherwise) {
  return backend().configGet(key) ?? otherwise;
}
