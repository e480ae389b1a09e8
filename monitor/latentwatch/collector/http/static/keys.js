// Keys of the page, and the help that names them. Nothing that they do cannot be done without them.

import { at } from "./dom.js";
import { hashOf } from "./links.js";

const OFF = "latentwatch.keys-off";

/** What the dialog shows as help. */
export function help() {
  const parts = [...at("help-text", HTMLTemplateElement).content.cloneNode(true).childNodes];
  const choice = parts.map((part) => (part instanceof Element ? part.querySelector("input") : null)).find(Boolean);
  if (choice) {
    choice.checked = !areOff();
    choice.addEventListener("change", () => localStorage.setItem(OFF, choice.checked ? "" : "yes"));
  }
  return { title: "Reading this page", parts };
}

/** Follows `/` and `?` from now on, outside text fields, unless they were switched off in the help. */
export function followKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || areOff() || isTyping(event.target)) return;
    if (event.key === "/" && !at("details", HTMLDialogElement).open) at("filter").focus();
    else if (event.key === "?") location.hash = hashOf({ kind: "help" });
    else return;
    event.preventDefault();
  });
}

/** Speech control types letters: whoever uses it can switch them off. */
function areOff() {
  return localStorage.getItem(OFF) === "yes";
}

/** @param {EventTarget | null} target */
function isTyping(target) {
  return target instanceof HTMLInputElement && target.type !== "checkbox";
}
