/** Tests of the handler without WebAssembly, on SQLite in memory: `npm test`. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { Reject } from "oncely";
import * as testing from "oncely/testing";

import handle from "./app.ts";

test("an order is stored and announced", async () => {
  const host = testing.host({ migrations: "migrations" });
  await host.deliver(handle, { id: "o1", cents: 500 });
  assert.deepEqual(host.rows("select id, cents from orders"), [{ id: "o1", cents: 500 }]);
  assert.equal(host.outputs[0]?.subject, "{{name}}.accepted");
  assert.deepEqual(host.outputs[0]?.json(), { id: "o1" });
});

test("an order without an amount is rejected", async () => {
  const host = testing.host({ migrations: "migrations" });
  await assert.rejects(host.deliver(handle, { id: "o1", cents: 0 }), Reject);
  assert.deepEqual(host.outputs, []);
});
