{
  // The build runs the modules once, and all instances start from the result. A random number or a
  // time from then would be the same for every message.
  const refuse = (what) => {
    throw new Error(`${what} is not available at the top level: every message would get the same value; call it in the handler`);
  };
  const isOfPackage = () => {
    const table = globalThis[Symbol.for("oncely.lines")];
    const [, line] = /bundle\.js:(\d+):\d+$/m.exec(new Error().stack.split("\n").slice(2).join("\n")) ?? [];
    return String(table.sources[table.lines[2 * line]]).includes("node_modules/");
  };
  const restore = [];
  const replace = (object, name, value) => {
    const before = Object.getOwnPropertyDescriptor(object, name);
    Object.defineProperty(object, name, { value, configurable: true, writable: true });
    restore.push(() => (before ? Object.defineProperty(object, name, before) : delete object[name]));
  };
  for (const [object, label, names] of [
    [Math, "Math", ["random"]],
    [crypto, "crypto", ["getRandomValues", "randomUUID"]],
    [performance, "performance", ["now"]],
  ]) {
    for (const name of names) replace(object, name, () => refuse(`${label}.${name}()`));
  }
  const { Date } = globalThis;
  let isAllowed = false;
  const now = () => (isAllowed || isOfPackage() ? Date.now() : refuse("Date.now()"));
  replace(globalThis, "Date", new Proxy(Date, {
    get: (target, name) => (name === "now" ? now : Reflect.get(target, name)),
    construct: (target, given, wanted) =>
      given.length || isAllowed || isOfPackage() ? Reflect.construct(target, given, wanted) : refuse("new Date()"),
    apply: (target) => (isAllowed || isOfPackage() ? target() : refuse("Date()")),
  }));
  globalThis[Symbol.for("oncely.allow")] = () => {
    isAllowed = true;
    restore.forEach((undo) => undo());
  };
}
