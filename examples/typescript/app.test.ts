/** Tests of the handler without WebAssembly: `npm test`. */

import assert from "node:assert/strict";
import { test } from "node:test";

import * as testing from "oncely/testing";

import handle from "./app.ts";

test("greetings are counted by name", async () => {
  const host = testing.host();
  for (const name of ["Ada", "Bob", "Ada"]) {
    await host.deliver(handle, { name });
  }
  assert.deepEqual(host.outputs.map((output) => output.json().times), [1, 1, 2]);
});

test("a body without a name is rejected", async () => {
  const host = testing.host();
  await assert.rejects(host.deliver(handle, { nom: "Ada" }), { code: "malformed" });
  assert.deepEqual(host.outputs, []);
});
