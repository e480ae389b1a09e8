// The live page: asks the collector again and again, and shows what it answers.

import { get, NoAnswer } from "./api.js";
import { watched } from "./catalogue.js";
import { followAddress, showDetails } from "./details.js";
import { at, setText } from "./dom.js";
import { refreshDrift } from "./drift.js";
import { clockTime } from "./format.js";
import { showHealth } from "./health.js";
import { followKeys } from "./keys.js";
import { hashOf } from "./links.js";
import { PAGE, showOverview } from "./overview.js";

/** @import { Question } from "./overview.js" */

const REFRESH_MS = 2000;
const DRIFT_MS = 10000;

/** @type {Question} */
let question = { first: 0, search: "" };
/** When what is shown was true, in seconds since the Unix epoch; null while nothing is. @type {number | null} */
let shownSeconds = null;

/** Asks, and shows the answer unless the question has changed meanwhile. */
async function ask() {
  const asked = question;
  const view = await get("/v1/overview", { features: PAGE, ...asked });
  const catalogue = await watched();
  if (asked !== question) return;
  shownSeconds = view.now;
  showOverview(view, asked, catalogue);
  showHealth(view.causes, view.links);
}

/** @param {number} rank of the first feature to show */
async function turnTo(rank) {
  question = { first: Math.max(0, rank), search: at("filter", HTMLInputElement).value };
  try {
    await ask();
  } catch (error) {
    // The next refresh says it.
    if (!(error instanceof NoAnswer)) throw error;
  }
}

/** @param {string} problem empty where the collector answers */
function showConnection(problem) {
  document.body.classList.toggle("stale", problem !== "");
  at("banner").hidden = problem === "";
  setText(at("live-text"), problem ? "no connection" : "live");
  if (!problem) return;
  document.title = "✕ No connection – latentwatch";
  const shown =
    shownSeconds === null ? "Nothing has been shown yet." : `What is shown is from ${clockTime(shownSeconds)}.`;
  setText(at("banner"), `The collector does not answer (${problem}). ${shown} Trying again every 2 seconds.`);
}

/**
 * Again and again, counted from the end of the last time, so that what takes longer than this still comes to its end.
 * A hidden page asks less often.
 * @param {() => Promise<void>} task
 * @param {number} every_ms
 * @param {(problem: string) => void} [report]
 */
async function repeat(task, every_ms, report = () => {}) {
  try {
    await task();
    report("");
  } catch (error) {
    if (!(error instanceof NoAnswer)) throw error;
    report(error.message);
  } finally {
    setTimeout(repeat, document.hidden ? 4 * every_ms : every_ms, task, every_ms, report);
  }
}

at("filter").addEventListener("input", () => turnTo(0));
at("earlier").addEventListener("click", () => turnTo(question.first - PAGE));
at("later").addEventListener("click", () => turnTo(question.first + PAGE));
at("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = at("find-id", HTMLInputElement).value.trim();
  if (id) location.hash = hashOf({ kind: "request", id });
});
followAddress();
followKeys();
repeat(refreshDrift, DRIFT_MS);
repeat(ask, REFRESH_MS, showConnection).then(showDetails);
