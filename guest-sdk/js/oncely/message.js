/** Messages. */

import { Reject } from "./errors.js";

export class Message {
  constructor({ id, subject, body, headers = [], origin }) {
    this.id = id;
    this.subject = subject;
    this.headers = headers;
    this.body = body;
    this.origin = origin;
  }

  header(name) {
    const wanted = name.toLowerCase();
    return this.headers.find(([own]) => own.toLowerCase() === wanted)?.[1];
  }

  headerValues(name) {
    const wanted = name.toLowerCase();
    return this.headers.filter(([own]) => own.toLowerCase() === wanted).map(([, value]) => value);
  }

  text() {
    return malformed("the body is not UTF-8", () =>
      new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.body));
  }

  json(parse) {
    const text = this.text();
    const value = malformed("the body is not JSON", () => JSON.parse(text));
    return parse ? malformed("the body does not fit", () => parse(value)) : value;
  }
}

function malformed(what, run) {
  try {
    return run();
  } catch (error) {
    if (error instanceof Reject) throw error;
    const why = error instanceof Error ? error.message : String(error);
    throw new Reject(`${what}: ${why}`, { code: "malformed", cause: error });
  }
}
