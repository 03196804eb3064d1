/** Log lines of the host. `console` writes lines without a level. */

export function debug(...parts: unknown[]): void;
export function info(...parts: unknown[]): void;
export function warn(...parts: unknown[]): void;
export function error(...parts: unknown[]): void;
