// One request: what is known of it, which features it showed and where; token by token where evidence is written.

import { get, NoAnswer, Refused } from "./api.js";
import { statisticOf, watched } from "./catalogue.js";
import { emptyNote, fact, make } from "./dom.js";
import { clockTime, count, figure } from "./format.js";
import { featureLink } from "./links.js";
import { exceededPositions } from "./plots.js";
import { tokenByToken } from "./tokens.js";

/** @import { FeatureTotals, RequestView, ShownFeature, StoredRequest } from "./answers.d.ts" */
/** @typedef {Omit<RequestView, "exceeded_features">} Shown */

const SAME_SECONDS = 0.5;

/**
 * What the dialog shows of the request with this id; of all of them, where several have it.
 * @param {string} request_id
 */
export async function requestDetails(request_id) {
  const [requests, stored, catalogue] = await Promise.all([known(request_id), evidence(request_id), watched()]);
  if (requests instanceof NoAnswer && !stored.length) throw requests;
  const pairs = joined(requests instanceof NoAnswer ? [] : requests, stored);
  const parts = pairs.flatMap(({ request, kept }, i) => {
    const heading = make("h3", { className: "which" }, `Request ${i + 1} of ${pairs.length} with this id`);
    const began = make("span", {}, `, began ${clockTime(request.opened_seconds)} on ${request.replica}`);
    heading.append(began);
    return [...(pairs.length > 1 ? [heading] : []), ...requestView(request, kept, catalogue)];
  });
  return { title: request_id, parts };
}

/**
 * Those in the collector's memory; its refusal where there is none.
 * @param {string} request_id
 */
async function known(request_id) {
  try {
    return (await get("/v1/requests/{request_id}", { request_id })).requests;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return error;
  }
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
 * Each request with its evidence, the latest first. An id that a client uses twice is two requests: told apart by the
 * engine process and by when they began. Evidence outlives memory: what only it knows comes too.
 * @param {RequestView[]} requests
 * @param {StoredRequest[]} stored
 * @returns {{ request: Shown, kept: StoredRequest | undefined }[]}
 */
function joined(requests, stored) {
  const left = new Set(stored);
  /** @type {{ request: Shown, kept: StoredRequest | undefined }[]} */
  const pairs = requests.map((request) => {
    const kept = [...left].find((one) => isSame(one, request));
    if (kept) left.delete(kept);
    return { request, kept };
  });
  pairs.push(...[...left].map((kept) => ({ request: kept, kept })));
  return pairs.sort((one, other) => other.request.opened_seconds - one.request.opened_seconds);
}

/**
 * @param {StoredRequest} kept
 * @param {Shown} request
 */
function isSame(kept, request) {
  return (
    kept.request_id === request.request_id &&
    kept.replica === request.replica &&
    Math.abs(kept.opened_seconds - request.opened_seconds) < SAME_SECONDS
  );
}

/**
 * @param {Shown} request
 * @param {StoredRequest | undefined} kept its evidence
 * @param {Map<string, FeatureTotals>} catalogue
 */
function requestView(request, kept, catalogue) {
  /** @type {Node[]} */
  const parts = [factsOf(request)];
  const strips = kept?.activations.length ? tokenByToken(kept, catalogue) : null;
  if (strips) parts.push(strips);
  if (!request.opening_seen) {
    parts.push(emptyNote("This request began before this collector; its first tokens are not in these figures."));
  }
  if (request.features.length) {
    // With every position known, a line of marks would only repeat it.
    if (!strips) parts.push(marks(request));
    parts.push(featureTable([...request.features], catalogue));
  } else {
    parts.push(emptyNote("No watched feature fired in this request."));
  }
  if (request.features_left_out) parts.push(emptyNote(`${request.features_left_out} further features fired less.`));
  return parts;
}

/** @param {Shown} request */
function factsOf(request) {
  const { scored = 0, inherited = 0, unseen = 0, dropped = 0 } = request.tokens;
  const seen = scored + inherited;
  const missing = unseen + dropped;
  const facts = [
    fact("State", request.outcome),
    fact("Began", clockTime(request.opened_seconds)),
    fact("Took", request.duration_seconds === null ? "–" : `${figure(request.duration_seconds)} s`),
    fact("Tokens", request.total_tokens === null ? `${count(seen + missing)} so far` : count(request.total_tokens)),
    fact("Seen", missing ? `${count(seen)}, ${count(missing)} missing` : "all of them"),
    fact("Limits exceeded", count(request.features.filter((feature) => feature.exceeded).length)),
    fact("Engine", `${request.replica}, ${request.model_name}`),
    fact("Id in the response", request.response_id || "–"),
  ];
  if (request.adapter) facts.push(fact("Adapter", request.adapter));
  if (request.trace_id) facts.push(fact("Trace", request.trace_id));
  return make("dl", { className: "facts" }, ...facts);
}

/** @param {Shown} request */
function marks({ features, prompt_tokens, total_tokens }) {
  const prompt = prompt_tokens ?? 0;
  const note = make(
    "p",
    {},
    make("span", {}, `prompt, ${count(prompt)} tokens`),
    make("span", {}, "marks: where a limit was exceeded most"),
  );
  return make("div", { className: "strip" }, exceededPositions([...features], prompt, total_tokens), note);
}

/**
 * One value a feature: that of the statistic that its limit is on, by its name.
 * @param {ShownFeature[]} features
 * @param {Map<string, FeatureTotals>} catalogue
 */
function featureTable(features, catalogue) {
  const rows = features.map((f) =>
    make(
      "tr",
      { className: f.exceeded ? "hot" : "" },
      make(
        "td",
        { className: "name" },
        featureLink(f.feature, make("b", {}, f.label || f.feature)),
        make("small", {}, `${f.feature} · ${f.severity} · ${statisticOf(catalogue, f.feature)}`),
      ),
      make("td", { className: "number peak" }, figure(f.limit === null ? f.max : f.statistic)),
      make("td", { className: "number" }, figure(f.limit)),
      make("td", { className: "number" }, String((f.limit === null ? f.position : f.statistic_position) ?? "–")),
      make("td", { className: "number" }, f.fired_tokens ? count(f.fired_tokens) : "–"),
    ),
  );
  const heads = ["Feature", "Value", "Limit", "At token", "Fired on"].map((name, i) =>
    make("th", { className: i ? "number" : "", scope: "col" }, name),
  );
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  return make("div", { className: "scroll" }, table);
}
