// The dialog: it shows the request, the feature or the help that stands behind the address's #.

import { NoAnswer, Refused } from "./api.js";
import { at, emptyNote, setText } from "./dom.js";
import { featureDetails } from "./feature.js";
import { help } from "./keys.js";
import { targetOf } from "./links.js";
import { requestDetails } from "./request.js";

/** @import { Target } from "./links.js" */

const KINDS = { request: "Request", feature: "Feature", help: "Help" };
const dialog = at("details", HTMLDialogElement);

/** Shows what the address names, or nothing. */
export async function showDetails() {
  const { hash } = location;
  const target = targetOf(hash);
  if (!target) {
    dialog.close();
    return;
  }
  setText(at("details-kind"), KINDS[target.kind]);
  at("details-title").className = target.kind;
  fill(target.kind === "help" ? "" : target.id, [emptyNote("Looking it up.")]);
  if (!dialog.open) dialog.showModal();
  const { title, parts } = await lookUp(target);
  // The address may name something else by now.
  if (location.hash === hash) fill(title, parts);
}

/** Keeps the dialog and the address together from now on. */
export function followAddress() {
  window.addEventListener("hashchange", showDetails);
  at("details-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    if (targetOf(location.hash)) history.pushState(null, "", location.pathname + location.search);
  });
}

/** @param {Target} target */
async function lookUp(target) {
  if (target.kind === "help") return help();
  const { kind, id } = target;
  try {
    return await (kind === "request" ? requestDetails(id) : featureDetails(id));
  } catch (error) {
    if (!(error instanceof NoAnswer)) throw error;
    const words = error instanceof Refused ? error.message : "The collector does not answer.";
    return { title: id, parts: [emptyNote(words)] };
  }
}

/**
 * @param {string} title
 * @param {Node[]} parts
 */
function fill(title, parts) {
  setText(at("details-title"), title);
  at("details-body").replaceChildren(...parts);
}
