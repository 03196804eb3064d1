/** A worker in TypeScript that sends greetings and counts them by name. */

import { handler, outbox, state } from "oncely";

interface Request {
  name: string;
}

export default handler((message) => {
  const { name } = message.json(parseRequest);
  const key = `greeted.${name}`;
  const times = Number(state.get(key)?.text() ?? 0) + 1;
  state.set(key, String(times));
  outbox.send("greetings.sent", { greeting: `Hello ${name}`, times });
});

/** Checks a body. An error rejects the message. */
function parseRequest(value: unknown): Request {
  const { name } = value as Partial<Request>;
  if (typeof name !== "string") throw new TypeError("name: a string is expected");
  return { name };
}
