/**
 * Lets Node.js import modules in TypeScript: `node --import oncely/typescript --test app.test.ts`.
 *
 * The types are removed, not checked.
 */

import * as module from "node:module";
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { isMainThread } from "node:worker_threads";

import { importPackage } from "./packages.js";

const esbuild = await importPackage("esbuild");

if (module.registerHooks) {
  module.registerHooks({
    load: (url, context, next) =>
      isTypeScript(url)
        ? moduleOf(esbuild.transformSync(readFileSync(fileURLToPath(url), "utf8"), optionsFor(url)))
        : next(url, context),
  });
} else if (isMainThread) {
  // Older versions run hooks in a thread of their own, which imports this file.
  module.register(import.meta.url);
}

export async function load(url, context, next) {
  if (!isTypeScript(url)) return next(url, context);
  return moduleOf(await esbuild.transform(await readFile(fileURLToPath(url), "utf8"), optionsFor(url)));
}

function isTypeScript(url) {
  return url.startsWith("file:") && /\.m?ts$/.test(url);
}

function optionsFor(url) {
  return { loader: "ts", format: "esm", sourcefile: fileURLToPath(url), sourcemap: "inline" };
}

function moduleOf({ code }) {
  return { format: "module", source: code, shortCircuit: true };
}
