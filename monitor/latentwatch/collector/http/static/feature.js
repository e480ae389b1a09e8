// One feature: what it is, how it drifts, its values over time, the latest requests that it exceeded its limit in.

import { get } from "./api.js";
import { emptyNote, fact, make } from "./dom.js";
import { began } from "./drift.js";
import { ago, count, figure, idWords } from "./format.js";
import { hashOf } from "./links.js";
import { sparkline } from "./plots.js";

/** @import { ExceedanceView, FeatureSeries, FeatureTotals, Limit, Overview } from "./answers.d.ts" */

const REQUESTS_SHOWN = 12;

/**
 * What the dialog shows of the feature with this id.
 * @param {string} id
 */
export async function featureDetails(id) {
  const [{ features }, { models }, overview] = await Promise.all([
    get("/v1/features"),
    get("/v1/drift"),
    get("/v1/overview", { features: 1, search: id }),
  ]);
  const feature = features.find((found) => found.id === id);
  if (!feature) return { title: id, parts: [emptyNote(`The watchlist has no feature ${id}.`)] };
  const alarms = models.flatMap((model) => model.alarms).filter((alarm) => alarm.feature === id);
  const series = overview.features.find((found) => found.feature === id);
  const events = overview.exceedances.filter((event) => event.feature === id).slice(0, REQUESTS_SHOWN);
  const parts = [
    factsOf(feature),
    ...alarms.map((alarm) => make("p", { className: "notice" }, `${alarm.text} It began: ${began(alarm)}.`)),
    ...(series ? overTime(series, overview) : []),
    make("h3", {}, "Latest requests over the limit"),
    events.length ? requestList(events, overview.now) : emptyNote("None among the latest exceedances."),
  ];
  return { title: feature.label || id, parts };
}

/** @param {FeatureTotals} feature */
function factsOf(feature) {
  const evidence = Object.entries(feature.evidence).flatMap(([name, value]) => {
    if (typeof value !== "number" && typeof value !== "string") return [];
    return [fact(name.replaceAll("_", " "), typeof value === "number" ? figure(value) : value)];
  });
  return make(
    "dl",
    { className: "facts" },
    fact("Id", feature.id),
    fact("Severity", feature.severity),
    fact("Where", `${feature.hook_point}, ${feature.kind}`),
    fact("Limit", feature.limit ? limitWords(feature.limit) : "none"),
    fact("Requests over it", count(feature.exceedances)),
    fact("Fired in requests", feature.gate === "none" ? "scores every token" : count(feature.requests)),
    fact("Gate", feature.gate),
    fact("Units", feature.units || "its own"),
    ...evidence,
  );
}

/** @param {Limit} limit */
function limitWords({ statistic, value, window_tokens, phase }) {
  const what = statistic === "max" ? "largest value" : `mean of ${window_tokens} tokens`;
  return `${figure(value)} on the ${what}${phase === "any" ? "" : `, ${phase} only`}`;
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
    make("h3", {}, `Largest value in each window: peak ${figure(series.peak)}${limit}`),
    make("div", { className: "big-plot" }, plot.node, ends),
  ];
}

/**
 * @param {ExceedanceView[]} events
 * @param {number} now
 */
function requestList(events, now) {
  const rows = events.map((event) => {
    const link = make("a", { href: hashOf({ kind: "request", id: event.request_id }) }, idWords(event.request_id));
    const where = `from token ${event.position} (${event.phase}), ${ago(now - event.seconds)}`;
    return make("li", {}, link, ` ${figure(event.peak)}, ${where}`);
  });
  return make("ol", { className: "plain" }, ...rows);
}
