/** Accepts orders: stores each one, and sends a message about it. */

import { Reject, handler, log, outbox, sql } from "oncely";

/** The body of a message on `{{name}}.new`. */
interface Order {
  id: string;
  cents: number;
}

/** The effects of this function are committed together, once, when it returns. */
export default handler((message) => {
  const order = message.json(parseOrder);
  if (order.cents <= 0) {
    throw new Reject("an order needs a positive amount", { code: "malformed" });
  }
  const statement = "insert into orders (id, cents) values ($1, $2) on conflict do nothing";
  if (sql.execute(statement, order.id, order.cents) === 0) {
    log.info(`order ${order.id} came in another message before`);
    return;
  }
  outbox.send("{{name}}.accepted", { id: order.id });
  log.info(`accepted order ${order.id}`);
});

/** Checks a body. An error rejects the message. */
function parseOrder(value: unknown): Order {
  const { id, cents } = value as Partial<Order>;
  if (typeof id !== "string" || typeof cents !== "number") {
    throw new TypeError("an order has an id and an amount in cents");
  }
  return { id, cents };
}
