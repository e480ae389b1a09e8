// One request: what is known of it, which features it showed and where; token by token where evidence is written.

import { get, NoAnswer } from "./api.js";
import { emptyNote, fact, make } from "./dom.js";
import { clockTime, count, figure } from "./format.js";
import { activations, exceededPositions } from "./plots.js";

/** @import { ShownFeature, RequestView, StoredRequest } from "./answers.d.ts" */

const STRIPS_SHOWN = 12;

/**
 * What the dialog shows of the request with this id; of all of them, where several have it.
 * @param {string} request_id
 */
export async function requestDetails(request_id) {
  const [{ requests }, stored] = await Promise.all([
    get("/v1/requests/{request_id}", { request_id }),
    evidence(request_id),
  ]);
  const parts = requests.flatMap((request) => {
    const found = stored.find((kept) => kept.request_id === request.request_id && kept.activations.length > 0);
    return requestView(request, found);
  });
  return { title: request_id, parts };
}

/** Only a collector that writes evidence knows every position. @param {string} request_id */
async function evidence(request_id) {
  try {
    return (await get("/v1/evidence/requests/{request_id}", { request_id })).requests;
  } catch (error) {
    if (!(error instanceof NoAnswer)) throw error;
    return [];
  }
}

/**
 * @param {RequestView} request
 * @param {StoredRequest} [stored] with its activations
 */
function requestView(request, stored) {
  /** @type {Node[]} */
  const parts = [factsOf(request)];
  if (stored) parts.push(tokenByToken(stored));
  if (!request.opening_seen) {
    parts.push(emptyNote("This request began before this collector; its first tokens are not in these figures."));
  }
  if (request.features.length) {
    // With every position known, a line of marks would only repeat it.
    if (!stored) parts.push(marks(request));
    parts.push(featureTable(request.features));
  } else {
    parts.push(emptyNote("No watched feature fired in this request."));
  }
  if (request.features_left_out) parts.push(emptyNote(`${request.features_left_out} further features fired less.`));
  return parts;
}

/** @param {RequestView} request */
function factsOf(request) {
  const { scored, inherited, unseen, dropped } = request.tokens;
  const seen = scored + inherited;
  const missing = unseen + dropped;
  const facts = [
    fact("State", request.outcome),
    fact("Began", clockTime(request.opened_seconds)),
    fact("Took", request.duration_seconds === null ? "–" : `${figure(request.duration_seconds)} s`),
    fact("Tokens", request.total_tokens === null ? `${count(seen + missing)} so far` : count(request.total_tokens)),
    fact("Seen", missing ? `${count(seen)}, ${count(missing)} missing` : "all of them"),
    fact("Limits exceeded", count(request.exceeded_features)),
    fact("Engine", `${request.replica}, ${request.model_name}`),
    fact("Id in the response", request.response_id || "–"),
  ];
  if (request.adapter) facts.push(fact("Adapter", request.adapter));
  if (request.trace_id) facts.push(fact("Trace", request.trace_id));
  return make("dl", { className: "facts" }, ...facts);
}

/** @param {RequestView} request */
function marks({ features, prompt_tokens, total_tokens }) {
  const prompt = prompt_tokens ?? 0;
  const note = make(
    "p",
    {},
    make("span", {}, `prompt, ${count(prompt)} tokens`),
    make("span", {}, "marks: where a limit was exceeded most"),
  );
  return make("div", { className: "strip" }, exceededPositions(features, prompt, total_tokens), note);
}

/** @param {ShownFeature[]} features */
function featureTable(features) {
  const rows = features.map((f) =>
    make(
      "tr",
      { className: f.exceeded ? "hot" : "" },
      make(
        "td",
        { className: "name" },
        make("b", {}, f.label || f.feature),
        make("small", {}, `${f.feature} · ${f.severity}`),
      ),
      make("td", { className: "number peak" }, figure(f.statistic ?? f.max)),
      make("td", { className: "number" }, figure(f.limit)),
      make("td", { className: "number" }, String(f.statistic_position ?? f.position)),
      make("td", { className: "number" }, f.fired_tokens ? count(f.fired_tokens) : "–"),
    ),
  );
  const heads = ["Feature", "Largest", "Limit", "At token", "Fired on"].map((name, i) =>
    make("th", { className: i ? "number" : "", scope: "col" }, name),
  );
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  return make("div", { className: "scroll" }, table);
}

/** @param {StoredRequest} request */
function tokenByToken(request) {
  const ends = request.activations.flatMap((found) => found.positions.map((position) => position + 1));
  const total = Math.max(request.total_tokens ?? 0, ...ends, 1);
  const prompt = request.prompt_tokens ?? 0;
  const rows = request.activations
    .slice(0, STRIPS_SHOWN)
    .map((found) =>
      make(
        "div",
        { className: "strip-row" },
        make("span", { className: "strip-name", title: found.feature }, found.label || found.feature),
        activations(found, total, prompt),
      ),
    );
  const note =
    `One column a token, ${count(total)} in all; the line is where the prompt (${count(prompt)}) ends. ` +
    "Higher is stronger; orange: this token alone is over the limit.";
  return make(
    "div",
    { className: "strips" },
    make("h3", {}, "Token by token"),
    ...rows,
    make("p", { className: "note" }, note),
  );
}
