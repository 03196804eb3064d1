/** The host behind the functions of this package: Oncely in a component, a test otherwise. */

let find = () => undefined;

/** The current host. */
export function backend() {
  const host = find();
  if (host === undefined) {
    throw new Error(
      "there is no host here: call this in a handler, and deliver messages with `oncely/testing`",
    );
  }
  return host;
}

/** Sets the function that finds the current host. */
export function findBackendWith(function_) {
  find = function_;
}
