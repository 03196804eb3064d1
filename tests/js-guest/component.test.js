/** Tests of the part of the package `oncely` that runs in a component, with functions as the host. */

import assert from "node:assert/strict";
import { registerHooks } from "node:module";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

const INTERFACES = {
  "oncely:worker/cache@0.1.0": ["get", "put", "invalidate"],
  "oncely:worker/invocation@0.1.0": [
    "id", "worker", "version", "attempt", "maxAttempts", "now", "remaining", "traceparent",
  ],
  "oncely:worker/outbox@0.1.0": ["send"],
  "oncely:worker/sql@0.1.0": ["query", "execute", "getDialect"],
  "oncely:worker/state@0.1.0": ["get", "set", "compareAndSet"],
  "wasi:config/store@0.2.0-rc.1": ["get"],
  "wasi:logging/logging@0.1.0-draft": ["log"],
};

/** The functions of the host, by interface and name. */
const calls = (globalThis.calls = {});

registerHooks({
  resolve(specifier, context, next) {
    const names = INTERFACES[specifier];
    if (!names) return next(specifier, context);
    const functions = names.map((name) =>
      `export const ${name} = (...given) => globalThis.calls[${JSON.stringify(`${specifier} ${name}`)}](...given);`);
    const rest = specifier.includes("state") ? 'const no = () => false; export { no as "delete" };' : "";
    return { url: `data:text/javascript,${encodeURIComponent(functions.join("") + rest)}`, shortCircuit: true };
  },
});

/** The decoder of the bindings, which exists before the modules of a component. */
const bindings = new TextDecoder();

const { exportBatchHandler, exportHandler, start } = await import("../../guest-sdk/js/oncely/component.js");
const { Reject, Retry, RetryAfter, batchHandler, handler, sql } = await import("../../guest-sdk/js/oncely/index.js");

const message = { id: "1", subject: "in.x", headers: [], body: new Uint8Array(), origin: undefined };

/** The payload with which a handler fails. */
async function payloadOf(handle) {
  try {
    await exportHandler(handler(handle)).handle(message);
  } catch (error) {
    return error.payload;
  }
  return undefined;
}

test("the text of the host keeps a byte order mark", () => {
  start();
  const marked = new Uint8Array([0xef, 0xbb, 0xbf, 0x61]);
  assert.equal(bindings.decode(marked), "\ufeffa");
  assert.equal(new TextDecoder().decode(marked), "a");
  assert.equal(bindings.decode(marked), "\ufeffa");
});

test("each failure has its kind", async () => {
  const kinds = [
    [new Reject("no", { code: "empty" }), { kind: { tag: "reject" }, code: "empty", message: "no" }],
    [new Retry("no"), { kind: { tag: "retry" }, code: undefined, message: "no" }],
    [new RetryAfter(1.6, "no"), { kind: { tag: "retry-after", val: 2n }, code: undefined, message: "no" }],
  ];
  for (const [failure, expected] of kinds) {
    assert.deepEqual(await payloadOf(() => { throw failure; }), expected);
    assert.deepEqual(await payloadOf(() => Promise.reject(failure)), expected);
  }
  assert.equal(await payloadOf(async () => {}), undefined);
});

test("every other exception is printed and ends the instance", async (t) => {
  const printed = t.mock.method(console, "error", () => {});
  for (const thrown of [new TypeError("no table"), "no table", undefined, { no: "table" }]) {
    const payload = await payloadOf(() => { throw thrown; });
    assert.throws(() => payload.kind);
  }
  const lines = printed.mock.calls.map((call) => call.arguments[0].split("\n")[0]);
  assert.deepEqual(lines, [
    "Uncaught TypeError: no table", "Uncaught no table", "Uncaught undefined", 'Uncaught {"no":"table"}',
  ]);
});

test("a timer ends with the message that started it", async () => {
  const ran = [];
  await payloadOf(() => {
    setTimeout(() => ran.push("timeout"), 1);
    setInterval(() => ran.push("interval"), 1);
  });
  await sleep(20);
  assert.deepEqual(ran, []);
  await payloadOf(() => new Promise((resolve) => setTimeout(resolve, 1, ran.push("awaited"))));
  assert.deepEqual(ran, ["awaited"]);
});

test("errors of the database have their classes", async () => {
  const detail = { code: "23505", message: "exists", constraint: "orders_pkey" };
  calls["oncely:worker/sql@0.1.0 query"] = () => {
    throw { payload: { tag: "constraint-violation", val: detail } };
  };
  await exportHandler(handler(() => {
    assert.throws(() => sql.query("select 1"), (error) =>
      error instanceof sql.ConstraintViolation && error.constraint === "orders_pkey" && error.code === "23505");
  })).handle(message);
});

test("a batch has a result for each message", async () => {
  const run = (handle) => exportBatchHandler(batchHandler(handle)).handleBatch([message, message]);
  const ok = { tag: "ok", val: undefined };
  assert.deepEqual(await run(() => {}), [ok, ok]);
  const [first, second] = await run(async () => [null, new Reject("no")]);
  assert.deepEqual(first, ok);
  assert.deepEqual(second, { tag: "err", val: { kind: { tag: "reject" }, code: undefined, message: "no" } });
  assert.throws(() => exportBatchHandler(handler(() => {})), /made with handler\(\.\.\.\), but this world needs batchHandler/);
});
