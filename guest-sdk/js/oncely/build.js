#!/usr/bin/env node
/** Builds the component of a handler: `oncely-build app.ts -o orders.wasm`. */

import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readFile, readdir, rename, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { basename, dirname, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { importPackage } from "./packages.js";

const USAGE = `Builds the component of a handler in JavaScript or TypeScript.

Usage: oncely-build ENTRY -o FILE [--world worker|batch-worker] [--wit FOLDER]

ENTRY is the module whose default export is made with handler(...) or, for the world
batch-worker, with batchHandler(...).`;

const SDK = dirname(fileURLToPath(import.meta.url));
const BUNDLE = "bundle.js";
const EXPORTS = {
  worker: ["handler", "exportHandler"],
  "batch-worker": ["batchHandler", "exportBatchHandler"],
};

const COMPILER = "@bytecodealliance/componentize-js";

/** The features of the runtime for which the host has no interfaces. */
const DISABLED = ["http", "fetch-event"];

/** A mistake of the author. It needs no stack. */
class Mistake extends Error {}

async function main() {
  const { entry, out, world, wit } = options();
  const { code, lines } = await bundle(entry, world);
  const mark = await markOf(code, world, wit);
  if (await endsWith(out, mark)) return;

  const folder = await mkdtemp(join(tmpdir(), "oncely-build-"));
  try {
    const sourcePath = join(folder, BUNDLE);
    await writeFile(sourcePath, code);
    const component = await componentize({ entry, sourcePath, world, wit, lines });

    // A host never reads half a component, and `oncely dev` does not watch hidden files.
    await mkdir(dirname(out), { recursive: true });
    const partial = join(dirname(out), `.${basename(out)}.partial`);
    await writeFile(partial, Buffer.concat([component, mark]));
    await rename(partial, out);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/**
 * A custom section with a hash of all inputs. No two builds give the same component, because the
 * engine has a random seed. An unchanged component must stay as it is, or the host compiles it again.
 */
async function markOf(code, world, wit) {
  const hash = createHash("sha256").update(JSON.stringify([code, world, await compilerVersion()]));
  const files = await readdir(wit, { recursive: true });
  for (const file of files.filter((name) => name.endsWith(".wit")).sort()) {
    hash.update(JSON.stringify([file, await readFile(join(wit, file), "utf8")]));
  }
  const name = Buffer.from("oncely:inputs");
  const contents = Buffer.concat([Buffer.from([name.length]), name, hash.digest()]);
  return Buffer.concat([Buffer.from([0, contents.length]), contents]);
}

async function compilerVersion() {
  const { version } = await importPackage(COMPILER);
  return version;
}

async function endsWith(file, mark) {
  const found = await readFile(file).catch(() => Buffer.alloc(0));
  return found.subarray(-mark.length).equals(mark);
}

function options() {
  let parsed;
  try {
    parsed = parseArgs({
      allowPositionals: true,
      options: {
        out: { type: "string", short: "o" },
        world: { type: "string", default: "worker" },
        wit: { type: "string" },
        help: { type: "boolean", short: "h" },
      },
    });
  } catch (error) {
    throw new Mistake(`${error.message}\n\n${USAGE}`);
  }
  const { values, positionals } = parsed;
  if (values.help) {
    console.log(USAGE);
    process.exit(0);
  }
  if (positionals.length !== 1 || !values.out || !EXPORTS[values.world]) throw new Mistake(USAGE);
  const entry = resolve(positionals[0]);
  if (!existsSync(entry)) throw new Mistake(`${positionals[0]} does not exist`);
  const places = values.wit
    ? [resolve(values.wit)]
    : [join(SDK, "../wit"), join(SDK, "../../../wit")];
  const wit = places.find((place) => existsSync(join(place, "worker.wit")));
  if (!wit) throw new Mistake(`there is no worker.wit in ${places[0]}; name its folder with --wit`);
  return { entry, out: resolve(values.out), world: values.world, wit };
}

/** Joins the modules to one, without types, and adds the table of its lines. */
async function bundle(entry, world) {
  const esbuild = await importPackage("esbuild");
  const [exported, maker] = EXPORTS[world];
  const built = await esbuild
    .build({
      stdin: {
        contents: [
          `import handle from ${JSON.stringify(entry)};`,
          `import { ${maker}, start } from ${JSON.stringify(join(SDK, "component.js"))};`,
          `export const ${exported} = ${maker}(handle);`,
          "start();",
        ].join("\n"),
        sourcefile: "entry.js",
        resolveDir: dirname(entry),
      },
      plugins: [resolveSdk],
      bundle: true,
      format: "esm",
      platform: "browser",
      target: "es2022",
      charset: "utf8",
      define: { "process.env.NODE_ENV": '"production"' },
      external: ["oncely:*", "wasi:*"],
      sourcemap: "external",
      sourcesContent: false,
      outfile: join(process.cwd(), BUNDLE),
      write: false,
      logLevel: "silent",
    })
    .catch(async (error) => {
      if (!error.errors) throw error;
      const errors = error.errors.map((one) => ownWords(one, entry));
      throw new Mistake((await messages(esbuild, errors, "error")).join(""));
    });
  process.stderr.write((await messages(esbuild, built.warnings, "warning")).join(""));

  const file = (end) => built.outputFiles.find(({ path }) => path.endsWith(end)).text;
  const guard = (await readFile(join(SDK, "guard.js"), "utf8")).trimEnd();
  const before = guard.split("\n").length + 1;
  const lines = linesOf(JSON.parse(file(".map")), before);
  const table = `globalThis[Symbol.for("oncely.lines")] = ${JSON.stringify(lines)};`;
  return { code: `${table}\n${guard}\n${file(BUNDLE)}`, lines };
}

/** An error without esbuild's advice on settings that this script has not. */
function ownWords(error, entry) {
  const { text, location } = error;
  if (location?.file === "entry.js") {
    const needed = "a default export that is made with handler(...) or batchHandler(...)";
    return { text: `${relative(process.cwd(), entry)} needs ${needed}` };
  }
  const isOfNode = error.notes?.some((note) => note.text.includes("built into node"));
  const why = isOfNode ? ": a component has no modules of Node.js" : "";
  return { text: text + why, location };
}

function messages(esbuild, list, kind) {
  return esbuild.formatMessages(list, { kind, color: Boolean(process.stderr.isTTY) });
}

/** `oncely` is the package of this script, so that a component never has two copies. */
const resolveSdk = {
  name: "oncely",
  setup(build) {
    const require = createRequire(join(SDK, "package.json"));
    build.onResolve({ filter: /^oncely(\/|$)/ }, ({ path }) => {
      try {
        return { path: require.resolve(path) };
      } catch (error) {
        return { errors: [{ text: error.message }] };
      }
    });
  },
};

/** For each line of the bundle the source and its line, as two numbers. Lines count from 1. */
function linesOf(map, before) {
  const sources = map.sources.map((source) => {
    const path = resolve(source);
    return path.startsWith(SDK) ? `oncely/${relative(SDK, path)}` : relative(process.cwd(), path);
  });
  const lines = new Array(2 * (before + 1)).fill(-1);
  let [source, line] = [0, 0];
  for (const segments of map.mappings.split(";")) {
    let first;
    for (const segment of segments.split(",").filter(Boolean)) {
      const [, sourceStep = 0, lineStep = 0] = numbersOf(segment);
      source += sourceStep;
      line += lineStep;
      first ??= [source, line + 1];
    }
    lines.push(...(first ?? [-1, -1]));
  }
  return { file: BUNDLE, sources, lines };
}

/** The numbers of a segment of a source map, in base 64 with variable lengths. */
function numbersOf(segment) {
  const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const numbers = [];
  let [number, shift] = [0, 0];
  for (const digit of segment) {
    const bits = digits.indexOf(digit);
    number += (bits & 31) << shift;
    shift += 5;
    if (bits & 32) continue;
    numbers.push(number & 1 ? -(number >> 1) : number >> 1);
    [number, shift] = [0, 0];
  }
  return numbers;
}

/** Runs the module once and makes a component of the result. */
async function componentize({ entry, sourcePath, world, wit, lines }) {
  const { componentize: make } = await importPackage(COMPILER);
  try {
    const { component } = await make({
      sourcePath,
      witPath: wit,
      worldName: world,
      disableFeatures: DISABLED,
    });
    return component;
  } catch (error) {
    const text = readable(String(error?.message ?? error), lines);
    throw new Mistake(`${relative(process.cwd(), entry)} ${text}`);
  }
}

/** The exception of a module that failed while the build ran it, with positions of the sources. */
function readable(text, lines) {
  const thrown = text.indexOf("Exception while evaluating top-level script");
  if (thrown === -1) return `cannot be initialized: ${text}`;
  const end = text.indexOf("Additionally, some promises were rejected", thrown);
  const stack = text.indexOf("\nStack:", thrown);
  const message = text
    .slice(thrown, end === -1 ? undefined : end)
    .split("\n")
    .slice(1)
    .map((line) => line.replace(/^\S*bundle\.js:\d+:\d+ /, ""))
    .join("\n")
    .trim();
  const frames = [];
  for (const [, name, number] of text.slice(stack).matchAll(/^ *([^@\n]*)@\S*bundle\.js:(\d+):\d+$/gm)) {
    const source = lines.sources[lines.lines[2 * number]];
    // A stack is printed twice.
    const frame = source && `\n    at ${name || "the top level"} (${source}:${lines.lines[2 * number + 1]})`;
    if (frame && !/^(oncely\/|entry\.js$)/.test(source) && !frames.includes(frame)) frames.push(frame);
  }
  return `failed at its top level: ${message}${frames.join("")}`;
}

main().catch((error) => {
  const isMistake = error instanceof Mistake;
  console.error(isMistake ? `error: ${error.message.trim()}` : error);
  process.exit(1);
});
