/** Finds the packages of an author's project. */

import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

/** Imports a package from `node_modules` of the current folder, of this file, or above them. */
export async function importPackage(name) {
  const folder = find(name, process.cwd()) ?? find(name, dirname(fileURLToPath(import.meta.url)));
  if (!folder) {
    console.error(`error: the package ${name} is not installed; run \`npm install\``);
    process.exit(1);
  }
  const { exports, main } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  const file = exports?.import ?? exports?.["."]?.import ?? main;
  return import(pathToFileURL(join(folder, file)).href);
}

function find(name, from) {
  for (let folder = from; ; folder = dirname(folder)) {
    const found = join(folder, "node_modules", name);
    if (existsSync(join(found, "package.json"))) return found;
    if (folder === dirname(folder)) return undefined;
  }
}
