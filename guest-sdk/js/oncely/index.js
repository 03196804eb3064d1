/** Write message handlers for Oncely in JavaScript and TypeScript. `index.d.ts` has the types. */

export * as cache from "./cache.js";
export * as config from "./config.js";
export * as invocation from "./invocation.js";
export * as log from "./log.js";
export * as outbox from "./outbox.js";
export * as sql from "./sql.js";
export * as state from "./state.js";
export { Failure, Reject, Retry, RetryAfter } from "./errors.js";
export { batchHandler, handler } from "./handler.js";
export { Message } from "./message.js";
export { Decimal, Json, PlainDate, PlainTime, Timestamp, Uuid } from "./values.js";
