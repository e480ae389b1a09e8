// What stands behind the address's #: a request, a feature or the help, and links to them and out of the page.

import { make } from "./dom.js";

/** @import { Links } from "./answers.d.ts" */

/** @typedef {{ kind: "request" | "feature", id: string } | { kind: "help" }} Target */

/** @param {Target} target */
export function hashOf(target) {
  return target.kind === "help" ? "#help" : `#${target.kind}=${encodeURIComponent(target.id)}`;
}

/** What this hash names, null for none. @param {string} hash @returns {Target | null} */
export function targetOf(hash) {
  if (hash === "#help") return { kind: "help" };
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

/**
 * Shows links out of the page, those that have an address.
 * @param {HTMLElement} parent
 * @param {[words: string, address: string][]} ways
 */
export function showWays(parent, ways) {
  const known = ways.filter(([, address]) => address);
  const key = JSON.stringify(known);
  if (parent.dataset.shown === key) return;
  parent.dataset.shown = key;
  parent.replaceChildren(...known.map(([words, href]) => make("a", { href }, words)));
}

/** The runbook's entry for an alert; empty where no runbook is known. @param {Links} links @param {string} alert */
export function runbookEntry({ runbook }, alert) {
  return runbook && `${runbook}#${alert.toLowerCase()}`;
}

/** A board of Grafana; empty where none is known. @param {Links} links @param {string} board @param {string} [query] */
export function grafanaBoard({ grafana }, board, query = "") {
  return grafana && `${grafana}/d/latentwatch-${board}${query}`;
}
