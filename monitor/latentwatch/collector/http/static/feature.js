// One feature: what it is in words, how it drifts, its values over time, whether its limit does what it promised, the
// latest requests that exceeded it.

import { get } from "./api.js";
import { emptyNote, fact, make } from "./dom.js";
import { began } from "./drift.js";
import { whereOf } from "./flagged.js";
import { ago, count, figure, idWords, share } from "./format.js";
import { grafanaBoard, hashOf, runbookEntry, showWays } from "./links.js";
import { sparkline } from "./plots.js";

/** @import { ExceedanceView, FeatureSeries, FeatureTotals, Links, Overview, Reliability } from "./answers.d.ts" */

const REQUESTS_SHOWN = 12;
const TOP_TOKENS_SHOWN = 8;
/** @type {Record<string, string>} */
const KINDS = { sae: "A feature of a sparse autoencoder", probe: "A trained probe", direction: "A direction" };
/** @type {Record<string, string>} */
const SEVERITIES = {
  critical: "pages somebody",
  warning: "opens a ticket",
  info: "is counted and shown, and wakes nobody",
  none: "is shown here and nowhere else",
};
/** By the key in the watchlist; others are said as they stand there. @type {Record<string, string>} */
const FIGURES = {
  auroc: "AUROC",
  tpr_at_fpr_1pct: "Found at 1 % false positives",
  tpr_at_fpr_0_1pct: "Found at 0.1 % false positives",
  n: "Requests measured",
  n_positive: "of them with the behaviour",
  q_value: "q-value",
  base_rate: "Base rate",
  aggregation: "Aggregated by",
  split: "Split",
  measured_on: "Measured on",
  label_source: "Who labelled it",
  remarks: "Remarks",
};
const SHARES = ["tpr_at_fpr_1pct", "tpr_at_fpr_0_1pct", "base_rate"];

/**
 * What the dialog shows of the feature with this id.
 * @param {string} id
 */
export async function featureDetails(id) {
  const { features } = await get("/v1/features");
  const feature = features.find((found) => found.id === id);
  if (!feature) return { title: id, parts: [emptyNote(`The watchlist has no feature ${id}.`)] };
  const [{ models }, overview, { exceedances: events }] = await Promise.all([
    get("/v1/drift"),
    get("/v1/overview", { features: 1, search: id }),
    get("/v1/exceedances", { feature: id, limit: REQUESTS_SHOWN }),
  ]);
  const alarms = models.flatMap((model) => model.alarms).filter((alarm) => alarm.feature === id);
  const series = overview.features.find((found) => found.feature === id);
  const parts = [
    inWords(feature),
    ...alarms.map((alarm) => make("p", { className: "notice" }, `${alarm.text} It began: ${began(alarm)}.`)),
    ...(series ? overTime(series, overview) : []),
    ...(feature.reliability ? reliability(feature.reliability) : []),
    make("h3", {}, "Latest requests over the limit"),
    events.length ? requestList(events, feature, overview.now) : emptyNote("None since this collector started."),
    ...topTokens(feature),
    ...known(feature),
    ...elsewhere(feature, overview.links),
  ];
  return { title: feature.label || id, parts };
}

/** @param {FeatureTotals} feature */
function inWords({
  id,
  kind,
  hook_point,
  gate,
  limit,
  statistic,
  units,
  severity,
  skip_first_positions: skipped,
  ...seen
}) {
  const scores = gate === "none" ? "scores every token" : `fired in ${count(seen.requests)} requests so far`;
  const said = [make("code", {}, id), ` ${KINDS[kind] ?? kind}, read at ${hook_point}; it ${scores}. `];
  if (limit) {
    const unit = units ? ` (${units})` : "";
    said.push(`A request whose ${statistic} is above ${figure(limit.value)}${unit} ${SEVERITIES[severity] ?? ""}. `);
  } else said.push("It has no limit, so nothing exceeds it. ");
  if (skipped) said.push(`The first ${skipped === 1 ? "token does" : `${skipped} tokens do`} not count. `);
  if (gate === "calibrated") said.push("A threshold stands for the autoencoder's choice of its k largest. ");
  return make("p", { className: "lead" }, ...said);
}

/**
 * @param {FeatureSeries} series
 * @param {Overview} overview
 */
function overTime(series, overview) {
  const plot = sparkline();
  plot.update(series);
  const limit = series.limit === null ? "" : `, limit ${figure(series.limit)} (dashed)`;
  const span = `${count(overview.tokens_seen.length)} windows of ${figure(overview.window_seconds)} s`;
  const ends = make("p", { className: "ends" }, make("span", {}, span), make("span", {}, "now"));
  return [
    make("h3", {}, `In each window the ${series.statistic}: peak ${figure(series.peak)}${limit}`),
    make("div", { className: "big-plot" }, plot.node, ends),
  ];
}

/** Whether the limit does what it promised. @param {Reliability} reliability */
function reliability({ promised_ratio: promised, seen_ratio: seen, seen_low, seen_high, exceedances, requests }) {
  const interval = seen === null ? "" : `, 95 % interval ${share(seen_low)} to ${share(seen_high)}`;
  const facts = [
    fact("Promised by the baseline", promised === null ? "no baseline" : `${share(promised)} of requests`),
    fact("Seen here", seen === null ? "no request has ended" : `${share(seen)} of ${count(requests)}${interval}`),
    fact("Requests over it", count(exceedances)),
    fact("So it is exceeded", comparison(promised, seen_low, seen_high)),
  ];
  return [make("h3", {}, "Does the limit keep its promise?"), make("dl", { className: "facts" }, ...facts)];
}

/**
 * @param {number | null} promised
 * @param {number | null} low
 * @param {number | null} high
 */
function comparison(promised, low, high) {
  if (promised === null || low === null || high === null) return "unknown";
  if (low > promised) return "more often than promised";
  return high < promised ? "less often than promised" : "as promised, as far as so few requests tell";
}

/** @param {FeatureTotals} feature */
function topTokens({ evidence }) {
  /** @type {{ token: string, before?: string, after?: string, activation: number }[]} */
  const tokens = Array.isArray(evidence.top_tokens) ? evidence.top_tokens : [];
  if (!tokens.length) return [];
  const rows = tokens.slice(0, TOP_TOKENS_SHOWN).map(({ token, before = "", after = "", activation }) => {
    const text = make("span", { className: "context" }, before, make("mark", {}, token), after);
    return make("li", {}, text, make("span", { className: "number" }, figure(activation)));
  });
  return [
    make("h3", {}, "Tokens on which it fired most, when it was measured"),
    make("ol", { className: "tokens" }, ...rows),
  ];
}

/** What was measured of it before it was watched. @param {FeatureTotals} feature */
function known({ evidence }) {
  const facts = Object.entries(evidence).flatMap(([name, value]) => {
    if (typeof value !== "number" && typeof value !== "string") return [];
    const words = typeof value === "string" ? value : SHARES.includes(name) ? share(value) : plain(value);
    return [fact(FIGURES[name] ?? name.replaceAll("_", " "), words)];
  });
  const confounds = Array.isArray(evidence.confounds)
    ? evidence.confounds.filter((one) => typeof one === "string")
    : [];
  if (confounds.length) facts.push(fact("Also fires on", confounds.join("; ")));
  if (!facts.length) return [];
  return [make("h3", {}, "What was measured of it"), make("dl", { className: "facts" }, ...facts)];
}

/** @param {number} value */
function plain(value) {
  return Number.isInteger(value) ? count(value) : figure(value);
}

/**
 * @param {FeatureTotals} feature
 * @param {Links} links
 */
function elsewhere({ id, severity }, links) {
  const alert = severity === "critical" ? "LatentwatchCriticalExceedance" : "LatentwatchWarningExceedance";
  const parent = make("p", { className: "elsewhere" });
  showWays(parent, [
    ["This feature in Grafana", grafanaBoard(links, "feature", `?var-feature=${encodeURIComponent(id)}`)],
    ["What to do: the runbook", runbookEntry(links, alert)],
  ]);
  return parent.hasChildNodes() ? [parent] : [];
}

/**
 * @param {ExceedanceView[]} events
 * @param {FeatureTotals} feature
 * @param {number} now
 */
function requestList(events, { statistic }, now) {
  const rows = events.map((event) => {
    const link = make("a", { href: hashOf({ kind: "request", id: event.request_id }) }, idWords(event.request_id));
    return make("li", {}, link, ` ${statistic} ${figure(event.peak)}, ${whereOf(event)}, ${ago(now - event.seconds)}`);
  });
  return make("ol", { className: "plain" }, ...rows);
}
