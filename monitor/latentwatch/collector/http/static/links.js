// What stands behind the address's #: a request or a feature that the dialog shows, and links to it.

import { make } from "./dom.js";

/** @typedef {{ kind: "request" | "feature", id: string }} Target */

/** @param {Target} target */
export function hashOf({ kind, id }) {
  return `#${kind}=${encodeURIComponent(id)}`;
}

/** What this hash names, null for none. @param {string} hash @returns {Target | null} */
export function targetOf(hash) {
  const [, kind, id] = hash.match(/^#(request|feature)=(.+)$/) ?? [];
  return kind === "request" || kind === "feature" ? { kind, id: decoded(id) } : null;
}

/** @param {string} id */
function decoded(id) {
  try {
    return decodeURIComponent(id);
  } catch {
    // A hash typed by hand need not be well encoded; it is then looked up as it stands.
    return id;
  }
}

/** A link to a feature's own view. @param {string} id @param {HTMLElement} name */
export function featureLink(id, name) {
  return make("a", { href: hashOf({ kind: "feature", id }), className: "feature-link" }, name);
}
