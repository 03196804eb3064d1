/** Tests of the package `oncely` for JavaScript, in Node.js. */

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  Decimal,
  Failure,
  Json,
  Message,
  PlainDate,
  PlainTime,
  Reject,
  RetryAfter,
  Timestamp,
  Uuid,
  handler,
  log,
  outbox,
  sql,
  state,
} from "../../guest-sdk/js/oncely/index.js";
import * as testing from "../../guest-sdk/js/oncely/testing.js";
import { decode, encode, encodeJson } from "../../guest-sdk/js/oncely/values.js";

test("every value has the kind and the digits of its type", () => {
  const kinds = [
    [null, ["null", undefined]],
    [true, ["boolean", true]],
    [7, ["int64", 7n]],
    [2 ** 53 - 1, ["int64", 9007199254740991n]],
    [2 ** 53, ["float64", 2 ** 53]],
    [-0, ["float64", -0]],
    [0.5, ["float64", 0.5]],
    [-(2n ** 63n), ["int64", -9223372036854775808n]],
    ["größe", ["text", "größe"]],
    [new Decimal("0.10"), ["decimal", "0.10"]],
    [new Decimal(1e21), ["decimal", "1000000000000000000000"]],
    [new Decimal(-1.5e-7), ["decimal", "-0.00000015"]],
    [new Uuid("7d444840-9dc0-11d1-b245-5ffdce74fad2"), ["uuid", "7d444840-9dc0-11d1-b245-5ffdce74fad2"]],
    [new Date(-1), ["timestamp", -1000n]],
    [new Timestamp("2026-02-28T23:59:59.123456+01:00"), ["timestamp", 1772319599123456n]],
    [new PlainDate("infinity"), ["date", "infinity"]],
    [new PlainTime("13:05"), ["time", "13:05"]],
    [[1n, "a"], ["json", '[1,"a"]']],
    [{ a: undefined, b: 2n ** 64n }, ["json", '{"b":18446744073709551616}']],
    [Json.fromText("[9007199254740993]"), ["json", "[9007199254740993]"]],
  ];
  for (const [value, expected] of kinds) assert.deepEqual(encode(value), expected);
  assert.deepEqual(encode(new Uint16Array([1])), ["bytes", new Uint8Array([1, 0])]);
  for (const refused of [undefined, 2n ** 63n, Symbol("x"), () => {}, new Map(), "\ud800"]) {
    assert.throws(() => encode(refused), { reason: "invalid-parameter" });
  }
});

test("a column has a number if it is exact as one", () => {
  assert.equal(decode("int64", 9007199254740991n), 9007199254740991);
  assert.equal(decode("int64", 9007199254740992n), 9007199254740992n);
  assert.equal(decode("int64", -9223372036854775808n), -9223372036854775808n);
  assert.equal(decode("timestamp", -1n).toString(), "1969-12-31T23:59:59.999999Z");
  assert.equal(decode("timestamp", -1n).toDate().getTime(), -1);
  assert.ok(decode("timestamp", 2n ** 63n - 1n).toString().length > 0);
});

test("JSON keeps its digits and has the form of JSON.stringify", () => {
  const value = { a: [undefined, () => {}, NaN, new Date(0), { toJSON: () => 1n }], "é\n": "\ud800" };
  const plain = { ...value, a: [undefined, () => {}, NaN, new Date(0), 1] };
  assert.equal(encodeJson(value), JSON.stringify(plain));
  const nested = { doc: Json.fromText('{"n": 9007199254740993}'), price: new Decimal("1.10") };
  assert.equal(encodeJson(nested), '{"doc":{"n": 9007199254740993},"price":"1.10"}');
  assert.equal(JSON.stringify(nested), '{"doc":{"n":9007199254740993},"price":"1.10"}');
});

test("a malformed body is rejected", () => {
  const message = (body) => new Message({ id: "1", subject: "a", body: new Uint8Array(body) });
  assert.throws(() => message([0xff]).text(), { code: "malformed" });
  assert.throws(() => message([0x7b]).json(), { code: "malformed" });
  const refuse = () => {
    throw new TypeError("no name");
  };
  assert.throws(() => message([0x31]).json(refuse), (error) =>
    error instanceof Reject && error.message === "the body does not fit: no name");
});

test("a failed delivery has no effect", async () => {
  const host = testing.host();
  const count = handler(async (message) => {
    const times = Number(state.get("times")?.text() ?? 0) + 1;
    state.set("times", String(times));
    outbox.send("out", { times }, { headers: [["Tag", "one"], ["Tag", "two"]] });
    await null;
    log.info("counted", { times });
    if (message.text() === "fail") throw new RetryAfter(5, "later", { code: "closed" });
    if (message.text() === "bad") {
      try {
        sql.execute("select");
      } catch {
        // The delivery fails all the same.
      }
    }
    if (message.text() === "returned") return new Reject("no");
  });
  await host.deliver(count, "");
  await assert.rejects(host.deliver(count, "fail"), { name: "RetryAfter", code: "closed", delay: 5 });
  await assert.rejects(host.deliver(count, "bad"), { reason: "query-failed" });
  await assert.rejects(host.deliver(count, "returned"), /throw it instead/);
  assert.ok(new Reject("x") instanceof Failure);
  assert.equal(host.state.get("times").text(), "1");
  assert.deepEqual(host.outputs.map((output) => output.json()), [{ times: 1 }]);
  assert.deepEqual(host.outputs[0].headers, [["Tag", "one"], ["Tag", "two"]]);
});

test("a parameter is bound by its number, and `$1` in a text is text", async () => {
  const host = testing.host();
  await host.deliver(handler(() => {
    const row = sql.queryOne("select $2 as b, '$1' as text, $1 as a, $1 as again", 2n ** 53n + 1n, "x");
    outbox.send("out", row);
  }));
  assert.equal(
    host.outputs[0].text(),
    '{"b":"x","text":"$1","a":9007199254740993,"again":9007199254740993}',
  );
});

test("a promise that the handler does not await cannot act after it", async () => {
  const host = testing.host();
  let later;
  await host.deliver(handler(() => {
    later = new Promise((resolve) => setTimeout(resolve, 5)).then(() => outbox.send("late"));
  }));
  await assert.rejects(later, /await each promise/);
  assert.deepEqual(host.outputs, []);
});
