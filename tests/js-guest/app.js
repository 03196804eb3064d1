/**
 * The behaviours of the conformance suite in JavaScript; `tests/guests` has them in Rust.
 *
 * The behaviour is in the header `do`. Several names, separated by commas, run in sequence. The body
 * may hold their options as JSON.
 */

import { Reject, Retry, RetryAfter, handler, invocation, outbox, sql, state } from "oncely";

export default handler(async (message) => {
  for (const behaviour of (message.header("do") ?? "").split(",")) {
    await BEHAVIOURS[behaviour.trim()](message);
  }
});

function options(message) {
  return message.body.length ? message.json() : {};
}

function insert(message) {
  const given = { from: "a", to: "b", delta: 1, n: 1, subject: "out.effect", ...options(message) };
  const nonce = nonceOf();
  sql.execute(
    "insert into effect (event_id, account, delta, attempt_nonce) values ($1, $2, $3, $6), ($1, $4, $5, $6)",
    message.id,
    given.from,
    -given.delta,
    given.to,
    given.delta,
    nonce,
  );
  for (let ordinal = 0; ordinal < given.n; ordinal += 1) {
    outbox.send(given.subject, { event_id: message.id, ordinal });
  }
}

function defer(message) {
  for (const statement of options(message).statements) {
    sql.defer(statement.sql, ...statement.params);
  }
}

/** Sixteen random bytes. An instance that begins with a copied generator repeats them. */
function nonceOf() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function emit(message) {
  const given = options(message);
  outbox.send(given.subject ?? "out.x", "0", {
    orderingKey: given.ordering_key,
    delay: given.delay_ms,
  });
}

function echo(message) {
  const headers = message.headers.filter(([name]) => !/^(Nats|Oncely)-/.test(name));
  outbox.send("out.echo", message.body, { headers });
}

async function fail_until(message) {
  const given = options(message);
  const attempt = invocation.attempt();
  if (attempt >= (given.attempt ?? 2)) return;
  await new Promise((resolve) => setTimeout(resolve, 1));
  const text = `requested failure of attempt ${attempt}`;
  if (given.after_ms !== undefined) {
    throw new RetryAfter(given.after_ms, text, { code: "requested-failure" });
  }
  throw new Retry(text, { code: "requested-failure" });
}

function reject() {
  throw new Reject("requested reject", { code: "requested-reject" });
}

function panic() {
  throw new TypeError("requested panic");
}

function state_counter() {
  const value = Number(state.get("counter")?.text() ?? 0) + 1;
  const version = state.set("counter", String(value));
  outbox.send("out.state", { value, version }, { orderingKey: "counter" });
}

function state_cas(message) {
  const given = { key: "cas", expected: null, value: "x", ...options(message) };
  try {
    const version = state.compareAndSet(given.key, given.expected, given.value);
    outbox.send("out.state", { key: given.key, version });
  } catch (error) {
    if (!(error instanceof state.VersionMismatch)) throw error;
    throw new Reject(String(error), { code: "version-mismatch" });
  }
}

function sql_values(message) {
  const given = options(message);
  const row = sql.queryOne(given.select);
  const [texts] = sql.query(given.as_text, ...Object.values(row));
  outbox.send("out.values", texts);
}

const BEHAVIOURS = {
  insert,
  defer,
  emit,
  echo,
  fail_until,
  reject,
  panic,
  state_counter,
  state_cas,
  sql_values,
};
