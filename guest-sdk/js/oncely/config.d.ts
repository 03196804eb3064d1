/** The `[worker.config]` table of the manifest. */

/** The value of a key, or `otherwise`. */
export function get(key: string): string | undefined;
export function get(key: string, otherwise: string): string;
